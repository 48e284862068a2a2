"""A recipe of one's own with its command: `jinv mean-weight --config F --out DIR`."""

import dataclasses

import jax.numpy as jnp

from jinv.models.network import Network
from jinv.runs import command


@dataclasses.dataclass(frozen=True)
class Config:
    network: Network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What summary.json holds.

    Attributes:
      mean: of the head's weights.
    """

    mean: float


class MeanWeight(command.Loaded):
    def __init__(self, config: Config) -> None:
        self.net = config.network.load()

    def run(self, folder):
        weight = self.net.variables
        for key in (*self.net.head, "weight"):
            weight = weight[key]
        return command.finish(folder, Summary(mean=float(jnp.mean(weight))))


COMMAND = command.Command("mean-weight", str(__doc__), Config, MeanWeight, Summary)
