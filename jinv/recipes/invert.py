"""Invert trained networks into images of given classes: DeepInversion, alone or in ensembles.

    jinv invert --config demo --out out/demo
    jinv invert --config deepinversion_resnet50 --out out/r50 \\
        --networks.0.weights resnet50-0676ba61.pth --seed 1
    jinv invert --config demo --out out/demo --resume

Every key of the config can be overridden on the command line (`--config F --help` lists them).
Ctrl-C or SIGTERM saves a checkpoint; --resume goes on to the very same images. A finished run is
replaced only with --overwrite.

The output folder holds images/NNN_classCCC_NAME.png, grid.png, curves.svg, report.html,
metrics.csv, scores.csv, progress/*.png and, last of all, summary.json.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from jinv import checks, data, image, parallel
from jinv.attacks import begin, deepinversion
from jinv.checks import Class, Count, Seed, Some
from jinv.files import write_atomic
from jinv.models.network import Network
from jinv.net import Net
from jinv.objective import ensemble
from jinv.objective.terms import Member, Weights
from jinv.reports import curves, inversion, page
from jinv.runs import attack_run, command, hardware, study
from jinv.runs import config as configs
from jinv.runs.run_folder import FolderError, RunFolder
from jinv.scores import judging

PRESETS = {**deepinversion.PRESETS, "begin": begin.CONFIG}


@dataclasses.dataclass(frozen=True)
class Inverted(Network):
    """A network in the objective, and how much its terms count."""

    terms: Weights = dataclasses.field(default_factory=Weights)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What images are optimised for, as configs say it.

    Attributes:
      networks: inverted jointly; most often one.
      competitor: a fixed network for R_adi.
      size: of the images, one side or height and width; the first network's by default.
      space: what the images are normalised for while they are optimised, which scales the learning
        rate and the priors: the "first" network, "imagenet", or "pixels" for none.
      gray: optimise gray images.
      compute_dtype: of the networks' arithmetic; losses and moments stay float32.
      attack: the mathematics. In a file it may begin with `preset: NAME`, which sets all its keys
        (but no networks' `terms` and no `space`); the keys beside it count more.
      execution: devices and memory, without influence on the result beyond rounding.
    """

    networks: Annotated[tuple[Inverted, ...], Some()]
    competitor: Network | None = None
    size: Count | tuple[Count, Count] | None = None
    space: Literal["first", "imagenet", "pixels"] = "first"
    gray: bool = False
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    attack: deepinversion.Config = dataclasses.field(default_factory=deepinversion.Config)
    execution: ensemble.Execution = dataclasses.field(default_factory=ensemble.Execution)

    def members(self) -> list[Member]:
        """Load the networks."""
        return [Member(network.load(), network.terms) for network in self.networks]

    def build(
        self, members: Sequence[Member], targets: Sequence[int], competitor: Net | None
    ) -> deepinversion.Attack:
        """Build the attack on these classes.

        Args:
          members: the networks, loaded.
          targets: one class an image.
          competitor: for R_adi.
        """
        return deepinversion.build(
            self.attack,
            members,
            targets,
            size=self.size,
            space=_space(self, members[0].net),
            competitor=competitor,
            compute_dtype=self.compute_dtype,
            execution=self.execution,
        )


