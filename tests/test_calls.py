"""How users' networks are called: arguments of either mode, outputs, images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import Array

import tiny
from jinv import models
from jinv.attacks import deepinversion
from jinv.image import Preprocessing
from jinv.net import Net
from jinv.objective.terms import Member

SPACE = Preprocessing(size=6)
IMAGES = tiny.noise((4, 6, 6, 3))


def layers(x: Array, train: bool, drop: bool) -> Array:
    """Convolution, BatchNorm, dropout, linear; inside a compact method."""
    x = linen.BatchNorm(use_running_average=not train, name="norm")(linen.Conv(4, (3, 3))(x))
    return linen.Dense(3)(linen.Dropout(0.5, deterministic=not drop)(x).mean((1, 2)))


class Train(linen.Module):
    @linen.compact
    def __call__(self, x: Array, train: bool) -> Array:
        return layers(x, train, train)


class Training(linen.Module):
    @linen.compact
    def __call__(self, x: Array, training: bool) -> Array:
        return layers(x, training, training)


class IsTraining(linen.Module):
    """Trains unless told otherwise."""

    @linen.compact
    def __call__(self, x: Array, *, is_training: bool = True) -> Array:
        return layers(x, is_training, is_training)


class Deterministic(linen.Module):
    @linen.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        return layers(x, not deterministic, not deterministic)


class RunningAverage(linen.Module):
    @linen.compact
    def __call__(self, x: Array, use_running_average: bool = False) -> Array:
        return layers(x, not use_running_average, False)


class Inference(linen.Module):
    @linen.compact
    def __call__(self, x: Array, inference: bool = False) -> Array:
        return layers(x, not inference, not inference)


class Both(linen.Module):
    @linen.compact
    def __call__(self, x: Array, train: bool, deterministic: bool) -> Array:
        return layers(x, train, not deterministic)


class Field(linen.Module):
    train: bool = True

    @linen.compact
    def __call__(self, x: Array) -> Array:
        return layers(x, self.train, self.train)


class Merged(linen.Module):
    """Takes its switch from either, but not from both."""

    deterministic: bool | None = None

    @linen.compact
    def __call__(self, x: Array, deterministic: bool | None = None) -> Array:
        still = linen.merge_param("deterministic", self.deterministic, deterministic)
        return layers(x, not still, not still)


MODULES: list[tuple[linen.Module, dict[str, Any], dict[str, Any]]] = [
    (Train(), {"train": False}, {"train": True}),
    (Training(), {"training": False}, {"training": True}),
    (IsTraining(), {"is_training": False}, {"is_training": True}),
    (Deterministic(), {"deterministic": True}, {"deterministic": False}),
    (RunningAverage(), {"use_running_average": True}, {"use_running_average": False}),
    (Inference(), {"inference": True}, {"inference": False}),
    (Merged(), {"deterministic": True}, {"deterministic": False}),
    (Merged(deterministic=True), {}, {}),
    (Field(), {}, {}),
    (Field(train=False), {}, {}),
    (
        Both(),
        {"train": False, "deterministic": True},
        {"train": True, "deterministic": True},
    ),
]

VARIABLES = jax.jit(Train().init, static_argnames="train")(jax.random.key(0), IMAGES, train=False)
"""Fit every one of them."""


def by_hand(training: bool) -> Any:
    """Logits by Flax's own layers; dropout is off."""
    params = VARIABLES["params"]
    x = linen.Conv(4, (3, 3)).apply({"params": params["Conv_0"]}, IMAGES)
    x = np.asarray(x, np.float64)
    if training:
        x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    else:
        x = x / np.sqrt(1 + 1e-5)
    return x.mean((1, 2)) @ params["Dense_0"]["kernel"]


@pytest.mark.parametrize("i", range(len(MODULES)))
def test_both_modes_are_found_by_themselves(i: int) -> None:
    module, inference, _ = MODULES[i]
    for net in (
        Net.from_linen(module, VARIABLES, SPACE),
        Net.from_linen(module, VARIABLES, SPACE, training=MODULES[i][2], **inference)
        if inference and "training" not in inference
        else Net.from_linen(module, VARIABLES, SPACE, training=MODULES[i][2], call=inference),
    ):
        found = net.apply(net.variables, IMAGES).logits
        np.testing.assert_allclose(found, by_hand(False), rtol=1e-3, atol=1e-4)
        found = net.mode(training=True)(net.variables, IMAGES).logits
        np.testing.assert_allclose(found, by_hand(True), rtol=1e-3, atol=1e-4)


