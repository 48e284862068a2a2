"""The weighted terms of an objective: label losses, BatchNorm prior, image terms, a user's own."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jinv import checks
from jinv.checks import NotNegative
from jinv.net import Moments, Net, Outputs, check_net
from jinv.objective import priors

LabelLoss = Literal["cross_entropy", "target_logit"]

ImageTerm = Callable[[Array], Array]
"""Images (B, H, W, C) in the attack's space -> scalar, differentiable."""

IMAGE_TERMS: dict[str, ImageTerm] = {
    "tv_l2": priors.total_variation_l2,
    "tv_l1": priors.total_variation_l1,
    "l2": priors.l2,
}
"""The image priors that both attacks have weights for in their configs."""

ExtraTerms = Mapping[str, tuple[float, ImageTerm]]
"""A user's own image terms: name -> (weight, function).

A function that needs a network closes over it: `lambda images: distance(net(images).features)`.
"""


@dataclasses.dataclass(frozen=True)
class Weights:
    """How much one network's terms count.

    Attributes:
      label: weight of the label loss.
      batch_norm: weight of the BatchNorm prior.
      first_bn_multiplier: further weight of the first BatchNorm layer.
      bn_weighting: see `priors.batch_norm`.
    """

    label: NotNegative = 1.0
    batch_norm: NotNegative = 0.01
    first_bn_multiplier: NotNegative = 10.0
    bn_weighting: priors.LayerWeighting = "published"

    def __post_init__(self) -> None:
        checks.fields(self)
        if not self.batch_norm:
            checks.unused(self, "batch_norm is 0", "first_bn_multiplier", "bn_weighting")


@dataclasses.dataclass(frozen=True)
class Member:
    """A network in the objective.

    Attributes:
      net: the network.
      weights: how much its terms count.
      class_moments: of every BatchNorm layer's input the moments (classes, channels) over images of
        a class, see `jinv.distill.class_moments`. A batch is then of one class, and is compared to
        these instead of the running statistics (LPLD, arXiv 2410.15919).

    Raises:
      ValueError: the net or the weights are something else.
    """

    net: Net
    weights: Weights = Weights()
    class_moments: tuple[Moments, ...] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_net("a Member's net", self.net)
        check_kind("a Member's weights", self.weights, Weights)
        if self.class_moments is not None:
            wanted = [(self.net.classes, *m.mean.shape) for m in self.net.running_moments()]
            found = [m.mean.shape for m in self.class_moments]
            if found != wanted:
                raise ValueError(
                    f"class_moments of {self.net.name} need the shapes {wanted}, not {found}"
                )


