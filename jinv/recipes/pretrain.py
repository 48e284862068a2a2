"""Train a network of the zoo on labelled images: a victim to attack.

    jinv pretrain --config pretrain_resnet18_fashion_mnist --out out/victims/resnet18_slim
    jinv pretrain --config ... --out ... --training.epochs 5 --seed 1
    jinv pretrain --config ... --out ... --resume

Every key of the config can be overridden on the command line (`--config F --help` lists them).
With `weights` in the config the network begins with them and gets a new last layer; with `head`
this layer is trained alone first, and `training.learns: all_but_batch_norm` leaves BatchNorm as it
was (the recipe pretrain_efficientnet_b0_cifar100).

A checkpoint is saved every minute, and on Ctrl-C or SIGTERM; --resume goes on to the very same
weights. A finished run is replaced only with --overwrite.

The output folder holds weights.safetensors (PyTorch's names and layouts), classes.txt (a name a
line), curves.svg, metrics.csv (loss and accuracy of every batch), scores.csv (test accuracy after
every epoch) and, last of all, summary.json. `jinv.models.load_trained(FOLDER)` makes a `Net` of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax import Array

import weights_convert
from jinv import checks, data, files, image, models, parallel, training
from jinv.checks import Count, File, Seed
from jinv.image import Preprocessing
from jinv.models import registry, subnetwork
from jinv.net import Net, with_parameters
from jinv.runs import command, hardware, training_run
from jinv.runs import config as configs
from jinv.runs.run_folder import FolderError, RunFolder


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config file holds.

    Attributes:
      model: a network of the zoo; gray images reach it as equal channels.
      weights: what it begins with: a .pth or .safetensors file, "package" for weights inside an
        installed package, or a folder that `jinv pretrain` wrote. Its last linear layer is
        replaced by one with random weights for the classes of the data; its normalisation and size
        are kept, and images are brought to that size on the device. None for random weights.
      data: what it learns and is tested on.
      size: of the images of a folder of pictures or of tfds, one side or height and width; None
        for the network's one. Others have their own.
      train_images: take so many of the training images, chosen at random; all by default.
      seed: of everything random.
      head: a training of the last layer alone, before `training`; it needs `weights`.
      training: the mathematics.
      subnetwork: train scores instead of weights, which stay as they are drawn here.
    """

    model: registry.Name
    weights: Annotated[str, File(("package",))] | None = None
    data: data.Source = dataclasses.field(default_factory=data.Source)
    size: Count | tuple[Count, Count] | None = None
    train_images: Count | None = None
    seed: Seed = 0
    head: training.Config | None = None
    training: training.Config = dataclasses.field(default_factory=training.Config)
    subnetwork: subnetwork.Subnetwork | None = None

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.head is not None and self.weights is None:
            raise ValueError("head trains the last layer of a network with weights: give some")
        if self.subnetwork is not None and self.weights is not None:
            raise ValueError(
                "a subnetwork is one of a network with random weights: leave `weights` out"
            )
        self.data.check_size(self.size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(training_run.Summary):
    """What summary.json holds.

    Attributes:
      weights: what it began with; null for random weights.
      head_epochs: done with the last layer alone; null if it began with random weights.
      data: as in the config.
      subnetwork: as in the config; null if weights were trained. weights.safetensors holds scores
        then, and the random weights that they choose from.
    """

    weights: str | None
    head_epochs: int | None
    data: dict[str, Any]
    subnetwork: dict[str, Any] | None


class Pretraining(command.Loaded):
    """A config with its data read.

    Attributes:
      train, test: the images.
      phases: what is done with them.
      net: with its first weights. If these are random, its preprocessing normalises by mean and
        standard deviation of the training images, see `measured`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.net, self.train, self.test = _read(config)
        key, _ = _keys(config)
        self.phases = _phases(config, len(self.train), key)

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Train and write the results; return the summary (of the main process).

        Raises:
          Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
        """
        variables = training_run.run(self.net, self.phases, folder, self.train, self.test)
        summary: dict[str, Any] = {}
        parallel.on_main(lambda: summary.update(self._write(folder, variables)), FolderError)
        return summary

    def _write(self, folder: RunFolder, variables: Mapping[Any, Any]) -> dict[str, Any]:
        """Write weights, names of classes, curves; the summary last."""
        config = self.config
        head = 0 if config.head is None else config.head.epochs
        summary = Summary(
            **command.shared(folder, hardware.of_mesh(self.phases[-1].mesh)),
            **training_run.write(folder, self.net, variables, self.phases, self.train, self.test),
            weights=config.weights,
            head_epochs=None if config.weights is None else head,
            data=configs.plain(config.data),
            subnetwork=configs.plain(config.subnetwork),
        )
        return command.finish(folder, summary)


def _keys(config: Config) -> tuple[Array, Array]:
    """Return the key of the training and that of the choice of images."""
    key, chosen = jax.random.split(jax.random.key(config.seed))
    return key, chosen


def _read(config: Config) -> tuple[Net, data.Dataset, data.Dataset]:
    """Return the network with its first weights, the training images and the test images."""
    usual = models.entry(config.model).preprocessing
    source = None if config.weights is None else _source(config.model, config.weights)
    space = usual if source is None else source.preprocessing
    train, test = splits(config.data, config.size or space.size)
    if config.train_images is not None:
        if not 1 <= config.train_images <= len(train):
            raise ValueError(f"train_images must be 1 to {len(train)}, not {config.train_images}")
        _, chosen_key = _keys(config)
        order = np.asarray(jax.random.permutation(chosen_key, len(train)))
        train = train.take(order[: config.train_images])
    _check_classes(train)
    _check_shapes(config.model, train, test, space.channels)
    if source is not None:
        _check_proportions(train.images, space)
    if source is None:
        seen = measured(train.images, usual.channels)
    else:  # it learns pictures as `data` brings them to a size, whatever the weights were for
        seen = dataclasses.replace(space, resize=None, interpolation="bicubic")
    try:
        net = models.load(
            config.model, None, classes=len(train.classes), preprocessing=seen, seed=config.seed
        )
    except ValueError as error:
        raise ValueError(
            f"{error}; the images are {seen.height} x {seen.width} px, and {config.model} usually "
            f"takes {usual.height} x {usual.width}"
        ) from None
    if config.subnetwork is not None:
        # Not one of the two keys that the seed's is split into, nor that of `_phases`.
        drawn_key = jax.random.fold_in(jax.random.key(config.seed), 3)
        drawn = subnetwork.draw(net, config.subnetwork, drawn_key)
        net = subnetwork.trainable(net, drawn, config.subnetwork.kept)
    return net if source is None else _with_body(net, source), train, test


def _check_classes(train: data.Dataset) -> None:
    """Refuse images that are all of one class: whatever a network says of them is right."""
    if not train.has_attributes and len(np.unique(train.labels)) < 2:
        raise ValueError(
            f"all {len(train)} training images are of the class "
            f"{train.classes[train.labels[0]]!r}: there is nothing to learn (name the folder that "
            "holds the folders of the classes)"
        )


def _check_shapes(model: str, train: data.Dataset, test: data.Dataset, wanted: int) -> None:
    (height, width, channels), tested = train.images.shape[1:], test.images.shape[1:]
    if tested != (height, width, channels):
        raise ValueError(
            "images must be of one size and kind: training images are "
            f"{height} x {width} px with {channels} channels, test images {tested[0]} x "
            f"{tested[1]} px with {tested[2]}"
        )
    image.for_channels(train.images[:1], wanted, model)


def _check_proportions(images: np.ndarray, wanted: Preprocessing) -> None:
    """ValueError if bringing the images to a network's size would distort them."""
    _, height, width, _ = images.shape
    if height * wanted.width != width * wanted.height:
        raise ValueError(
            f"images of {height} x {width} px would be distorted to the {wanted.height} x "
            f"{wanted.width} px that the weights are for: cut them to these proportions"
        )


def _phases(config: Config, images: int, key: Array) -> list[training_run.Phase]:
    """Return the config's trainings; `key` is that of the last."""
    # Not one of the two keys that the seed's is split into.
    head_key = jax.random.fold_in(jax.random.key(config.seed), 2)
    wanted = [("training", config.training, key)]
    if config.head is not None:
        alone = dataclasses.replace(config.head, learns="head")
        wanted.insert(0, ("head", alone, head_key))
    return training_run.phases(wanted, images)


def splits(source: data.Source, size: int | Sequence[int]) -> tuple[data.Dataset, data.Dataset]:
    """Images to train on and to test on; ValueError if their classes are not the same."""
    train, test = source.load("train", size), source.load("test", size)
    if test.classes != train.classes[: len(test.classes)]:
        raise ValueError(
            f"the test images' classes {', '.join(test.classes)} are not those of the "
            f"training images: {', '.join(train.classes)}"
        )
    return train, dataclasses.replace(test, classes=train.classes)


def _source(model: str, weights: str) -> Net:
    """The network that is begun with, of as many classes as it has.

    Raises:
      ValueError: there is none, or it is another.
      FileNotFoundError: the package that holds the weights is not installed.
    """
    if weights != "package" and files.path(weights).is_dir():
        net = models.load_trained(weights)
        if net.name != model:
            raise ValueError(f"{weights} holds a {net.name}, not a {model}")
        return net
    path = models.packaged_weights(model) if weights == "package" else files.path(weights)
    usual = models.load(model, None)
    layer = ".".join(map(str, usual.head or ()))
    classes = None
    with contextlib.suppress(weights_convert.WeightsError):  # loading them says it better
        state = weights_convert.match(weights_convert.read(path), usual.variables)
        weight = state.get(f"{layer}.weight", np.empty(()))
        classes = len(weight) if weight.ndim == 2 else None
    return models.load(model, path, classes=classes)


def _with_body(net: Net, source: Net) -> Net:
    """The network with the weights of another but for the last layer, where the classes differ."""
    head = training.learned(net, net.variables, "head")
    return dataclasses.replace(net, variables=with_parameters(source.variables, head))


def measured(images: np.ndarray, channels: int) -> Preprocessing:
    """Normalisation to mean 0 and deviation 1 a channel, measured on bytes (N, H, W, C).

    Rounded to four digits. Gray images (C = 1) get as many equal `channels`; colours are measured
    as `image.for_channels` shows them.

    Raises:
      ValueError: a channel is the same in all pixels.
    """
    count = images.size // images.shape[-1]
    seen = image.for_channels(images[:1], channels).shape[-1]
    sums, squares = np.zeros((2, seen), np.int64)
    for start in range(0, len(images), 1024):  # no copy of all images in wider numbers
        part = image.for_channels(images[start : start + 1024], channels).astype(np.int64)
        sums += part.sum((0, 1, 2))
        squares += np.square(part).sum((0, 1, 2))
    mean = sums / count / 255
    std = np.sqrt(np.maximum(squares / count / 255**2 - mean**2, 0))
    if std.min() < 5e-5:
        raise ValueError(
            f"the training images' std is {std.min():.1g} in a channel, all but one brightness: "
            "nothing is left when they are normalised"
        )
    repeat = channels if len(mean) == 1 else 1
    return Preprocessing(
        images.shape[1:3],
        tuple(np.round(mean, 4).tolist()) * repeat,
        tuple(np.round(std, 4).tolist()) * repeat,
    )


def _say(summary: dict[str, Any]) -> str:
    """Say how good the network is."""
    return f"test accuracy {summary['test_accuracy']:.4f}"


COMMAND = command.Command(
    name="pretrain",
    about=str(__doc__),
    config=Config,
    load=Pretraining,
    summary=Summary,
    files=training_run.FILES,
    say=_say,
    less="--training.batch with fewer images",
)
