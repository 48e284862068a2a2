"""What a federated-learning attacker holds, and what only the victim and the scorer know.

`Evidence` is one gradient or weight update with its circumstances; `Secret` the images and labels
behind it. Attacks take `Evidence`, scores take both. `simulate` makes the two from a network and
images; files carry evidence that was captured elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import weights_convert
from jinv import checks
from jinv.files import write_atomic
from jinv.net import (
    Moments,
    Net,
    Parameters,
    Variables,
    as_parameters,
    parameters,
    plain,
    with_parameters,
)
from jinv.objective.terms import cross_entropy

Statistics = Literal["none", "running", "exact", "update"]
_WITH_MOMENTS = ("exact", "update")


@dataclasses.dataclass(frozen=True)
class Local:
    """Several local SGD steps before the client answers (FedAvg).

    Attributes:
      lr: learning rate.
      batches: indices of the images of every step, in order.
    """

    lr: float
    batches: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if self.lr <= 0 or not self.batches or not all(self.batches):
            raise ValueError("local training needs a positive lr and steps of at least one image")


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """How evidence came to be: all of `Evidence` but its numbers. An attack's program fits these.

    Attributes:
      images, training, statistics, local: see `Evidence`.
    """

    images: int
    training: bool
    statistics: Statistics
    local: Local | None


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What an attacker holds.

    Attributes:
      values: tree like the network's `parameters`: the gradient of the mean cross-entropy, or with
        `local` the weights after minus before.
      images: K, how many images are behind it.
      training: the victim's BatchNorm layers normalised with the batch's own moments.
      statistics: what is known of the moments at BatchNorm layers: "none"; the network's "running"
        ones, a weak prior; those of the victim's batch, "exact"; or solved from a client's new
        running statistics, "update".
      moments: of every BatchNorm layer in forward order, for "exact" and "update".
      local: circumstances of a weight update, None for a gradient.
    """

    values: Parameters
    images: int
    training: bool = False
    statistics: Statistics = "none"
    moments: tuple[Moments, ...] | None = None
    local: Local | None = None

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.images < 1:
            raise ValueError(f"evidence is of at least one image, not {self.images}")
        if (self.moments is not None) != (self.statistics in _WITH_MOMENTS):
            raise ValueError(f"{self.statistics!r} statistics and moments do not go together")
        if self.local is not None:
            used = {i for batch in self.local.batches for i in batch}
            if used != set(range(self.images)):
                raise ValueError(f"local batches must use images 0 to {self.images - 1}, all")

    @property
    def circumstances(self) -> Circumstances:
        """All but the values and moments."""
        return Circumstances(self.images, self.training, self.statistics, self.local)

    def check(self, net: Net) -> None:
        """Raise ValueError naming every layer that is missing, misshaped or not finite."""
        values = as_parameters(net, self.values)
        weights_convert.to_flax(weights_convert.from_flax(values), parameters(net))
        if self.moments is not None and len(self.moments) != len(net.statistics):
            raise ValueError(
                f"moments of {len(self.moments)} BatchNorm layers for {len(net.statistics)}"
            )
        net.mode(self.training)


@dataclasses.dataclass(frozen=True)
class Secret:
    """What the evidence was made of; no attack may see it.

    Attributes:
      images: (K, H, W, C), normalised.
      labels: (K,) classes.
    """

    images: np.ndarray
    labels: np.ndarray


def loss(net: Net, variables: Variables, images: Array, labels: Array, training: bool) -> Array:
    """Compute the mean cross-entropy of a batch.

    Args:
      net: the network.
      variables: its variables.
      images: (K, H, W, C), normalised.
      labels: (K, C) distributions.
      training: BatchNorm layers normalise with the batch's moments.
    """
    return loss_and_moments(net, variables, images, labels, training)[0]


