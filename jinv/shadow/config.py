"""How a shadow model is trained, and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import optax
from jax import Array

from jinv import checks
from jinv.checks import Count, NotNegative, Positive, PositiveShare, Range, ShareBelowOne
from jinv.shadow import heads
from jinv.shadow.heads import Head, Parameters
from jinv.shadow.sampling import Sets

Path = Literal["auto", "ordinary", "row_space"]
Optimizer = Literal["sgd", "adam"]


@dataclasses.dataclass(frozen=True)
class Privacy:
    """DP-SGD (arXiv 1607.00133): every example's gradient clipped, then Gaussian noise.

    Attributes:
      noise_multiplier: sigma: the sum of clipped gradients gets noise of standard deviation
        sigma * l2_norm_clip in every coordinate. None: what `target_epsilon` takes.
      l2_norm_clip: largest norm of an example's gradient over all parameters.
      sampling: q, probability of an example to take part in a step; None for 1 - 1/N, the paper's.
      target_epsilon: instead of noise_multiplier; `jinv.shadow.privacy.resolved` finds the noise.
    """

    noise_multiplier: Annotated[float, Range(0, finite=False)] | None
    l2_norm_clip: Positive
    sampling: PositiveShare | None = None
    target_epsilon: Annotated[float, Range(0, above=True, finite=False)] | None = None

    def __post_init__(self) -> None:
        checks.fields(self)
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("set noise_multiplier or target_epsilon: exactly one of the two")

    @property
    def sigma(self) -> float:
        """noise_multiplier, which has to be known.

        Raises:
          ValueError: it is not.
        """
        if self.noise_multiplier is None:
            raise ValueError(
                f"the noise for epsilon {self.target_epsilon:g} is not known yet: take "
                "`jinv.shadow.privacy.resolved(config, examples)`"
            )
        return self.noise_multiplier

    @property
    def deviation(self) -> float:
        """sigma * l2_norm_clip: of the noise in every coordinate of the sum."""
        return self.sigma * self.l2_norm_clip

    def probability(self, examples: int) -> float:
        """q for a set of so many examples."""
        return 1 - 1 / examples if self.sampling is None else self.sampling

    def expected(self, examples: int) -> float:
        """Return how many of so many examples take part in a step on average."""
        return self.probability(examples) * examples


@checks.todays_keywords
@dataclasses.dataclass(frozen=True)
class Config:
    """How a shadow model is trained. Defaults: MNIST, N = 10.

    Attributes:
      head: "linear", D -> classes; or "binary", D -> hidden -> 1 with a ReLU, labels 0 and 1.
      classes: of "linear".
      hidden: units of "binary".
      pos_weight: of "binary": weight of label 1 in the loss.
      epochs: passes over the training set; with `privacy` steps.
      batch: examples a step, the last step of an epoch taking what is left; None for all.
      optimizer: "sgd", torch.optim.SGD; "adam", torch.optim.Adam.
      lr: learning rate.
      momentum: of "sgd".
      weight_decay: of all parameters, added to the gradient.
      init_std: standard deviation of initial weights; biases start at 0.
      privacy: None for ordinary gradients.
      path: "row_space", "ordinary", or "auto" for the first where it is the same training.
    """

    head: heads.Kind = "linear"
    classes: Count = 10
    hidden: Count = 8
    pos_weight: Positive = 1.0
    epochs: Count = 32
    batch: Count | None = None
    optimizer: Optimizer = "sgd"
    lr: Positive = 0.01
    momentum: ShareBelowOne = 0.0
    weight_decay: NotNegative = 1e-5
    init_std: NotNegative = 0.002
    privacy: Privacy | None = None
    path: Path = "auto"

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.optimizer == "adam":
            checks.unused(self, "optimizer is 'adam', which has its own", "momentum")
        others = ("hidden", "pos_weight") if self.head == "linear" else ("classes",)
        checks.unused(self, f"head is {self.head!r}", *others)
        if self.privacy is not None and self.batch is not None:
            raise ValueError("with privacy examples are sampled one by one: set no batch")

    def steps(self, examples: int) -> int:
        """Return the number of steps of a whole training on so many examples."""
        return self.epochs * -(-examples // min(self.batch or examples, examples))


class Shadow(NamedTuple):
    """A trained head.

    Attributes:
      parameters: of the head, by name.
      loss: () mean over its training set, after training.
    """

    parameters: Parameters
    loss: Array


Train = Callable[[Array, Array, Array], Shadow]
"""(key, features (N, D), labels (N,)) -> a shadow model."""


def make_head(config: Config) -> Head:
    """The config's head."""
    if config.head == "linear":
        return heads.linear(config.classes, config.init_std)
    return heads.binary(config.hidden, config.init_std, config.pos_weight)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The config's optimizer; weight decay is added to the gradient, as in torch."""
    if config.optimizer == "adam":
        return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.adam(config.lr))
    return sgd(config.lr, config.momentum, config.weight_decay)


def sgd(
    lr: float | Array, momentum: float, weight_decay: float | Array
) -> optax.GradientTransformation:
    """torch.optim.SGD; what is an array may be traced."""
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, optax.sgd(lr, momentum or None))


def check_labels(config: Config, drawn: Sets) -> None:
    """Raise ValueError if heads do not know the labels that they shall learn."""
    kind = config.head
    classes = config.classes if kind == "linear" else 2
    if not 0 <= drawn.labels.min() <= drawn.labels.max() < classes:
        raise ValueError(
            f"labels are {drawn.labels.min()} to {drawn.labels.max()}, the {kind} head knows "
            f"{classes} classes" + (": give sampling.positive" if kind == "binary" else "")
        )
