"""Reconstruct the images that given heads were trained on, from their weights.

    jinv reconstruct HEAD.pth --features out/features --reconstructor out/decoder --out out/mine
    jinv reconstruct HEAD.pth --features out/features --lr 0.003 0.01 0.03 --out out/mine
    jinv reconstruct HEAD.pth ... --candidates out/features/test

A head is a linear layer on a network's features: a file of torch (`torch.save(layer.state_dict())`,
also of a whole network, see `layer`) or .safetensors. `features` is a folder of
`jinv extract-features`: features of your own images by the same network, with the images. How heads
are trained is what `reconstructor` (a folder of `jinv train-reconstructor`) was trained for, and
what lr, epochs and so on say; where these are several values, those are taken that explain the
weights best. Without a reconstructor linear maps lead from recovered features to images.

A head whose weights are not those of such a training is refused, and the summary says why.
`candidates` is a folder with features.json: the run tells which of its images a head has seen.

Keys may also come from a config (`--config FILE`). The output folder holds pictures/NNN.png
(reconstructions; below them the likeliest candidates), recovered.npz (NNN.features, NNN.error, a
class a row), report.html and, last of all, summary.json.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

import weights_convert
from jinv import checks, parallel
from jinv.checks import Count, File, NotNegative, Positive, ShareBelowOne
from jinv.files import sha256, write_arrays, write_atomic
from jinv.reconstruct import identification, recovery, ridge, trained
from jinv.reconstruct.decoding import Linear
from jinv.reconstruct.recovery import Prior, Recovered
from jinv.reconstruct.setting import with_images
from jinv.reports import page, reconstruction
from jinv.runs import command, compilation, hardware
from jinv.runs import config as configs
from jinv.runs.progress import Progress, Stretch
from jinv.runs.run_folder import FolderError, RunFolder
from jinv.runs.signals import Signals
from jinv.shadow import features
from jinv.shadow.config import Config as Training
from jinv.shadow.store import Layout

RECOVERED = "recovered.npz"
_FAR = 3.0
"""Weights that are so many times as far from the mean as shadow models' are no such head's."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config file holds.

    Attributes:
      heads: the files.
      features: folder of features of your own images by the same network.
      reconstructor: folder of `jinv train-reconstructor`, of either kind; None for linear maps.
      layer: name of the head in a file that holds more: "fc" of "fc.weight" and "fc.bias".
      class_size: images of a class in the training set; None for the reconstructor's, or 1.
      lr, epochs, weight_decay: of the heads' training, or some to choose from; none for the
        reconstructor's.
      momentum, init_std: likewise; init_std is measured where others are chosen.
      candidates: folder with features.json of images that may have been trained on.
    """

    heads: Annotated[tuple[Annotated[str, File()], ...], tyro.conf.Positional]
    features: Annotated[str, File()]
    reconstructor: Annotated[str, File()] | None = None
    layer: str | None = None
    class_size: Count | None = None
    lr: tuple[Positive, ...] = ()
    epochs: tuple[Count, ...] = ()
    weight_decay: tuple[NotNegative, ...] = ()
    momentum: ShareBelowOne | None = None
    init_std: NotNegative | None = None
    candidates: Annotated[str, File()] | None = None

    def __post_init__(self) -> None:
        checks.fields(self)
        if not self.heads:
            raise ValueError("heads: name at least one file")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What summary.json holds.

    Attributes:
      heads: of each: file, refused (why, or null); training (lr, epochs, weight_decay, momentum,
        init_std) that was taken; misfit (standard deviations), noise (mean square of what no
        example moves, 1 if init_std is right), loss on the training set; error: of each class, of
        its recovered feature relative to that of the class mean, as expected; candidates: of each
        class the likeliest ones: index, score, margin (to the first that is not listed). What is
        not known is null.
      attack: "features" or "weights": what images are made from.
      classes: names.
      fingerprint: of the features.
      files: sha256 of recovered.npz; empty if nothing was recovered.
    """

    heads: list[dict[str, Any]]
    attack: str
    classes: list[str]
    fingerprint: str
    files: dict[str, str]


