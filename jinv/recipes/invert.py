"""A recipe and its run: networks in, images, judges' verdicts and a report in a folder out."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jinv import data, image, optimise, parallel
from jinv.attacks import begin, deepinversion
from jinv.files import write_atomic
from jinv.models.network import Network
from jinv.net import Net
from jinv.objective import ensemble
from jinv.objective.terms import Member, Weights
from jinv.reports import curves, page
from jinv.runs import config as configs
from jinv.runs import hardware, run_folder
from jinv.scores import judging

PRESETS = {**deepinversion.PRESETS, "begin": begin.CONFIG}
VERSIONS = ("python", "jax", "jaxlib", "flax", "jinv")


@dataclasses.dataclass(frozen=True)
class Inverted(Network):
    """A network in the objective, and how much its terms count."""

    terms: Weights = dataclasses.field(default_factory=Weights)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a config file holds.

    Attributes:
      networks: inverted jointly; most often one.
      judges: other networks that look at the images; they have no say in the optimisation.
      competitor: a fixed network for R_adi.
      images: batch size.
      labels: "hand-picked" ImageNet classes, "random" ones, or a list; repeated as needed. Unused
        if all networks' label terms weigh 0.
      size: of the images, one side or height and width; the first network's by default.
      space: what the images are normalised for while they are optimised, which scales the learning
        rate and the priors: the "first" network, "imagenet", or "pixels" for none.
      gray: optimise gray images.
      class_names: a text file with one name a line, for networks of other classes.
      seed: of everything random.
      trials: how many batches, of seeds seed, seed + 1, ...
      compute_dtype: of the networks' arithmetic; losses and moments stay float32.
      attack: the mathematics. In a file it may begin with `preset: NAME`, which sets all its keys
        (but no networks' `terms` and no `space`); the keys beside it count more.
      execution: devices and memory, without influence on the result beyond rounding.
      run: how it goes, without influence on the result.
    """

    networks: tuple[Inverted, ...]
    judges: tuple[Network, ...] = ()
    competitor: Network | None = None
    images: int = 8
    labels: Literal["hand-picked", "random"] | tuple[int, ...] = "hand-picked"
    size: int | tuple[int, int] | None = None
    space: Literal["first", "imagenet", "pixels"] = "first"
    gray: bool = False
    class_names: str | None = None
    seed: int = 0
    trials: int = 1
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    attack: deepinversion.Config = dataclasses.field(default_factory=deepinversion.Config)
    execution: ensemble.Execution = dataclasses.field(default_factory=ensemble.Execution)
    run: run_folder.Options = dataclasses.field(default_factory=run_folder.Options)

    def __post_init__(self) -> None:
        if not self.networks:
            raise ValueError("the config names no network to invert")
        if self.images < 1 or self.trials < 1:
            raise ValueError(f"images ({self.images}) and trials ({self.trials}) must be positive")


def recipe_from(tree: dict[str, Any]) -> Recipe:
    """A config file's tree as a `Recipe`, its preset applied."""
    return configs.build(Recipe, configs.with_preset(tree, PRESETS))


