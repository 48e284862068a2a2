"""One training step of the reconstructor."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks import timing, torch_reconstructor
from benchmarks.torch_reconstructor import PEERS, Problem, TorchTraining, lean
from jinv.reconstruct import network, training
from jinv.reconstruct.normalisation import Normalisation

CONFIG = training.Config()
"""As published: Adam at 2e-4, 32 shadow models a step, softmin at 100."""
KEY = jax.random.key(0)
SETS = 2048
"""Shadow models in memory."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A reconstructor of arXiv 2505.14323 that is told the class, of heads of ten images.

    Attributes:
      data: whose heads.
      inputs: parameters of a head.
      width: G.
      channels: of an image of 32 px.
      dtype: of maps and products.
    """

    data: str
    inputs: int
    width: int
    channels: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.data} N=10, {self.inputs} inputs, G {self.width}, {self.dtype}"

    @property
    def network(self) -> network.Config:
        """Its sizes."""
        return network.Config(self.inputs, self.width, 32, self.channels, 10)


MNIST, CIFAR = Case("mnist", 2570, 256, 1), Case("cifar", 12810, 512, 3)
CASES = (MNIST, CIFAR)
GPU_CASES = tuple(
    dataclasses.replace(case, dtype=dtype) for dtype in ("bfloat16", "float32") for case in CASES
)


def problem(case: Case) -> Problem:
    """Noise for images and weights, which takes as long as others."""
    rng = np.random.default_rng(0)
    shape = (1000, 32, 32, case.channels)
    mean = rng.standard_normal(case.inputs, np.float32)
    std = 0.5 + rng.random(case.inputs, np.float32)
    return Problem(
        images=rng.integers(0, 256, shape, np.uint8),
        labels=np.arange(1000, dtype=np.int32) % 10,
        weights=mean + std * rng.standard_normal((SETS, case.inputs), np.float32),
        indices=(10 * rng.integers(0, 100, (SETS, 10)) + np.arange(10)).astype(np.int32),
        mean=mean,
        std=std,
    )


def our_step(case: Case, given: Problem) -> tuple[network.Reconstructor, training.Step]:
    """What is trained, and a step of the training that users run."""
    net = network.make(case.network, network.Execution(case.dtype))
    every = np.arange(case.inputs)
    normalisation = Normalisation(case.inputs, every, given.mean, given.std)
    return net, training.make_step(net, CONFIG, normalisation)


def our_data(given: Problem) -> tuple[training.Population, training.Shadows]:
    """What every step is told, on the device; after the last shadow models come these again."""
    population = training.Population(jnp.asarray(given.images), jnp.asarray(given.labels))
    weights, indices = jnp.asarray(given.weights), jnp.asarray(given.indices)
    return population, training.Shadows(weights, indices, jnp.zeros((), jnp.int32))


def our_steps(
    case: Case, given: Problem, loop: timing.Loop | None = None, chunk: int = 10
) -> timing.Steps:
    """Ours, from initial parameters on.

    Args:
      case: what is timed.
      given: its problem.
      loop, chunk: see `timing.Steps`.
    """
    net, step = our_step(case, given)
    state = training.init(net, CONFIG, jax.random.key(0))
    return timing.Steps(step, state, our_data(given), loop, chunk)


def initial(case: Case, given: Problem) -> Any:
    """The same parameters, of the type of the shadow models."""
    variables = network.make(case.network).init(jax.random.key(0))
    dtype = given.weights.dtype
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 else x, variables)


def their_steps(
    case: Case, peer: str, given: Problem, net: torch_reconstructor.Network | None = None
) -> TorchTraining:
    """A peer's, from the same parameters on.

    Args:
      case: what is timed.
      peer: its name.
      given: the problem.
      net: with parameters of its own, instead.
    """
    return TorchTraining(
        peer,
        net or torch_reconstructor.network(case.network, initial(case, given), lean(peer)),
        given,
        classes=10,
        batch=CONFIG.batch,
        lr=CONFIG.lr,
        alpha=CONFIG.alpha,
        dtype=case.dtype,
    )


class Evaluated(NamedTuple):
    """What a side says of the first shadow models.

    Attributes:
      loss: mean over the batch.
      gradient: of all parameters, one after the other.
    """

    loss: float
    gradient: np.ndarray


def our_evaluation(case: Case, given: Problem) -> Evaluated:
    """By a step: Adam's first moment is a tenth of the gradient then."""
    _, step = our_step(case, given)

    def first(variables: Any, data: Any) -> tuple[jax.Array, Any]:
        optimizer = training.make_optimizer(CONFIG).init(network.parameters(variables))
        state = training.State(variables, optimizer, {}, jnp.zeros((), jnp.int32))
        state, info = step(KEY, state, data)
        return info.loss, optax.tree.get(state.optimizer, "mu")

    loss, moment = jax.jit(first)(initial(case, given), our_data(given))
    with torch.device("meta"):
        order = torch_reconstructor.Network(case.network, lean=True)
    paired = torch_reconstructor.paired(order, moment)
    return Evaluated(float(loss), 10 * _flat(array for _, _, _, array in paired))