@dataclasses.dataclass(frozen=True)
class Config(Objective):
    """What a config file holds.

    Attributes:
      judges: other networks that look at the images; they have no say in the optimisation.
      images: batch size.
      labels: "hand-picked" ImageNet classes, "random" ones, or a list; repeated as needed. Unused
        if all networks' label terms weigh 0.
      class_names: a text file with one name a line, or one of "imagenet", "cifar10",
        "fashion_mnist", "emnist-letters" and so on; the network's own by default.
      seed: of everything random.
      trials: how many batches, of seeds seed, seed + 1, ...
      run: how it goes, without influence on the result.
    """

    judges: tuple[Network, ...] = ()
    images: Count = 8
    labels: Literal["hand-picked", "random"] | Annotated[tuple[Class, ...], Some()] = "hand-picked"
    class_names: data.ClassNames | None = None
    seed: Seed = 0
    trials: Count = 1
    run: attack_run.Options = dataclasses.field(default_factory=attack_run.Options)

    def __post_init__(self) -> None:
        checks.fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What a run's summary.json holds.

    Attributes:
      model: names of the inverted networks, joined by "+".
      placement: in words, what the devices share.
      steps: steps done.
      images: number of images.
      targets: class of each image; empty if no network's label term has a weight.
      loss: of the best images, in the last phase.
      terms: raw value of every term of the objective at the last step.
      top1: network -> fraction of the images it gives their target class.
      confidence: network -> mean probability of the target class.
      mean_probability: network -> mean probability of the classes it gives.
      agreement: share of images for which two judges that had no say name the same class, over all
        pairs of judges; null without a pair.
      diversity: mean distance of two images of a class: "pixels" (root mean square, pixels in
        [0, 1]), network -> cosine distance of its features; null without two such.
      files: sha256 of every image file, by name.
    """

    model: str
    placement: str
    steps: int
    images: int
    targets: list[int]
    loss: float
    terms: dict[str, float]
    top1: dict[str, float]
    confidence: dict[str, float]
    mean_probability: dict[str, float]
    agreement: float | None
    diversity: dict[str, float | None]
    files: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySummary:
    """What the summary.json of a study holds.

    Attributes:
      runs: folder -> that run's summary.
      variants: name -> {inverted, trials, top1 (mean over trials), seconds}.
      held_out: networks that were inverted in no run.
      seconds: of all runs.
    """

    runs: dict[str, Any]
    variants: dict[str, Any]
    held_out: list[str]
    seconds: float


class Inversion(command.Loaded):
    """A config with its networks loaded.

    Attributes:
      config: the config.
      labelled: whether classes were asked for; if not, the images come from statistics alone.
      targets: class of every image, empty if not `labelled`.
      nets: inverted networks and judges.
      held_out: names of those that had no say in the optimisation.
      attack: what `optimise.run` takes.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.members = config.members()
        first = self.members[0].net
        self.nets = distinct([m.net for m in self.members], [n.load() for n in config.judges])
        self.names = data.class_names(first.classes, config.class_names, first.class_names)
        self.labelled = any(member.weights.label for member in self.members)
        competitor = config.competitor.load() if config.competitor else None
        self.roles = {net.name: " (inverted)" for net in self.nets[: len(self.members)]}
        if competitor in self.nets:
            self.roles.setdefault(competitor.name, " (competitor)")
        self.held_out = [net.name for net in self.nets if net.name not in self.roles]
        self._judges = {net.name: judging.make_judge(net) for net in self.nets}
        self._draw()
        self.attack = config.build(self.members, self._classes, competitor)

    def with_seed(self, seed: int) -> Self:
        """Return the same with another seed: other noise, other random classes."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, seed=seed, trials=1)
        other._draw()
        other.attack = self.attack.with_targets(other._classes)
        return other

    def _draw(self) -> None:
        """Draw what the seed decides."""
        config, first = self.config, self.members[0].net
        self.key, label_key, self.noise_key = jax.random.split(jax.random.key(config.seed), 3)
        self.targets: list[int] = []
        if not self.labelled:
            return
        self.targets = deepinversion.choose_targets(
            config.labels, config.images, first.classes, label_key
        )
        for net in self.nets:
            check_classes(net, first, self.targets)

    @property
    def _classes(self) -> list[int]:
        return self.targets or [0] * self.config.images

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Optimise and write the results; return the summary (of the main process).

        A loss that is not finite leaves the best images before it in the folder.
        """
        parallel.say(self.attack.placement.reason)
        watch = attack_run.Watch(
            pictures=lambda images: page.png(image.grid(self.pixels(images))),
            score=self.score if self.labelled else None,
        )

        def keep(images: np.ndarray) -> None:
            self._write_images(folder, self.pixels(images))

        state = attack_run.run(
            self.attack,
            self.key,
            self.noise_key,
            folder,
            self.config.run,
            watch,
            keep=keep,
        )
        pixels = self.pixels(parallel.fetch(state.best_images))
        loss = float(parallel.fetch(state.best_loss))
        summary: dict[str, Any] = {}
        parallel.on_main(
            lambda: summary.update(self._write_results(folder, pixels, loss)), FolderError
        )
        return summary

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """Return images as bytes: what is saved, and what judges see."""
        return image.to_bytes(image.denormalise(jnp.asarray(images), self.attack.space))

    def predict(self, pixels: np.ndarray) -> dict[str, judging.Prediction]:
        """Return what each network says of bytes (B, H, W, C)."""
        seen = pixels / np.float32(255)
        return {name: judge(seen) for name, judge in self._judges.items()}

    def score(self, images: np.ndarray) -> dict[str, float]:
        """Return each network's top-1."""
        predictions = self.predict(self.pixels(images))
        return {name: judging.top1(p, self.targets) for name, p in predictions.items()}

    def _write_images(self, folder: RunFolder, pixels: np.ndarray) -> dict[str, str]:
        """Write one PNG an image, and the grid; return the images' sha256 by file name."""
        page.write_png(folder.path / "grid.png", image.grid(pixels))
        named = {self._file(i): picture for i, picture in enumerate(pixels)}
        return page.write_pngs(folder.path, named)

    def _file(self, i: int) -> str:
        if not self.labelled:
            return f"images/{i:03d}.png"
        target = self.targets[i]
        slug = re.sub(r"[^a-z0-9]+", "-", self.names[target].lower()).strip("-")[:40]
        return f"images/{i:03d}_class{target:03d}_{slug}.png"

    def _write_results(self, folder: RunFolder, pixels: np.ndarray, loss: float) -> dict[str, Any]:
        """Write images, grid, curves, report; the summary last."""
        targets, log = self.targets, folder.metrics
        files = self._write_images(folder, pixels)
        predictions = self.predict(pixels)
        top1 = {name: judging.top1(p, targets) for name, p in predictions.items() if targets}
        if targets:
            folder.scores.add(step=log.last["step"] + 1, **top1)
            folder.scores.save()
        terms = log.terms()
        summary = Summary(
            **command.shared(folder, hardware.of_mesh(self.attack.mesh)),
            model="+".join(member.net.name for member in self.members),
            placement=self.attack.placement.reason,
            steps=len(log),
            images=len(pixels),
            targets=targets,
            loss=loss,
            terms={name: values[-1] for name, values in terms.items() if name != "loss"},
            top1=top1,
            confidence={
                name: judging.confidence(p, targets) for name, p in predictions.items() if targets
            },
            mean_probability={n: float(p.probability.mean()) for n, p in predictions.items()},
            agreement=judging.agreement([predictions[name] for name in self.held_out]),
            diversity=self._diversity(pixels, predictions),
            files=files,
        )
        svg = curves.plot(terms, log.steps(), boundaries=log.boundaries())
        write_atomic(folder.path / "curves.svg", svg)
        found = inversion.Found(pixels, targets, self.names, predictions, self.roles)
        told = vars(summary)
        kept = any(member.net.statistics for member in self.members)
        body = inversion.run_page(told, found, svg, kept)
        ending = page.ending(
            told,
            hardware.describe(),
            configs.to_yaml(self.config),
            {net.name: net.weights for net in self.nets},
            placement=summary.placement,
        )
        body.write(folder.path / "report.html", ending)
        return command.finish(folder, summary)

    def _diversity(
        self, pixels: np.ndarray, predictions: dict[str, judging.Prediction]
    ) -> dict[str, float | None]:
        """Return the mean distance of two images of a class: of pixels, of networks' features."""
        groups = self.targets or [0] * len(pixels)
        found = {"pixels": judging.diversity(judging.pixel_distances(pixels / 255), groups)}
        for name, prediction in predictions.items():
            if prediction.features is not None:
                distances = judging.feature_distances(prediction.features)
                found[name] = judging.diversity(distances, groups)
        return found