def test_an_argument_called_training_may_be_given() -> None:
    for given in (False, {"training": True}):
        net = Net.from_linen(Training(), VARIABLES, SPACE, training=given)
        found = net.apply(net.variables, IMAGES).logits
        np.testing.assert_allclose(found, by_hand(False), rtol=1e-3, atol=1e-4)
    assert net.train_apply is not None


def test_what_is_given_is_the_same_in_both_modes() -> None:
    net = Net.from_linen(Train(), VARIABLES, SPACE, train=False)
    with pytest.raises(ValueError, match=r"Train has no training mode: leave .*train=False"):
        net.mode(training=True)
    with pytest.raises(ValueError, match="own moments in inference mode"):
        Net.from_linen(Train(), VARIABLES, SPACE, train=True)


class Scaled(linen.Module):
    @linen.compact
    def __call__(self, x: Array, temperature: float, name: str, train: bool) -> Array:
        return layers(x, train, train) / temperature


def test_unknown_arguments_are_asked_for() -> None:
    message = r"Scaled needs temperature and name.*from_linen\(..., temperature=..., name=...\)"
    with pytest.raises(ValueError, match=message):
        Net.from_linen(Scaled(), VARIABLES, SPACE)
    net = Net.from_linen(Scaled(), VARIABLES, SPACE, temperature=2.0, call={"name": "x"})
    found = net.apply(net.variables, IMAGES).logits
    np.testing.assert_allclose(2 * found, by_hand(False), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"Train cannot take .*unexpected keyword .*'trian'"):
        Net.from_linen(Train(), VARIABLES, SPACE, trian=False)


class Attentive(linen.Module):
    @linen.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = x.reshape(len(x), -1, 3)
        attend = linen.MultiHeadDotProductAttention(1, dropout_rate=0.5, deterministic=not train)
        x = linen.BatchNorm(use_running_average=not train)(attend(x, x))
        return linen.Dense(3)(x.mean(1))