class Inversion:
    """A recipe with its networks loaded: everything that can be wrong with it has been found.

    Attributes:
      labelled: whether classes were asked for; if not, the images come from statistics alone.
      targets: class of every image, empty if not `labelled`.
      nets: inverted networks and judges.
      held_out: names of those that had no say in the optimisation.
      attack: what `optimise.run` takes.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.members = [Member(network.load(), network.terms) for network in recipe.networks]
        first = self.members[0].net
        self.nets = self._distinct_nets()
        self.names = data.class_names(first.classes, recipe.class_names)
        self.key, label_key, self.noise_key = jax.random.split(jax.random.key(recipe.seed), 3)
        self.labelled = any(member.weights.label for member in self.members)
        self.targets = []
        if self.labelled:
            self.targets = deepinversion.choose_targets(
                recipe.labels, recipe.images, first.classes, label_key
            )
            for net in self.nets:
                if max(self.targets) >= net.classes:
                    raise ValueError(
                        f"{net.name} knows classes 0 to {net.classes - 1}; it cannot judge images "
                        f"of class {max(self.targets)}"
                    )
        competitor = recipe.competitor.load() if recipe.competitor else None
        self.held_out = [
            net.name for net in self.nets[len(self.members) :] if net is not competitor
        ]
        space = {
            "first": first.preprocessing,
            "imagenet": image.Preprocessing(),
            "pixels": judging.PIXELS_RGB,
        }[recipe.space]
        self.attack = deepinversion.build(
            recipe.attack,
            self.members,
            self.targets or [0] * recipe.images,
            size=recipe.size,
            space=space.gray() if recipe.gray else space,
            competitor=competitor,
            compute_dtype=recipe.compute_dtype,
            execution=recipe.execution,
        )

    def _distinct_nets(self) -> list[Net]:
        """The inverted networks and the judges; a judge that is inverted too counts once."""
        inverted = [member.net for member in self.members]
        judges = [judge.load() for judge in self.recipe.judges]
        nets = [*inverted, *(judge for judge in judges if judge not in inverted)]
        names = [net.name for net in nets]
        if len(set(names)) < len(names):
            raise ValueError(f"two networks have one name; give them names: {', '.join(names)}")
        return nets

    def run(self, run: run_folder.Session) -> dict[str, Any]:
        """Optimise and write the results; returns the summary (of the main process).

        A loss that is not finite leaves the best images before it in the folder.
        """
        parallel.say(self.attack.placement.reason)
        try:
            state = run.run(
                self.attack.phases,
                self.key,
                self.attack.initial(self.noise_key),
                self.attack.data,
                pictures=lambda images: page.png(image.grid(self.pixels(images))),
                score=self.score if self.labelled else None,
            )
        except optimise.NonFiniteError:
            if run.state is not None:
                images = parallel.fetch(run.state.best_images)
                if parallel.is_main():
                    self.write_images(run.folder, self.pixels(images))
            raise
        pixels = self.pixels(parallel.fetch(state.best_images))
        loss = float(parallel.fetch(state.best_loss))
        summary: dict[str, Any] = {}
        parallel.on_main(
            lambda: summary.update(self.write_results(run, pixels, loss)), run_folder.SessionError
        )
        return summary

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """Images as bytes: what is saved, and what judges see."""
        return image.to_bytes(image.denormalise(jnp.asarray(images), self.attack.space))

    def predict(self, pixels: np.ndarray) -> dict[str, judging.Prediction]:
        """What each network says."""
        seen = pixels / np.float32(255)
        return {net.name: judging.make_judge(net)(seen) for net in self.nets}

    def score(self, images: np.ndarray) -> dict[str, float]:
        """Each network's top-1."""
        predictions = self.predict(self.pixels(images))
        return {name: judging.top1(p, self.targets) for name, p in predictions.items()}

    def write_images(self, out: Path, pixels: np.ndarray) -> dict[str, str]:
        """One PNG an image, and the grid; returns the images' sha256 by file name."""
        (out / "images").mkdir(exist_ok=True)
        files = {}
        for i, picture in enumerate(pixels):
            file = f"images/{i:03d}.png"
            if self.labelled:
                target = self.targets[i]
                slug = re.sub(r"[^a-z0-9]+", "-", self.names[target].lower()).strip("-")[:40]
                file = f"images/{i:03d}_class{target:03d}_{slug}.png"
            encoded = page.png(picture)
            write_atomic(out / file, encoded)
            files[file] = hashlib.sha256(encoded).hexdigest()
        page.write_png(out / "grid.png", image.grid(pixels))
        return files

    def write_results(
        self, run: run_folder.Session, pixels: np.ndarray, loss: float
    ) -> dict[str, Any]:
        """Images, grid, curves, report; the summary last."""
        targets = self.targets
        files = self.write_images(run.folder, pixels)
        predictions = self.predict(pixels)
        top1 = {name: judging.top1(p, targets) for name, p in predictions.items() if targets}
        if targets:
            run.scores.add(step=run.metrics.rows[-1]["step"] + 1, **top1)
            run.scores.save()
        terms = [name for name in run.metrics.columns() if name not in ("step", "phase")]
        machine = hardware.describe()
        devices = self.attack.placement.mesh.devices.flat
        summary = {
            "model": "+".join(member.net.name for member in self.members),
            "device": f"{len(devices)} x {devices[0].device_kind}",
            "placement": self.attack.placement.reason,
            "steps": len(run.metrics.rows),
            "images": len(pixels),
            "targets": targets,
            "seconds": round(run.seconds, 3),
            "seconds_per_step": round(run.clock.stepping / max(run.clock.steps, 1), 6),
            "compile_seconds": round(run.clock.compiling, 3),
            "loss": loss,
            "terms": {name: run.metrics.column(name)[-1] for name in terms if name != "loss"},
            "top1": top1,
            "confidence": {n: judging.confidence(p, targets) for n, p in predictions.items()}
            if targets
            else {},
            "mean_probability": {n: float(p.probability.mean()) for n, p in predictions.items()},
            "agreement": judging.agreement([predictions[name] for name in self.held_out]),
            "diversity": self._diversity(pixels, predictions),
            "files": files,
            "versions": {name: machine[name] for name in VERSIONS},
        }
        svg = curves.plot(
            {name: run.metrics.column(name) for name in terms},
            [int(step) for step in run.metrics.column("step")],
            boundaries=_boundaries(run.metrics),
        )
        write_atomic(run.folder / "curves.svg", svg)
        kept = any(member.net.statistics for member in self.members)
        statistics = " and BatchNorm statistics" if kept else ""
        page.write_html(
            run.folder / "report.html",
            f"What {summary['model']} {'have' if len(self.members) > 1 else 'has'} learned",
            self._sections(summary, pixels, predictions, svg, machine),
            lead=f"{len(pixels)} images, {summary['steps']} steps, from the weights{statistics} "
            "alone: no data was read.",
        )
        run.finish(summary)
        return summary

    def _diversity(
        self, pixels: np.ndarray, predictions: dict[str, judging.Prediction]
    ) -> dict[str, float | None]:
        """Mean distance of two images of a class: of pixels, and of each network's features."""
        groups = self.targets or [0] * len(pixels)
        found = {"pixels": judging.diversity(judging.pixel_distances(pixels / 255), groups)}
        for name, prediction in predictions.items():
            if prediction.features is not None:
                distances = judging.feature_distances(prediction.features)
                found[name] = judging.diversity(distances, groups)
        return found

    def _sections(
        self,
        summary: dict[str, Any],
        pixels: np.ndarray,
        predictions: dict[str, judging.Prediction],
        svg: bytes,
        machine: dict[str, str],
    ) -> list[page.Section]:
        timing = {
            "seconds": f"{summary['seconds']:.1f}",
            "seconds a step": f"{summary['seconds_per_step']:.4f}",
            "seconds compiling": f"{summary['compile_seconds']:.1f}",
            "placement": summary["placement"],
        }
        return [
            page.Section(
                "Images",
                page.Pictures(
                    [
                        self._picture(i, pixels[i], file, predictions)
                        for i, file in enumerate(summary["files"])
                    ]
                ),
            ),
            self._judges(summary),
            self._variety(summary),
            page.Section("Curves", page.Figure(svg, "Every term of the objective at every step")),
            page.Section(
                "Hardware and time",
                page.Table(("", "value"), tuple((machine | timing).items())),
            ),
            page.Section("Config", page.Text(configs.to_yaml(self.recipe))),
        ]

    def _picture(
        self, i: int, pixels: np.ndarray, file: str, predictions: dict[str, judging.Prediction]
    ) -> page.Picture:
        target = self.targets[i] if self.labelled else None

        def verdict(name: str, prediction: judging.Prediction) -> page.Verdict:
            index = int(prediction.index[i])
            label = self.names[index] if index < len(self.names) else f"class {index}"
            agrees = None if target is None else index == target
            return page.Verdict(name, label, index, float(prediction.probability[i]), agrees)

        verdicts = tuple(verdict(name, p) for name, p in predictions.items())
        caption = f"image {i}" if target is None else self.names[target]
        return page.Picture(pixels, caption, file, verdicts)

    def _judges(self, summary: dict[str, Any]) -> page.Section:
        header = ["network", "mean probability of the class it gives"]
        if self.labelled:
            header += ["gives the target class", "probability of the target class"]
        rows = []
        for i, net in enumerate(self.nets):
            name = net.name
            if net.name not in self.held_out:
                name += " (inverted)" if i < len(self.members) else " (competitor)"
            rows.append([name, f"{summary['mean_probability'][net.name]:.2f}"])
            if self.labelled:
                rows[-1] += [
                    f"{100 * summary['top1'][net.name]:.0f}%",
                    f"{summary['confidence'][net.name]:.2f}",
                ]
        agreement = summary["agreement"]
        intro = "Networks that had no say in the optimisation are the test."
        if agreement is not None:
            intro += f" Any two of them name the same class for {100 * agreement:.0f}% of images."
        return page.Section("Judges", page.Table(header, rows), intro)

    def _variety(self, summary: dict[str, Any]) -> page.Section:
        found = summary["diversity"]
        if found["pixels"] is None:
            return page.Section("Diversity", page.Table(("every class has one image",), ()))
        rows = [
            (
                "pixels (root mean square)" if name == "pixels" else f"features of {name} (cosine)",
                f"{value:.3f}",
            )
            for name, value in found.items()
        ]
        of = "of one class" if self.labelled else "of the batch"
        return page.Section(
            "Diversity",
            page.Table(("distance", "mean"), rows),
            f"How far two images {of} are apart; 0 if they are all the same.",
        )


def _boundaries(log: run_folder.Log) -> list[int]:
    """Steps at which a new phase began."""
    phases = [row["phase"] for row in log.rows]
    return [log.rows[i]["step"] for i in range(1, len(phases)) if phases[i] != phases[i - 1]]


def prepare(recipe: Recipe) -> Inversion:
    """The recipe with its networks loaded, in every process or in none.

    Raises:
      ValueError: the mistake, in every process if one process has it.
    """
    return parallel.everywhere(lambda: Inversion(recipe))