def check_classes(net: Net, first: Net, targets: list[int]) -> None:
    """Raise ValueError if a network has not these classes, or means something else by them."""
    if max(targets) >= net.classes:
        raise ValueError(
            f"{net.name} knows classes 0 to {net.classes - 1}; it cannot judge images "
            f"of class {max(targets)}"
        )
    if first.class_names is None or net.class_names is None:
        return
    for target in targets:
        own, other = first.class_names[target], net.class_names[target]
        if own != other:
            raise ValueError(
                f"class {target} is {own!r} to {first.name}, but {other!r} to {net.name}: neither "
                "has a say about the other's images"
            )


def distinct(inverted: list[Net], judges: list[Net]) -> list[Net]:
    """Return the inverted networks and the judges; a judge that is inverted too counts once.

    Raises:
      ValueError: two networks have one name.
    """
    nets = [*inverted, *(judge for judge in judges if judge not in inverted)]
    names = [net.name for net in nets]
    if len(set(names)) < len(names):
        raise ValueError(f"two networks have one name; give them names: {', '.join(names)}")
    return nets


def _space(config: Objective, first: Net) -> image.Preprocessing:
    """Return what the images are normalised for while they are optimised."""
    space = {
        "first": first.preprocessing,
        "imagenet": image.Preprocessing(),
        "pixels": image.pixels(first.preprocessing.channels),
    }[config.space]
    return space.gray() if config.gray else space


