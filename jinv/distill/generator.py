"""A generator of training images that a teacher's statistics teach: NAYER (arXiv 2310.00258).

A code of an image's class and some noise pass a linear "noisy layer", whose weights are drawn anew
before every loop, and a small convolutional network. A loop takes a few steps on

L = a_bn R_bn + a_label H(teacher(x), y) - a_adv mean_i [teacher and student agree on x_i] KL_i

so that images look to the teacher like its training data, and the student has not learned them yet.
The generator's other weights stay from loop to loop.

The paper's codes are embeddings of the classes' names by a language model; here they are the
teacher's own: the rows of its last layer. In the paper one code with one noisy layer makes one
image of a class; here noise beside the code makes as many as a batch wants.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from jinv import checks, image, optimise, training
from jinv.checks import Count, Natural, NotNegative, Positive
from jinv.image import Preprocessing
from jinv.models.convolution import convolve
from jinv.net import Net, Variables
from jinv.objective import priors
from jinv.objective.terms import label_loss

Parameters = dict[str, Any]

_SLOPE = 0.2
_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Config:
    """What defines the mathematics. Defaults: published, for CIFAR.

    Attributes:
      batch: images a loop makes.
      steps: of a loop.
      lr: of Adam, with betas 0.5 and 0.999.
      codes: of the classes: "head", the rows of the teacher's last layer, normalised; "one_hot"; or
        "random", normal numbers.
      noise: length of the noise beside a code.
      width: channels of the noisy layer's image.
      batch_norm: weight of R_bn.
      label: weight of the cross-entropy.
      adversarial: weight of the divergence between teacher and student.
    """

    batch: Count = 400
    steps: Count = 30
    lr: Positive = 4e-3
    codes: Literal["head", "one_hot", "random"] = "head"
    noise: Natural = 64
    width: Count = 128
    batch_norm: NotNegative = 10.0
    label: NotNegative = 0.5
    adversarial: NotNegative = 1.33

    def __post_init__(self) -> None:
        checks.fields(self)


class Data(NamedTuple):
    """What a loop's steps read.

    Attributes:
      teacher, student: their variables.
      inputs: (B, code + noise).
      targets: (B,).
    """

    teacher: Variables
    student: Variables
    inputs: Array
    targets: Array


class Generator:
    """A generator for one teacher and students of one network.

    Attributes:
      config: its mathematics.
      phases: the loop, for `optimise.run`; what is optimised are the generator's parameters.
    """

    def __init__(self, config: Config, teacher: Net, student: Net, space: Preprocessing) -> None:
        """Make the loop.

        Args:
          config: the mathematics.
          teacher: whose images are sought.
          student: who learns them.
          space: size and channels of the images.

        Raises:
          ValueError: a size that cannot be halved twice; a teacher without statistics, or without
            the last layer that codes are taken from.
        """
        if space.height % 4 or space.width % 4:
            raise ValueError(
                f"the generator doubles its images twice: {space.height} x {space.width} px cannot "
                "be halved as often"
            )
        if not teacher.statistics and config.batch_norm:
            raise ValueError(
                f"{teacher.name} has no BatchNorm layers, whose statistics the generator learns "
                "from: give generator.batch_norm 0"
            )
        self.config = config
        self._teacher, self._student = teacher, student
        self._shape = (space.height // 4, space.width // 4, config.width)
        self._channels = space.channels
        self._codes = _codes(config, teacher)
        optimizer = optax.adam(config.lr, b1=0.5, b2=0.999)

        def enter(parameters: Parameters, step: Any) -> optimise.State:
            return optimise.init(parameters, optimizer, step)

        step = optimise.make_step(self._loss, optimizer, keep="last")
        self.phases = (optimise.Phase("generator", config.steps, enter, step),)
        self.generate = jax.jit(self._generate)

    def init(self, key: Array) -> Parameters:
        """Draw all parameters, as torch's layers are initialised."""
        width = self.config.width
        wide = self._codes.shape[1] + self.config.noise
        keys = jax.random.split(key, 4)
        parameters: Parameters = {
            "code": _norm(wide),
            "noisy": self._noisy(keys[0], wide),
            "norm0": _norm(width),
            "conv1": _kernel(keys[1], width, 128),
            "norm1": _norm(128),
            "conv2": _kernel(keys[2], 128, 64),
            "norm2": _norm(64),
            "conv3": _kernel(keys[3], 64, self._channels),
            "norm3": _norm(self._channels),
        }
        return parameters

    def renew(self, key: Array, parameters: Parameters) -> Parameters:
        """Return the parameters with another noisy layer."""
        return parameters | {"noisy": self._noisy(key, len(parameters["code"]["scale"]))}

    def _noisy(self, key: Array, wide: int) -> Array:
        return jax.random.normal(key, (wide, int(np.prod(self._shape))))

    def draw(self, key: Array) -> tuple[Array, Array]:
        """Draw inputs and targets of a loop: each class as often, if these divide the batch."""
        count, classes = self.config.batch, len(self._codes)
        order_key, noise_key = jax.random.split(key)
        targets = jax.random.permutation(order_key, jnp.arange(count) % classes)
        noise = jax.random.normal(noise_key, (count, self.config.noise))
        return jnp.concatenate([self._codes[targets], noise], 1), targets

    def _generate(self, parameters: Parameters, inputs: Array) -> Array:
        """Return pixels (B, H, W, C) in [0, 1]."""
        x = _normalised(inputs, parameters["code"])
        x = (x @ parameters["noisy"]).reshape(len(inputs), *self._shape)
        x = _normalised(x, parameters["norm0"])
        for number in (1, 2):
            x = _convolved(x.repeat(2, 1).repeat(2, 2), parameters[f"conv{number}"])
            x = jax.nn.leaky_relu(_normalised(x, parameters[f"norm{number}"]), _SLOPE)
        x = _convolved(x, parameters["conv3"])
        return jax.nn.sigmoid(_normalised(x, parameters["norm3"]))

    def _loss(
        self, key: Array, parameters: Parameters, data: Data
    ) -> tuple[Array, dict[str, Array]]:
        config, teacher, student = self.config, self._teacher, self._student
        pixels = _mirrored(key, self._generate(parameters, data.inputs))
        seen = teacher.apply(data.teacher, training.shown(teacher, pixels))
        terms = {"label": label_loss(seen.logits, data.targets)}
        total = config.label * terms["label"]
        if config.batch_norm:
            running = teacher.running_moments(data.teacher)
            terms["batch_norm"] = priors.batch_norm(seen.moments, running)
            total = total + config.batch_norm * terms["batch_norm"]
        if config.adversarial:
            other = student.apply(data.student, training.shown(student, pixels)).logits
            terms["adversarial"] = -_agreed_divergence(seen.logits, other)
            total = total + config.adversarial * terms["adversarial"]
        return total, terms