def check_kind(what: str, value: object, kind: type, remedy: str = "") -> None:
    """Refuse an argument that is not of this class.

    Args:
      what: it is.
      value: the argument.
      kind: the class.
      remedy: what to give instead; by default that the class makes one.

    Raises:
      ValueError: it names the class, the value and the remedy.
    """
    if not isinstance(value, kind):
        remedy = remedy or f"make one with {kind.__name__}(...)"
        raise ValueError(
            f"{what} must be of {kind.__module__}.{kind.__name__}, not "
            f"{checks.shown(value)}: {remedy}"
        )


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-mean_k sum_c y_kc log softmax(z_k)_c of logits z and label distributions y, both (K, C)."""
    return -(labels * jax.nn.log_softmax(logits)).sum(-1).mean()


def weigh(values: Mapping[str, Array], weights: Mapping[str, float]) -> Array:
    """sum_k weights[k] values[k]; every value needs its weight."""
    return sum((weights[name] * value for name, value in values.items()), jnp.zeros(()))


def label_loss(
    logits: Array, targets: Array, kind: LabelLoss = "cross_entropy", temperature: float = 1.0
) -> Array:
    """Average H(softmax(logits / T), y), or -logits[y], over the batch.

    Args:
      logits: (B, classes).
      targets: (B,) class indices.
      kind: "cross_entropy" or "target_logit".
      temperature: T, of the cross-entropy only.

    Raises:
      ValueError: no label loss has this name.
    """
    if kind == "cross_entropy":
        log_probability = jax.nn.log_softmax(logits / temperature)
        return -jnp.take_along_axis(log_probability, targets[:, None], axis=1).mean()
    if kind == "target_logit":
        return -jnp.take_along_axis(logits, targets[:, None], axis=1).mean()
    raise ValueError(f"no label loss is called {kind!r}")


def term_weights(member: Member) -> dict[str, float]:
    """Find the weights of the terms that one network adds; a term of weight 0 is none."""
    weights = {"label": member.weights.label}
    if member.net.statistics:
        weights["batch_norm"] = member.weights.batch_norm
    return {name: weight for name, weight in weights.items() if weight}


def tell_without_statistics(net: Net, weight: float) -> None:
    """Warn if a BatchNorm prior of some weight is asked for, but the network has no such layers."""
    if not net.statistics:
        warnings.warn(
            f"{net.name} has no BatchNorm layers with running statistics: the batch_norm term "
            f"(weight {weight:g}) is left out, the others go on; a weight of 0 says the same",
            stacklevel=3,
        )


def network_terms(
    member: Member,
    outputs: Outputs,
    variables: Mapping,
    targets: Array,
    kind: LabelLoss,
    temperature: float,
    class_moments: Sequence[Moments] | None = None,
) -> dict[str, Array]:
    """Compute the raw values of the terms that one network adds.

    Args:
      member: the network with its weights.
      outputs: what it makes of the images.
      variables: the network's, whose running statistics count.
      targets: (B,) class indices.
      kind: of the label loss.
      temperature: of the cross-entropy.
      class_moments: of the targets' one class, see `Member`.
    """
    terms, wanted = {}, term_weights(member)
    if "label" in wanted:
        terms["label"] = label_loss(outputs.logits, targets, kind, temperature)
    if "batch_norm" in wanted:
        stored = member.net.running_moments(variables)
        if class_moments is not None:
            stored = jax.tree.map(lambda table: table[targets[0]], tuple(class_moments))
        terms["batch_norm"] = priors.batch_norm(
            outputs.moments,
            stored,
            first_multiplier=member.weights.first_bn_multiplier,
            weighting=member.weights.bn_weighting,
        )
    return terms


def image_terms(
    weights: Mapping[str, float],
    extra: ExtraTerms,
    shapes: Sequence[jax.ShapeDtypeStruct],
    taken: Container[str],
) -> dict[str, tuple[float, ImageTerm]]:
    """Join `IMAGE_TERMS` and a user's own, as name -> (weight, function); weight 0 is left out.

    Args:
      weights: of every one of `IMAGE_TERMS`.
      extra: the user's.
      shapes: of images (B, H, W, C) that the functions will see; an extra one is tried on each.
      taken: names of the objective's other terms.

    Raises:
      ValueError: extra terms of another form; one whose name is taken, whose weight is not finite,
        or whose function fails or does not return one floating-point number.
    """
    if not isinstance(extra, Mapping):
        raise ValueError(f"{_EXTRA}, not {checks.shown(extra)}")
    for name, pair in extra.items():
        if not isinstance(name, str) or not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"{_EXTRA}, not {checks.shown({name: pair})}")
        weight, term = pair
        if not callable(term) or not checks.fits(float, weight):
            raise ValueError(f"{_EXTRA}, not {checks.shown({name: pair})}")
        if name in IMAGE_TERMS or name in taken or name.partition("[")[0] in taken or not name:
            raise ValueError(f"an extra term cannot be called {name!r}: the name is taken")
        if not math.isfinite(weight):
            raise ValueError(f"the weight of the extra term {name} must be finite, not {weight}")
        for shape in shapes:
            _check_scalar(name, term, shape)
    found = {name: (weights[name], term) for name, term in IMAGE_TERMS.items()}
    return {name: pair for name, pair in {**found, **extra}.items() if pair[0]}


_EXTRA = "extra_terms are a dict of name -> (weight, function of images)"


def _check_scalar(name: str, term: ImageTerm, shape: jax.ShapeDtypeStruct) -> None:
    try:
        found = jax.eval_shape(term, shape)
    except Exception as error:
        raise ValueError(
            f"the extra term {name} cannot be computed of images {shape.shape}: {error}"
        ) from error
    scalar = getattr(found, "shape", None) == () and jnp.issubdtype(found.dtype, jnp.floating)
    if not scalar:
        raise ValueError(f"the extra term {name} must return one real number, not {found}")