def their_evaluation(side: TorchTraining) -> Evaluated:
    """With the classes that ours draws."""
    examples = side.indices.shape[1]
    drawn = jax.random.randint(jax.random.fold_in(KEY, 0), (side.batch,), 0, examples)
    loss, gradients = side.loss_and_gradient(np.array(drawn))
    return Evaluated(loss, _flat(gradients))


def _flat(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """In float32: in float64 those of CIFAR's would fill the memory."""
    return np.concatenate([array.astype(np.float32).ravel() for array in arrays])


def check_agreement(what: str, ours: Evaluated, theirs: Evaluated, tolerance: Any) -> dict:
    """Differences between the sides; ends the program if one does not do the work."""
    pairs = (({"loss": each.loss}, each.gradient) for each in (ours, theirs))
    return timing.agreement(what, *pairs, tolerance)


def differences(
    case: Case, given: Problem, peers: Sequence[str], side: Callable[[str], TorchTraining]
) -> dict[str, dict[str, float]]:
    """For each peer, `check_agreement` with us. On CPU in float64; on GPU as it will be timed.

    Args:
      case: what is timed.
      given: its problem.
      peers: their names.
      side: name -> what is timed; on GPU only.
    """
    if jax.default_backend() == "gpu":
        ours = our_evaluation(case, given)
        tolerance = timing.ROUNDED[case.dtype]
        return {
            peer: check_agreement(f"{case}: {peer}", ours, their_evaluation(side(peer)), tolerance)
            for peer in peers
        }
    given = given._replace(weights=given.weights.astype(np.float64))
    found = {}
    with jax.enable_x64(True):
        ours = our_evaluation(case, given)
        for peer in peers:
            theirs = their_evaluation(their_steps(case, peer, given))
            found[peer] = check_agreement(f"{case}: {peer}", ours, theirs, timing.EXACT)
    return found


def measure(case: Case, peers: Sequence[str], repeats: int, steps: int) -> Iterator[dict]:
    """One case against every peer, one after the other: two of CIFAR's fill the memory."""
    given = problem(case)
    side = functools.partial(their_steps, case, given=given)
    if jax.default_backend() == "gpu":
        side = functools.cache(side)  # what is checked is timed
    elif case.data == "cifar":
        steps = 1  # takes ten seconds
    checked = differences(case, given, peers, side)
    ours = our_steps(case, given, chunk=steps)
    for peer in peers:
        rounds = timing.take_turns(ours, {peer: side(peer)}, repeats, steps)
        yield timing.row(str(case), peer, rounds, **checked[peer])


def run(args: argparse.Namespace) -> None:
    """The `reconstructor` command."""
    peers = timing.chosen_peers(PEERS, args.peers)
    known = GPU_CASES if jax.default_backend() == "gpu" else CASES
    cases = timing.chosen(known, args.cases)
    measured = (measure(case, peers, args.repeats, args.steps) for case in cases)
    timing.report_rows(itertools.chain.from_iterable(measured), args.out)