class AttentiveNnx(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.attend = nnx.MultiHeadAttention(1, 3, dropout_rate=0.5, decode=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.head = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x: Array, train: bool) -> Array:
        x = self.attend(x.reshape(len(x), -1, 3), deterministic=not train)
        return self.head(self.norm(x, use_running_average=not train).mean(1))


def test_dropout_inside_attention_is_off_too() -> None:
    variables = Attentive().init(jax.random.key(0), IMAGES, train=False)
    for net in (
        Net.from_linen(Attentive(), variables, SPACE),
        Net.from_nnx(AttentiveNnx(), SPACE),
    ):
        one, two = (net.mode(training=True)(net.variables, IMAGES).logits for _ in range(2))
        np.testing.assert_array_equal(one, two)
        assert np.abs(one - net.apply(net.variables, IMAGES).logits).max() > 1e-3


class Switched(nnx.Module):
    """A switch of one's own, and whatever `call` says."""

    def __init__(self, call: str = "") -> None:
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.training = True
        self.rngs = rngs
        self.random = call == "random"

    def __call__(self, x: Array, rngs: nnx.Rngs | None) -> Array:
        x = self.norm(x, use_running_average=not self.training).mean((1, 2))
        if self.training and self.random:
            x = x * jax.random.bernoulli(self.rngs.dropout(), 0.5, (len(x), 1))
        return self.dropout(x, deterministic=not self.training, rngs=rngs)


def test_switches_that_are_attributes_of_nnx_modules_are_set() -> None:
    model = Switched()
    net = Net.from_nnx(model, SPACE)
    x = np.asarray(IMAGES, np.float64)
    expected = x.mean((1, 2)) / np.sqrt(1 + 1e-5)
    found = net.apply(net.variables, IMAGES).logits
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    found = net.mode(training=True)(net.variables, IMAGES).logits
    np.testing.assert_allclose(found, x.mean((1, 2)), rtol=1e-3, atol=1e-5)
    assert model.training  # the user's own stays as it was
    assert model.dropout.rate == 0.5
    given = Net.from_nnx(model, SPACE, rngs=nnx.Rngs(3))
    np.testing.assert_allclose(given.apply(given.variables, IMAGES).logits, expected, rtol=1e-4)


class Random(linen.Module):
    @linen.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if train:
            x = x * jax.random.bernoulli(self.make_rng("path"), 0.5, (len(x), 1, 1, 1))
        return layers(x, train, False)


def test_layers_that_draw_random_numbers_are_refused() -> None:
    net = Net.from_nnx(Switched("random"), SPACE)
    with pytest.raises(ValueError, match="Switched draws random numbers in training mode"):
        net.mode(training=True)(net.variables, IMAGES)
    net = Net.from_linen(Random(), VARIABLES, SPACE)
    with pytest.raises(ValueError, match=r"Random .*draws random numbers.*\"path\""):
        net.mode(training=True)(net.variables, IMAGES)


def test_a_switch_that_is_given_to_nnx_leaves_no_training_mode() -> None:
    net = Net.from_nnx(AttentiveNnx(), SPACE, train=False)
    with pytest.raises(ValueError, match="AttentiveNnx has no training mode: train was given"):
        net.mode(training=True)(net.variables, IMAGES)


def test_without_batch_norm_the_modes_are_one() -> None:
    class Plain(linen.Module):
        @linen.compact
        def __call__(self, x: Array) -> Array:
            return linen.Dense(3)(linen.GroupNorm(1)(x).mean((1, 2)))

    variables = Plain().init(jax.random.key(0), IMAGES)
    net = Net.from_linen(Plain(), variables, SPACE)
    found = net.mode(training=True)(net.variables, IMAGES).logits
    np.testing.assert_array_equal(found, net.apply(net.variables, IMAGES).logits)


class Average(linen.Module):
    """The user's own mean over devices."""

    @linen.compact
    def __call__(self, x: Array) -> Array:
        return linen.Dense(3)(jax.lax.pmean(x, "devices").mean((1, 2)))


def test_a_mean_over_devices_of_ones_own_is_refused() -> None:
    params = {"Dense_0": VARIABLES["params"]["Dense_0"]}
    with pytest.raises(ValueError, match=r"Average cannot take .*averages over devices"):
        Net.from_linen(Average(), {"params": params}, SPACE)


# --- outputs --------------------------------------------------------------------------------------


class Named(NamedTuple):
    logits: Any
    features: Any


@dataclasses.dataclass
class Record:
    logits: Any
    features: Any


@flax.struct.dataclass
class FlaxRecord:
    logits: Any
    features: Any


class Two(nnx.Module):
    """Two heads of 3 and 5 classes, the second called last, put together by a function."""

    def __init__(self, join: Callable[[Any, Any], Any]) -> None:
        self.main = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(3, 5, rngs=nnx.Rngs(1))
        self.join = join

    def __call__(self, x: Array) -> Any:
        x = x.mean((1, 2))
        return self.join(self.main(x), self.second(2 * x))


class TwoLinen(linen.Module):
    """The same in Linen."""

    join: Callable[[Any, Any], Any]

    @linen.compact
    def __call__(self, x: Array) -> Any:
        x = x.mean((1, 2))
        return self.join(linen.Dense(3, name="main")(x), linen.Dense(5, name="second")(2 * x))


OUTPUTS: list[tuple[Callable[[Any, Any], Any], Any, int]] = [
    (lambda a, b: (a, b), 0, 3),
    (lambda a, b: [a, b], -1, 5),
    (lambda a, b: {"out": a, "aux": b}, "aux", 5),
    (Named, "logits", 3),
    (Named, 1, 5),
    (Record, "features", 5),
    (FlaxRecord, "logits", 3),
    (lambda a, b: {"heads": (a, [b])}, ("heads", 1, 0), 5),
]


@pytest.mark.parametrize("i", range(len(OUTPUTS)))
def test_one_of_several_outputs_is_chosen(i: int) -> None:
    """With it the head and the features: of the layer whose output it is, not of the last one."""
    join, output, classes = OUTPUTS[i]
    model = Two(join)
    variables = {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))}
    name = "main" if classes == 3 else "second"
    inputs = np.asarray(IMAGES).mean((1, 2)) * (1 if classes == 3 else 2)
    expected = getattr(model, name)(inputs)
    for net in (
        Net.from_nnx(model, SPACE, output=output),
        Net.from_linen(TwoLinen(join), variables, SPACE, output=output),
    ):
        found = net.apply(net.variables, IMAGES)
        assert net.classes == classes
        assert net.head is not None
        assert net.head[-1] == name
        np.testing.assert_allclose(found.logits, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.features, inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("join", "message"),
    [
        (lambda a, b: (a, b), r"a tuple of 0: \(1, 3\), 1: \(1, 5\).*from_nnx\(..., output=0\)"),
        (
            lambda a, b: {"x": a[0], "y": {"z": b}},
            r"a dict of 'x': \(3,\), \('y', 'z'\): .*output=\('y', 'z'\)\)",
        ),
        (Record, r"a Record of 'logits': \(1, 3\).*output='logits'\)"),
        (lambda a, b: a[:, 0], r"returned \(1,\), one number z an image: .*jnp.stack\("),
        (lambda a, b: a[:, :1], r"returned \(1, 1\), one number z .*jnp.concat.*output=\(\)"),
        (lambda a, b: a[:, None, None], r"\(1, 1, 1, 3\): .*mean over height and width"),
        (lambda a, b: None, "returned NoneType"),
    ],
)
def test_other_outputs_are_told(join: Callable[[Any, Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Two must return logits .*{message}"):
        Net.from_nnx(Two(join), SPACE)


def test_an_output_that_is_not_there_is_refused() -> None:
    for output in (2, "logits", (0, 1)):
        with pytest.raises(ValueError, match=r"Two returns no output=.*a tuple of 0:"):
            Net.from_nnx(Two(lambda a, b: (a, b)), SPACE, output=output)


def test_the_advice_on_one_number_an_image_is_true() -> None:
    """Its softmax is the sigmoid; and a single attribute may be asked for."""
    z = np.asarray(IMAGES).mean((1, 2)) @ Two(Named).main.kernel[:, :1]

    def two(a: Array, b: Array) -> Array:
        z = a[:, :1]
        return jnp.concatenate([jnp.zeros_like(z), z], -1)

    net = Net.from_nnx(Two(two), SPACE)
    probabilities = jax.nn.softmax(net.apply(net.variables, IMAGES).logits)[:, 1:]
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-z)), rtol=1e-5)
    assert Net.from_nnx(Two(lambda a, b: a[:, :1]), SPACE, output=()).classes == 1
    assert models.load("resnet20_cifar", None, classes=1).classes == 1