def loss_and_moments(
    net: Net, variables: Variables, images: Array, labels: Array, training: bool
) -> tuple[Array, tuple[Moments, ...]]:
    """Compute `loss`, and the moments that BatchNorm layers saw on the way.

    Args:
      net, variables, images, labels, training: see `loss`.
    """
    outputs = net.mode(training)(variables, images)
    return cross_entropy(outputs.logits, labels), outputs.moments


def observed(
    net: Net,
    variables: Variables,
    images: Array,
    labels: Array,
    *,
    training: bool = False,
    local: Local | None = None,
    at_once: int | None = None,
) -> dict[Any, Any]:
    """Compute what a client with these images sends, differentiable in images and labels.

    The gradient g = d loss / d parameters; with `local`, the sum of its SGD steps -lr g_t.

    Args:
      net: the network.
      variables: its variables before.
      images: (K, H, W, C), normalised.
      labels: (K, C) distributions.
      training: see `Evidence`.
      local: see `Evidence`.
      at_once: differentiate so many images at a time, and again when the result is differentiated
        itself: the memory is that of so many. Not with `training` or `local`.

    Raises:
      ValueError: the images are no multiple of `at_once`.
    """
    before = parameters(net, variables)

    def gradient(now: Parameters, images: Array, labels: Array) -> dict[Any, Any]:
        return jax.grad(
            lambda p: loss(net, with_parameters(variables, p), images, labels, training)
        )(now)

    if local is None and at_once is not None:
        count = len(images) // at_once
        if count * at_once != len(images):
            raise ValueError(f"{len(images)} images cannot be taken {at_once} at a time evenly")
        parts = [x.reshape(count, at_once, *x.shape[1:]) for x in (images, labels)]
        share = jax.checkpoint(lambda part: gradient(before, *part))

        def add(total: Parameters, part: list[Array]) -> tuple[Parameters, None]:
            return jax.tree.map(lambda t, g: t + g / count, total, share(part)), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, before), parts)[0]
    if local is None:
        return gradient(before, images, labels)
    now = before
    for batch in local.batches:
        chosen = jnp.asarray(batch)
        # One step's activations at a time are kept for the gradient through all of them.
        step = jax.checkpoint(gradient)(now, images[chosen], labels[chosen])
        now = jax.tree.map(lambda p, g: p - local.lr * g, now, step)
    return jax.tree.map(jnp.subtract, now, before)


Simulator = Callable[[Array | np.ndarray, Sequence[int]], tuple[Evidence, Secret]]
"""(normalised images (K, H, W, C), their K classes) -> what it sends, and the secret behind it."""


def simulator(
    net: Net,
    *,
    training: bool = False,
    statistics: Statistics = "none",
    local: Local | None = None,
) -> Simulator:
    """Make a client that is compiled once for every shape of images.

    Args:
      net: the network.
      training: see `Evidence`.
      statistics: see `Evidence`. "update" statistics are what a client's new running statistics
        (momentum 0.1) betray, so here the same as "exact".
      local: see `Evidence`.

    Raises:
      ValueError: unknown statistics; when the client is called, labels that do not fit.
    """
    checks.one_of("statistics", statistics, get_args(Statistics))
    send = jax.jit(lambda v, x, y: observed(net, v, x, y, training=training, local=local))
    see = jax.jit(net.mode(training))

    def client(images: Array | np.ndarray, labels: Sequence[int]) -> tuple[Evidence, Secret]:
        images, chosen = jnp.asarray(images), np.asarray(labels)
        if chosen.shape != (len(images),) or chosen.min() < 0 or chosen.max() >= net.classes:
            raise ValueError(f"{len(images)} images need as many labels in 0 to {net.classes - 1}")
        one_hot = jax.nn.one_hot(chosen, net.classes)
        values = jax.device_get(send(net.variables, images, one_hot))
        moments = None
        if statistics in _WITH_MOMENTS:
            moments = jax.device_get(see(net.variables, images).moments)
        evidence = Evidence(values, len(images), training, statistics, moments, local)
        return evidence, Secret(np.asarray(images), chosen)

    return client


