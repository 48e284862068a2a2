"""A network as config files name it."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Annotated, Any, Literal

from jinv import checks, files
from jinv.checks import Count, File
from jinv.models import own, registry, trained
from jinv.models.subnetwork import Subnetwork, initial_statistics
from jinv.net import Net, with_parameters

WORDS = ("package", "random")
"""Weights that are no paths."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and where its weights are.

    Attributes:
      model: name in the registry, or `package.module:function` for a function of your own that
        makes a `jinv.Net`; it is looked for in the current folder too.
      name: in logs and reports, if not the model's: two networks of one architecture need two.
      weights: a .pth or .safetensors file, "package" for weights inside an installed package, a
        folder that `jinv pretrain` wrote, or "random". A network of your own comes with the
        weights that its function gives it, which "package" leaves as they are.
      classes: number of classes, if not the usual one.
      subnetwork: of a file that holds scores beside weights, which share of these stays; of
        random weights, what is drawn. A folder that `jinv pretrain` wrote tells it itself.
      statistics: BatchNorm's running statistics: the network's "own", or "reset" to means of 0 and
        variances of 1, which a network has that nothing was loaded into.
    """

    model: registry.Name
    weights: Annotated[str, File(WORDS)] = "package"
    classes: Count | None = None
    name: str | None = None
    subnetwork: Subnetwork | None = None
    statistics: Literal["own", "reset"] = "own"

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.subnetwork is not None and self.weights != "random":
            reason = "the file holds the weights"
            checks.unused(self.subnetwork, reason, "weights", "scale_by_kept")

    @property
    def label(self) -> str:
        """Its name in logs and reports."""
        return self.name or self.model

    def load(self) -> Net:
        """Return the network; while anyone holds it, all get the same one.

        Raises:
          ValueError: it cannot be loaded; the message says why.
        """
        stamps = _stamps(files.path(self.weights))
        said = (self.subnetwork, self.statistics)
        key = (self.model, self.weights, self.classes, self.label, *said, *stamps)
        net = _HELD.get(key)
        if net is None:
            _HELD[key] = net = self._read()
        return net

    def _read(self) -> Net:
        try:
            if self.weights not in WORDS and files.path(self.weights).is_dir():
                net = trained.load_trained(self.weights)
                if net.name != self.model:
                    raise ValueError(f"{self.weights} holds a {net.name}, not a {self.model}")
                if self.classes not in (None, net.classes):
                    raise ValueError(
                        f"{self.weights} holds a network of {net.classes} classes, not of "
                        f"{self.classes}: leave `classes` out"
                    )
                if self.subnetwork is not None:
                    self._check_kept(self.subnetwork.kept)
            elif self.weights == "random" and own.names_one(self.model):
                raise ValueError("it comes with its function's weights: leave `weights` out")
            else:
                weights = None if self.weights == "random" else self.weights
                net = registry.load(
                    self.model, weights, classes=self.classes, subnetwork=self.subnetwork
                )
        except (ValueError, OSError, ImportError) as error:
            raise ValueError(f"cannot load {self.label}: {error}") from None
        if self.statistics == "reset":
            variables = with_parameters(net.variables, initial_statistics(net))
            net = dataclasses.replace(net, variables=variables, weights=None)
        return dataclasses.replace(net, name=self.label)

    def _check_kept(self, said: float) -> None:
        """Refuse another share than the folder's."""
        kept = trained.kept(files.path(self.weights))
        if said != kept:
            held = "no subnetwork" if kept is None else f"a subnetwork that keeps {kept:g}"
            raise ValueError(f"{self.weights} holds {held}: leave `subnetwork` out")


# Weights take hundreds of megabytes: an inverted network and a judge that is the same share them,
# and nothing outlives its last user.
_HELD: weakref.WeakValueDictionary[tuple[Any, ...], Net] = weakref.WeakValueDictionary()


def _stamps(weights: Path) -> list[tuple[str, int, int]]:
    """What tells a file of weights, or those of a folder, from others written in its place."""
    places = [weights, weights / trained.WEIGHTS, weights / trained.SUMMARY]
    found = [(str(file.absolute()), file.stat()) for file in places if file.is_file()]
    return [(path, told.st_mtime_ns, told.st_size) for path, told in found]