def test_a_batch_that_is_summed_is_refused_when_it_is_seen() -> None:
    net = Net.from_nnx(Two(lambda a, b: a.sum(0, keepdims=True)), SPACE)
    with pytest.raises(ValueError, match=r"for images \(4, 6, 6, 3\); it returned \(1, 3\)"):
        net(IMAGES)


# --- images ---------------------------------------------------------------------------------------


class Flat(nnx.Module):
    def __init__(self, side: int) -> None:
        self.head = nnx.Linear(side * side * 3, 3, rngs=nnx.Rngs(0))

    def __call__(self, x: Array) -> Array:
        return self.head(x.reshape(len(x), -1))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[0], r"images \(batch, height, width, 3\), not \(6, 6, 3\): .*image\[None\]"),
        (IMAGES[..., :1], r"not \(4, 6, 6, 1\)"),
        (IMAGES.transpose(0, 3, 1, 2), r"not \(4, 3, 6, 6\)"),
        (np.zeros((2, 6, 6, 3), np.uint8), "not uint8: of bytes, jinv.image.from_bytes"),
        (np.zeros((2, 6, 6, 3), int), "normalised images, floating-point numbers, not int"),
        ([[1.0]], r"not \(1, 1\)"),
        (np.zeros((2, 7, 5, 3), np.float32), "Flat cannot take 7 x 5 px images: .*contracting"),
    ],
)
def test_other_images_are_refused_in_words(images: Any, message: str) -> None:
    net = Net.from_nnx(Flat(6), SPACE)
    with pytest.raises(ValueError, match=message):
        net(images)


def test_lists_and_numpy_images_are_taken() -> None:
    net = Net.from_nnx(Flat(6), SPACE)
    expected = net(IMAGES).logits
    for images in (np.asarray(IMAGES), np.asarray(IMAGES, np.float64), np.asarray(IMAGES).tolist()):
        np.testing.assert_allclose(net(images).logits, expected, rtol=1e-5)


def test_a_network_that_its_preprocessing_does_not_fit_is_refused() -> None:
    for space in (Preprocessing(size=8), SPACE.gray()):
        shape = (space.size, space.size, space.channels)
        message = rf"Flat cannot take {space.size} x {space.size} px .*Preprocessing says .*"
        with pytest.raises(ValueError, match=message) as told:
            Net.from_nnx(Flat(6), space)
        assert str(shape) in str(told.value)


def test_a_network_whose_code_fails_is_named() -> None:
    class Broken(nnx.Module):
        def __call__(self, x: Array) -> Array:
            assert x.shape[1] > 100
            return self.nothing(x)

    with pytest.raises(ValueError, match="Broken cannot take 6 x 6 px images: AssertionError"):
        Net.from_nnx(Broken(), SPACE)


def test_an_attack_says_the_same_of_another_size() -> None:
    config = deepinversion.Config(phases=(deepinversion.Phase(1),))
    with pytest.raises(ValueError, match=r"^Flat cannot take 9 x 9 px images: .*contracting"):
        deepinversion.build(config, [Member(Net.from_nnx(Flat(6), SPACE))], [0], size=9)