def compare(
    chosen: Sequence[study.Run], summaries: Sequence[dict[str, Any]], whole: RunFolder
) -> None:
    """Write the page and the summary of a study."""
    labels = {run.variant: [n.label for n in run.config.networks] for run in chosen}
    variants = [
        inversion.Variant(
            study.title(name),
            inverted,
            [s for run, s in zip(chosen, summaries, strict=True) if run.variant == name],
        )
        for name, inverted in labels.items()
    ]
    networks = list(dict.fromkeys(name for s in summaries for name in s["mean_probability"]))
    rivals = {run.config.competitor.label for run in chosen if run.config.competitor}
    held_out = [n for n in networks if n not in rivals.union(*labels.values())]
    grids = {
        run.title: (
            (whole.path / run.folder / "grid.png").read_bytes(),
            f"Inverted: {', '.join(labels[run.variant])}",
        )
        for run in chosen
    }
    told = {
        "variants": {
            v.title: {
                "inverted": sorted(v.inverted),
                "trials": len(v.summaries),
                "top1": {
                    n: float(np.mean([s["top1"][n] for s in v.summaries]))
                    for n in networks
                    if all(n in s["top1"] for s in v.summaries)
                },
                "seconds": sum(s["seconds"] for s in v.summaries),
            }
            for v in variants
        },
        "held_out": held_out,
    }
    body = inversion.study_page(variants, networks, held_out, grids)
    study.finish(whole, chosen, summaries, body, told)


def _say(summary: dict[str, Any]) -> str:
    """Say what judges think of the images."""
    return "\n".join(
        f"{name} gives {100 * share:.0f}% of the images their class"
        for name, share in summary["top1"].items()
    )


COMMAND = command.Command(
    name="invert",
    about=str(__doc__),
    config=Config,
    load=Inversion,
    summary=Summary,
    files=attack_run.FILES,
    say=_say,
    presets=PRESETS,
    compare=compare,
    free=(*command.FREE, "judges", "class_names"),
    study=StudySummary,
    less="--execution.images-at-once, --execution.networks-at-once 1, fewer images",
)