def _codes(config: Config, teacher: Net) -> Array:
    """Return a code of every class (classes, D)."""
    if config.codes == "one_hot":
        return jnp.eye(teacher.classes)
    if config.codes == "random":
        return jax.random.normal(jax.random.key(0), (teacher.classes, 128))
    if teacher.head is None:
        raise ValueError(
            f"{teacher.name} ends in no linear layer, whose rows could be codes: give "
            "generator.codes 'one_hot' or 'random'"
        )
    head = functools.reduce(lambda tree, name: tree[name], teacher.head, teacher.variables)
    weight = head["weight"] if "weight" in head else head["kernel"]
    rows = jnp.asarray(weight, jnp.float32).T
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True) * np.sqrt(rows.shape[1])


def _agreed_divergence(teacher: Array, student: Array) -> Array:
    """mean_i [argmax t_i = argmax s_i] KL(softmax t_i || softmax s_i) of logits (B, C)."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    each = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    return jnp.where(teacher.argmax(-1) == student.argmax(-1), each, 0).mean()


def _mirrored(key: Array, pixels: Array) -> Array:
    keys = jax.random.split(key, len(pixels))
    return jax.vmap(lambda key, one: image.flip(key, one[None])[0])(keys, pixels)


def _norm(width: int) -> Parameters:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _normalised(x: Array, norm: Parameters) -> Array:
    """BatchNorm in training mode, over all axes but the last."""
    axes = tuple(range(x.ndim - 1))
    centred = x - x.mean(axes)
    return centred * lax.rsqrt(jnp.square(centred).mean(axes) + _EPS) * norm["scale"] + norm["bias"]


def _kernel(key: Array, inputs: int, outputs: int) -> Parameters:
    bound = 1 / np.sqrt(9 * inputs)
    draw = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
    weight_key, bias_key = jax.random.split(key)
    return {"kernel": draw(weight_key, (3, 3, inputs, outputs)), "bias": draw(bias_key, (outputs,))}


def _convolved(x: Array, layer: Parameters) -> Array:
    return convolve(x, layer["kernel"], padding=1) + layer["bias"]
