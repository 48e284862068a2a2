"""How a shadow model is trained, and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import optax
from jax import Array

from jinv import checks
from jinv.shadow import heads
from jinv.shadow.heads import Head, Parameters

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

    noise_multiplier: float | None
    l2_norm_clip: float
    sampling: float | None = None
    target_epsilon: float | None = None

    def __post_init__(self) -> None:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("set noise_multiplier or target_epsilon: exactly one of the two")
        if self.noise_multiplier is not None and not self.noise_multiplier >= 0:
            raise ValueError(f"noise_multiplier must be at least 0, not {self.noise_multiplier}")
        if self.target_epsilon is not None and not self.target_epsilon > 0:
            raise ValueError(f"target_epsilon must be positive, not {self.target_epsilon}")
        if not self.l2_norm_clip > 0:
            raise ValueError(f"l2_norm_clip must be positive, not {self.l2_norm_clip}")
        if self.sampling is not None and not 0 < self.sampling <= 1:
            raise ValueError(f"sampling is a probability above 0, not {self.sampling}")

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
    classes: int = 10
    hidden: int = 8
    pos_weight: float = 1.0
    epochs: int = 32
    batch: int | None = None
    optimizer: Optimizer = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 1e-5
    init_std: float = 0.002
    privacy: Privacy | None = None
    path: Path = "auto"

    def __post_init__(self) -> None:
        for name in ("classes", "hidden", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch must be at least 1, not {self.batch}")
        if self.lr <= 0 or self.pos_weight <= 0:
            raise ValueError("lr and pos_weight must be positive")
        if not 0 <= self.momentum < 1 or min(self.weight_decay, self.init_std) < 0:
            raise ValueError("momentum must be in [0, 1), weight_decay and init_std at least 0")
        checks.words(self)
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
    decay = optax.add_decayed_weights(config.weight_decay)
    if config.optimizer == "adam":
        return optax.chain(decay, optax.adam(config.lr))
    return optax.chain(decay, optax.sgd(config.lr, config.momentum or None))
