"""Say what a network sees in pictures: its likeliest classes, with their probabilities.

    jinv classify cat.jpg dog.png --model mobilenet_v2
    jinv classify photographs/ --model resnet50 --weights resnet50-11ad3fa6.pth --out out/seen

It tells whether a network and its weights were read as they should be. Pictures are files, or
folders of them; "package:skimage/data/chelsea.png" is one inside an installed package. They are
resized and cropped as the network's weights were evaluated, see `Preprocessing`; the first line
says how. Probabilities are the softmax of the logits.

With --out, the folder holds report.html (the pictures as the network saw them, and what it says)
and, last of all, summary.json. Keys may also come from a config (`--config FILE`).
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from PIL import Image

from jinv import checks, data, image, parallel
from jinv.checks import Count, File
from jinv.models import registry
from jinv.models.network import WORDS, Network
from jinv.reports import page
from jinv.runs import command, compilation, hardware
from jinv.runs import config as configs
from jinv.runs.progress import Progress, Stretch
from jinv.runs.run_folder import FolderError, RunFolder
from jinv.runs.signals import Interrupted, Signals
from jinv.scores import judging

_SHOWN = 200
"""Pictures on the page: it is one file."""
_THUMBNAIL = 256
"""Longer side of a picture on the page, in pixels, at most."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config file holds.

    Attributes:
      pictures: files, and folders of pictures.
      model: name of the network, or `package.module:function` for one of your own.
      weights: a .pth or .safetensors file, "package" for weights inside an installed package, a
        folder that `jinv pretrain` wrote, or "random".
      classes: number of classes, if not the usual one.
      class_names: a text file with one name a line, or a known data set; None for the network's.
      top: classes that are told of each picture.
      batch: pictures at once.
    """

    pictures: Annotated[tuple[Annotated[str, File()], ...], tyro.conf.Positional]
    model: registry.Name
    weights: Annotated[str, File(WORDS)] = "package"
    classes: Count | None = None
    class_names: data.ClassNames | None = None
    top: Count = 5
    batch: Count = 32

    def __post_init__(self) -> None:
        checks.fields(self)
        if not self.pictures:
            raise ValueError("pictures: name at least one file or folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What summary.json holds; a step is a batch.

    Attributes:
      model: name of the network.
      weights: as in the config.
      published: which of torchvision's weights these are, such as "IMAGENET1K_V2"; null for others.
      preprocessing: size, mean, std, pixel_range, resize, interpolation: what makes an image of a
        picture.
      pictures: of each: file, and top: its likeliest classes, each with class (from 0), name and
        probability.
    """

    model: str
    weights: str
    published: str | None
    preprocessing: dict[str, Any]
    pictures: list[dict[str, Any]]