class Reconstruction(command.Loaded):
    """A config with its files read.

    Attributes:
      config: the config.
      own: the attacker's features.
      reconstructor: a trained one, or None.
      weights: of the heads (S, C, D).
      bias: (S, C).
      training: how they were trained, as far as it is known.
      labels: (N,) of a training set.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.own = with_images(config.features, "train")
        folder = config.reconstructor
        self.reconstructor = None if folder is None else trained.load(folder)
        origin = None if self.reconstructor is None else self.reconstructor.origin
        classes, width = len(self.own.classes), self.own.features.shape[1]
        read = [head(file, config.layer, classes, width) for file in config.heads]
        self.weights, self.bias = (np.stack(arrays) for arrays in zip(*read, strict=True))
        given: dict[str, Any] = {
            "lr": config.lr[0] if config.lr else None,
            "epochs": config.epochs[0] if config.epochs else None,
            "weight_decay": config.weight_decay[0] if config.weight_decay else None,
            "momentum": config.momentum,
            "init_std": config.init_std,
        }
        known = Training(classes=classes) if origin is None else origin.training
        changes = {name: value for name, value in given.items() if value is not None}
        self.training = dataclasses.replace(known, **changes)
        size = config.class_size or (1 if origin is None else origin.class_size)
        self.labels = np.repeat(np.arange(classes), size)
        self.of_weights = origin is not None and origin.input == "weights"
        self.reason = recovery.unrecoverable(self.training, len(self.labels))
        if self.reason and not self.of_weights:
            raise ValueError(f"such heads cannot be read: {self.reason}")
        layout = Layout((("bias", (classes,)), ("weight", (classes, width))))
        self.layout = layout
        if origin is not None:
            wanted = layout.size if self.of_weights else width
            if origin.size != wanted or origin.network.classes not in (None, classes):
                raise ValueError(
                    f"{folder} takes {origin.size} numbers of {origin.network.classes} classes; "
                    f"these are {wanted} of {classes}"
                )
        self.candidates = None if config.candidates is None else self._candidates()

    def _candidates(self) -> features.Features:
        assert self.config.candidates is not None
        found = features.load(self.config.candidates)
        if found.features.shape[1] != self.own.features.shape[1]:
            raise ValueError(
                f"candidates: {self.config.candidates} holds features of "
                f"{found.features.shape[1]} numbers, not {self.own.features.shape[1]}"
            )
        if self.reason:
            raise ValueError(f"candidates: none can be told from such heads: {self.reason}")
        return found

    @property
    def chosen(self) -> bool:
        """Whether hyper-parameters are to be chosen from several."""
        config = self.config
        return max(map(len, (config.lr, config.epochs, config.weight_decay))) > 1

    # --- the run ----------------------------------------------------------------------------------

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Reconstruct and write the results; return the summary.

        Raises:
          ValueError: every head is refused; says why.
          Interrupted: SIGTERM or Ctrl-C came.
        """
        count = len(self.weights)
        compiled = compilation.seconds()
        total = 2 * count
        told: list[dict[str, Any]] = []
        found: list[Recovered | None] = []
        with (
            Signals() as stopping,
            Progress([Stretch("fit", count), Stretch("reading", count)]) as bar,
        ):

            def see(stage: int, done: int) -> None:
                bar.update(stage, done, {"head": np.array([done % count + 1])})
                if stopping() and done + 1 < total:
                    raise folder.stopped(stopping.number, done + 1, total)

            trainings = []
            for i in range(count):
                trainings.append(self._training(i))
                see(0, i)
            for i, training in enumerate(trainings):
                found.append(None if self.reason else self._read(i, training))
                told.append(self._told(i, training, found[-1]))
                see(1, count + i)
        folder.clock.compiling = compilation.seconds() - compiled
        reasons = {one["file"]: one["refused"] for one in told}
        if all(reasons.values()):
            lines = "\n".join(f"{file}: {reason}" for file, reason in reasons.items())
            raise ValueError(f"no head can be attacked\n{lines}")
        summary: dict[str, Any] = {}
        parallel.on_main(lambda: summary.update(self._write(folder, told, found)), FolderError)
        return summary

    @functools.cached_property
    def prior(self) -> Prior:
        """Return what is known of features."""
        own = self.own
        return Prior.of(own.features, own.labels, len(own.classes))

    def _training(self, i: int) -> Training:
        """Return how a head was trained: as is known, or what explains it best."""
        if not self.chosen or self.reason:
            return self.training
        config = self.config
        guesses = recovery.guess(
            self.weights[i : i + 1],
            self.bias[i : i + 1],
            self.training,
            self.labels,
            self.prior,
            lr=config.lr or (self.training.lr,),
            epochs=config.epochs or None,
            weight_decay=config.weight_decay or None,
        )
        return guesses[0].config

    def _read(self, i: int, training: Training) -> Recovered:
        some = slice(i, i + 1)
        return recovery.recover(
            self.weights[some], self.bias[some], training, self.labels, self.prior
        )

    def _told(self, i: int, training: Training, found: Recovered | None) -> dict[str, Any]:
        """Return what the summary says of a head."""
        names = ("lr", "epochs", "weight_decay", "momentum", "init_std")
        one: dict[str, Any] = {
            "file": self.config.heads[i],
            "refused": self._far(i) if self.of_weights else None,
            "training": {name: getattr(training, name) for name in names},
            "misfit": None,
            "noise": None,
            "loss": None,
            "error": None,
            "candidates": None,
        }
        if found is None:
            return one
        if not self.of_weights:
            one["refused"] = found.doubts()[0] or None
        counts = np.bincount(self.labels)
        spread = self.prior.variances.sum(-1) / counts
        one |= {
            "misfit": float(found.misfit[0]),
            "noise": float(found.noise[0]),
            "loss": float(found.loss[0]),
            "error": np.sqrt(found.mean_variances[0].sum(-1) / spread).tolist(),
        }
        if self.candidates is not None and not one["refused"]:
            own = np.asarray(self.candidates.features)
            scores = identification.scores(found, self.labels, own, self.prior)[0]
            one["candidates"] = [
                _likeliest(row, count) for row, count in zip(scores, counts, strict=True)
            ]
        return one

    def _far(self, i: int) -> str | None:
        """Return why weights are none that the reconstructor was trained on, None if they may be.

        Their root mean square is compared with 1, that of shadow models' normalised weights.
        """
        assert self.reconstructor is not None
        x = self.reconstructor.normalisation.normalised(self._flat()[i])
        size = float(np.sqrt(np.square(x).mean()))
        if not size < _FAR:
            return (
                f"its weights are {size:.3g} times as far from the mean as those of the shadow "
                "models that the reconstructor has learned from: it was trained otherwise"
            )
        return None

    def _flat(self) -> np.ndarray:
        parts = {"weight": self.weights, "bias": self.bias}
        rows = [parts[name].reshape(len(self.bias), -1) for name, _ in self.layout.shapes]
        return np.concatenate(rows, 1).astype(np.float32)

    # --- results ----------------------------------------------------------------------------------

    def _images(self, found: list[Recovered | None]) -> np.ndarray:
        """Return the images (S, K, H, W, C) of all heads."""
        if self.of_weights:
            assert self.reconstructor is not None
            return self.reconstructor.of_weights(self._flat())
        means = np.concatenate([one.means for one in found if one is not None])
        if self.reconstructor is not None:
            return self.reconstructor.of_features(means)
        own = self.own
        assert own.images is not None
        return Linear.fit(np.asarray(own.features), own.labels, np.asarray(own.images))(means)

    def _write(
        self, folder: RunFolder, told: list[dict[str, Any]], found: list[Recovered | None]
    ) -> dict[str, Any]:
        images = self._images(found)
        pictures = folder.path / "pictures"
        pictures.mkdir(exist_ok=True)
        body: list[page.Section] = []
        arrays = {}
        for i, (one, made) in enumerate(zip(told, images, strict=True)):
            title = f"{i}: {Path(one['file']).name}"
            if one["refused"]:
                body.append(page.Section(title, page.Text(f"refused: {one['refused']}")))
                continue
            png = self._picture(made, one["candidates"])
            write_atomic(pictures / f"{i:03d}.png", png)
            body.append(page.Section(title, page.Figure(png, "Images of the head"), _said(one)))
            body.append(page.Section(f"{title}, class by class", self._table(one)))
            recovered = found[i]
            if recovered is not None:
                arrays[f"{i:03d}.features"] = recovered.means[0]
                arrays[f"{i:03d}.error"] = np.asarray(one["error"], np.float32)
        sums = {}
        if arrays:
            write_arrays(folder.path / RECOVERED, arrays)
            sums[RECOVERED] = sha256(folder.path / RECOVERED)
        summary = Summary(
            **command.shared(folder, f"1 x {jax.devices()[0].device_kind}"),
            heads=told,
            attack="weights" if self.of_weights else "features",
            classes=list(self.own.classes),
            fingerprint=self.own.fingerprint,
            files=sums,
        )
        report = page.Page(
            "Images out of heads",
            body,
            f"{sum(not one['refused'] for one in told)} of {len(told)} heads were read.",
        )
        ending = page.ending(vars(summary), hardware.describe(), configs.to_yaml(self.config))
        report.write(folder.path / "report.html", ending)
        return command.finish(folder, summary)

    def _picture(self, made: np.ndarray, likely: list[list[dict[str, Any]]] | None) -> bytes:
        """Return a PNG: reconstructions of all classes, below them the likeliest candidates."""
        rows = [made]
        if likely is not None and self.candidates is not None:
            pictures = self.candidates.images
            if pictures is not None and pictures.shape[1:] == made.shape[1:]:
                for places in zip(*likely, strict=True):
                    shown = np.stack([np.asarray(pictures[p["index"]]) for p in places])
                    rows.append(ridge.unit(shown))
        return reconstruction.in_rows(rows)

    def _table(self, one: dict[str, Any]) -> page.Table:
        rows = []
        for c, name in enumerate(self.own.classes):
            error = "" if one["error"] is None else f"{one['error'][c]:.2f}"
            likely = [] if one["candidates"] is None else one["candidates"][c]
            shown = ", ".join(f"{p['index']} ({p['score']:.0f})" for p in likely)
            margin = f"{likely[-1]['margin']:.0f}" if likely else ""
            rows.append((name, error, shown, margin))
        return page.Table(
            ("class", "expected error", "likeliest candidates (score)", "margin"), rows
        )