def simulate(
    net: Net,
    images: Array | np.ndarray,
    labels: Sequence[int],
    *,
    training: bool = False,
    statistics: Statistics = "none",
    local: Local | None = None,
) -> tuple[Evidence, Secret]:
    """Make evidence of one batch, and the secret behind it; for several, see `simulator`.

    Args:
      net: the network.
      images: (K, H, W, C), normalised.
      labels: K classes.
      training, statistics, local: see `simulator`.
    """
    client = simulator(net, training=training, statistics=statistics, local=local)
    return client(images, labels)


def moments_of_update(
    before: Sequence[Moments],
    after: Sequence[Moments],
    counts: Sequence[int],
    momentum: float = 0.1,
) -> tuple[Moments, ...]:
    """Solve running statistics for the batch's moments: (after - (1 - m) before) / m.

    Args:
      before, after: running statistics of every BatchNorm layer in forward order.
      counts: n, values that a channel of each layer saw (images times pixels). torch's running
        variance takes in unbiased variances, n / (n - 1) times the biased ones returned here.
      momentum: m, in torch's sense.
    """

    def solved(new: Array, old: Array) -> Array:
        return (new - (1 - momentum) * old) / momentum

    return tuple(
        Moments(solved(new.mean, old.mean), jnp.maximum(solved(new.var, old.var), 0) * (n - 1) / n)
        for new, old, n in zip(after, before, counts, strict=True)
    )


_VALUES, _MEAN, _VAR = "values.", "moments.{}.mean", "moments.{}.var"


def _beside(path: Path, ending: str) -> Path:
    """Return one of the two files of some evidence, whose name may have dots of its own."""
    name = path.name.removesuffix(".safetensors").removesuffix(".json")
    return path.with_name(name + ending)


def save(path: str | Path, evidence: Evidence) -> None:
    """Write FILE.safetensors (torch's names and layouts) and FILE.json beside it."""
    path = Path(path)
    state = {
        _VALUES + name: value
        for name, value in weights_convert.from_flax(plain(evidence.values)).items()
    }
    for i, moments in enumerate(evidence.moments or ()):
        state[_MEAN.format(i)] = np.asarray(moments.mean)
        state[_VAR.format(i)] = np.asarray(moments.var)
    weights_convert.write(_beside(path, ".safetensors"), state)
    circumstances = dataclasses.asdict(evidence.circumstances)
    write_atomic(_beside(path, ".json"), json.dumps(circumstances, indent=2) + "\n")


def load(path: str | Path, net: Net) -> Evidence:
    """Read what `save` wrote, or what was captured in PyTorch under the same names.

    Raises:
      ValueError: the files or what is in them do not fit the network; every layer is named.
    """
    path = Path(path)
    state = weights_convert.read(_beside(path, ".safetensors"))
    try:
        found = json.loads(_beside(path, ".json").read_text(encoding="utf-8"))
        local = found.pop("local", None)
        if local is not None:
            local = Local(float(local["lr"]), tuple(tuple(map(int, b)) for b in local["batches"]))
        count = sum(name.startswith("moments.") for name in state) // 2
        moments = tuple(
            Moments(*(jnp.asarray(state.pop(name.format(i))) for name in (_MEAN, _VAR)))
            for i in range(count)
        )
        named = {name.removeprefix(_VALUES): value for name, value in state.items()}
        wanted = parameters(net)
        if wanted.keys() == {"params"} and not any(n.startswith("params.") for n in named):
            named = {f"params.{name}": value for name, value in named.items()}  # Linen's, alone
        values = weights_convert.to_flax(named, wanted)
        # A network without BatchNorm layers has no moments to write, even where they are known.
        nothing = () if not net.statistics and found.get("statistics") in _WITH_MOMENTS else None
        evidence = Evidence(values, local=local, moments=moments or nothing, **found)
    except (OSError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds no evidence for {net.name}: {error}") from None
    evidence.check(net)
    return evidence