class Classification(command.Loaded):
    """A config with its network read and its pictures found.

    Attributes:
      config: the config.
      net: the network.
      names: of its classes.
      files: of the pictures.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.net = Network(config.model, config.weights, config.classes).load()
        self.names = data.class_names(self.net.classes, config.class_names, self.net.class_names)
        self.files = data.picture_files(config.pictures)
        self._shown(np.zeros((1, 1, 1, 3), np.uint8))  # refuses networks of other channels

    def _shown(self, pictures: np.ndarray) -> np.ndarray:
        return image.for_channels(pictures, self.net.preprocessing.channels, self.net.name)

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Classify the pictures and write the results; return the summary.

        Raises:
          Interrupted: SIGTERM or Ctrl-C came.
        """
        thumbnails: list[np.ndarray] = []
        found = self._classify(folder, thumbnails)
        summary: dict[str, Any] = {}
        parallel.on_main(
            lambda: summary.update(self._write(folder, found, thumbnails)), FolderError
        )
        return summary

    def say(self) -> str:
        """Classify the pictures and return what there is to say; nothing is written."""
        return _say(self._told() | {"pictures": self._classify(None, [])})

    def _classify(self, folder: RunFolder | None, thumbnails: list[np.ndarray]) -> list[Any]:
        """Return what the summary says of every picture; the first ones go to the thumbnails."""
        judge = judging.make_judge(self.net)
        size = min(self.config.batch, len(self.files))
        count = -(-len(self.files) // size)
        found: list[dict[str, Any]] = []
        with Signals() as stopping, Progress([Stretch("classifying", count)]) as bar:
            for i in range(count):
                files = self.files[i * size : (i + 1) * size]
                pictures = data.image_files(files, self.net.preprocessing)
                thumbnails += map(_thumbnail, pictures[: _SHOWN - len(thumbnails)])
                # All batches share a program.
                filled = np.pad(pictures, ((0, size - len(files)), *((0, 0),) * 3))
                compiled, began = compilation.seconds(), time.perf_counter()
                likely = judge(self._shown(filled).astype(np.float32) / 255).probabilities
                if folder is not None:
                    compiled = compilation.seconds() - compiled
                    folder.clock.compiling += compiled
                    folder.clock.stepping += time.perf_counter() - began - compiled
                    folder.clock.steps += 1
                found += map(self._one, files, likely)
                bar.update(0, i, {"picture": np.array([len(found)])})
                if stopping() and i + 1 < count:
                    if folder is not None:
                        raise folder.stopped(stopping.number, i + 1, count)
                    raise Interrupted(f"stopped after {len(found)} pictures", stopping.number)
        return found

    def _one(self, file: Path, likely: np.ndarray) -> dict[str, Any]:
        order = np.argsort(-likely, kind="stable")[: self.config.top]
        top = [
            {"class": int(c), "name": self.names[c], "probability": float(likely[c])} for c in order
        ]
        return {"file": str(file), "top": top}

    def _told(self) -> dict[str, Any]:
        """Return what the summary says of the network."""
        return {
            "model": self.net.name,
            "weights": self.config.weights,
            "published": self.net.weights,
            "preprocessing": configs.plain(self.net.preprocessing),
        }

    def _write(
        self, folder: RunFolder, found: list[Any], thumbnails: list[np.ndarray]
    ) -> dict[str, Any]:
        summary = Summary(
            **command.shared(folder, f"1 x {jax.devices()[0].device_kind}"),
            **self._told(),
            pictures=found,
        )
        told = vars(summary)
        shown = [_picture(*pair) for pair in zip(found, thumbnails, strict=False)]
        left_out = len(found) - len(shown)
        report = page.Page(
            f"What {summary.model} sees",
            [
                page.Section(
                    "Pictures",
                    page.Pictures(shown),
                    f"{left_out} more are in summary.json." if left_out else "",
                )
            ],
            _how(told),
        )
        ending = page.ending(told, hardware.describe(), configs.to_yaml(self.config))
        report.write(folder.path / "report.html", ending)
        return command.finish(folder, summary)


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    small = Image.fromarray(pixels)
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(small)


def _picture(one: dict[str, Any], pixels: np.ndarray) -> page.Picture:
    verdicts = tuple(
        page.Verdict(f"{rank}.", told["name"], told["class"], told["probability"])
        for rank, told in enumerate(one["top"], 1)
    )
    return page.Picture(pixels, Path(one["file"]).name, verdicts=verdicts)


def _how(summary: dict[str, Any]) -> str:
    """Say what the network is, and how it is shown pictures."""
    space = image.Preprocessing(**summary["preprocessing"])
    weights = summary["weights"]
    if summary["published"]:
        weights += f", torchvision's {summary['published']}"
    resized = "" if space.resize is None else f" out of {space.resize}"
    return (
        f"{summary['model']} ({weights}), images of {space.height} x {space.width} px{resized}, "
        f"{space.interpolation}"
    )


def _say(summary: dict[str, Any]) -> str:
    """Say what is seen in every picture."""
    lines = [_how(summary)]
    for one in summary["pictures"]:
        # A stranger's file name must not command the terminal.
        lines += ["", "".join(c if c.isprintable() else "?" for c in one["file"])]
        lines += [
            f"{100 * told['probability']:6.1f} %  {told['class']:>4}  {told['name']}"
            for told in one["top"]
        ]
    return "\n".join(lines)


COMMAND = command.Command(
    name="classify",
    about=str(__doc__),
    config=Config,
    load=Classification,
    summary=Summary,
    files=("report.html",),
    say=_say,
    standalone=True,
    without_folder=Classification.say,
    less="--batch with fewer pictures",
)