def _likeliest(scores: np.ndarray, count: int) -> list[dict[str, Any]]:
    """Return the candidates with the highest scores of a class that has so many examples."""
    order = np.argsort(-scores, kind="stable")
    following = scores[order[count]] if len(order) > count else -np.inf
    return [
        {
            "index": int(i),
            "score": float(scores[i]),
            "margin": float(scores[i] - following) if np.isfinite(following) else None,
        }
        for i in order[:count]
    ]


def _said(one: dict[str, Any]) -> str:
    """Return how a head was trained, and how well that explains it."""
    training = ", ".join(f"{name} {value:g}" for name, value in one["training"].items())
    if one["misfit"] is None:
        return f"Trained with {training}."
    return (
        f"Trained with {training}: the weights are {one['misfit']:.2g} standard deviations less "
        f"likely than such heads'. Their loss on the training set was {one['loss']:.3g}."
    )


def head(path: str, layer: str | None, classes: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weight (classes, width) and bias (classes,) of the linear layer in a file, float32.

    Args:
      path: a .pth, .pt or .safetensors file.
      layer: its name; needed where several layers are so large.
      classes, width: of the features that it is on.

    Raises:
      ValueError: the file cannot be read, or holds no such layer.
    """
    state = weights_convert.read(path)
    names = [n.removesuffix("weight").removesuffix(".") for n in state if n.endswith("weight")]
    fitting = [
        name
        for name in names
        if state[_joined(name, "weight")].shape == (classes, width)
        and _joined(name, "bias") in state
        and state[_joined(name, "bias")].shape == (classes,)
    ]
    if layer is not None:
        fitting = [name for name in fitting if name == layer]
    if len(fitting) != 1:
        there = {name: tuple(array.shape) for name, array in state.items()}
        shown = ", ".join(f"{name} {shape}" for name, shape in list(there.items())[-6:])
        raise ValueError(
            f"{path}: a head on these features has weight ({classes}, {width}) and bias "
            f"({classes},): "
            + (f"layer can be one of {fitting}" if fitting else f"the file ends in {shown}")
        )
    weight, bias = (
        np.asarray(state[_joined(fitting[0], name)], np.float32) for name in ("weight", "bias")
    )
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise ValueError(f"{path}: the head's weights are not all finite")
    return weight, bias


def _joined(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _say(summary: dict[str, Any]) -> str:
    """Say which heads were refused."""
    refused = [one for one in summary["heads"] if one["refused"]]
    return "\n".join(f"{one['file']}: refused: {one['refused']}" for one in refused)


COMMAND = command.Command(
    name="reconstruct",
    about=str(__doc__),
    config=Config,
    load=Reconstruction,
    summary=Summary,
    files=(RECOVERED, "pictures/", "report.html"),
    say=_say,
    standalone=True,
    less="fewer heads at once",
)
