"""Attack heads: how well do attackers find the images that heads were trained on?

    jinv attack-heads --config attack_fashion_mnist --out out/attack
    jinv attack-heads --config ... --out ... --reconstructors out/decoder out/reconstructor
    jinv attack-heads --config ... --out ... --training.epochs 100

The config names a folder of features (`jinv extract-features`, with `images_size`) and how heads
are trained on them; every key can be overridden on the command line (`--config F --help` lists
them). Victims are heads of test images, which no attacker has seen. These attack them:

ridge     ridge regression from a class's own weights, which knows some shadow models: the control
recovery  exact recovery of the features, which needs no shadow model, and linear maps from
          features to images
others    reconstructors that `jinv train-reconstructor` trained, by the names of their folders:
          from all weights, or from recovered features

Where one of them does not apply, the summary says why. Exact recovery also tells which of many
images a head has seen (identification, membership). A config with `variants` compares settings,
such as class sizes, epochs, optimisers or privacy, in one table and plot.

A run takes minutes. Ctrl-C and SIGTERM stop it; --resume begins it anew, but keeps the variants
that are finished. A finished run is replaced only with --overwrite.

The output folder holds report.html, pictures/ATTACKER_KIND.png (best, median and worst
reconstructions), samples.npz (ATTACKER.true and ATTACKER.random: least MSE of every
reconstruction) and, last of all, summary.json.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np

from jinv import parallel
from jinv.checks import Count, File, Natural
from jinv.files import sha256, write_arrays, write_atomic
from jinv.recipes import train_shadow_models as shadows
from jinv.reconstruct import identification, ridge, trained
from jinv.reconstruct.evaluation import Evaluation
from jinv.reconstruct.recovery import Recovered
from jinv.reconstruct.setting import Heads, Setting
from jinv.reconstruct.trained import Trained
from jinv.reconstruct.victims import Attacked, Victims, attacked
from jinv.reports import page, reconstruction
from jinv.runs import command, compilation, hardware, study
from jinv.runs import config as configs
from jinv.runs.progress import Progress, Stretch
from jinv.runs.run_folder import FolderError, RunFolder
from jinv.runs.signals import Signals
from jinv.shadow.sampling import permutation

SAMPLES = "samples.npz"
_BINS = 10
"""Groups of recovered features whose predicted errors are compared with the true ones."""


@dataclasses.dataclass(frozen=True)
class Config(Heads):
    """What a config file holds.

    Attributes:
      reconstructors: folders of `jinv train-reconstructor`, which attack, too.
      identified: victims whose images are looked for among all test images by exact recovery; 0
        for none.
      trials: runs with seeds `seed`, `seed + 1`, ...
    """

    reconstructors: tuple[Annotated[str, File()], ...] = ()
    identified: Natural = 100
    trials: Count = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What summary.json holds; a step is a head that was read exactly.

    Attributes:
      victims: heads that were attacked.
      examples: N, of a training set.
      heads: P, parameters of a head.
      shadow_models: that ridge has learned from.
      accuracy: mean of the victims' accuracy on other images; null for heads of one person.
      privacy: noise_multiplier, l2_norm_clip, sampling, steps, delta, epsilon; bound: the most
        that any attack's TPR can be at each FPR; or null.
      threshold: mean MSE, in [-1, 1], of a test image and the nearest other of its class.
      attackers: name -> samples, median_mse, tpr_at_fpr ("0.001", "0.01", "0.1"), intervals (95 %),
        at_threshold (mse, tpr, fpr), top1: share of reconstructions whose true image is the
        nearest of all test images of its class (of all, if no class is told).
      not_available: attacker -> why it does not apply.
      recovery: error (of features, relative to that of the class mean, root mean square),
        predicted (the same, as expected from the weights), believed and random_believed (share of
        victims, and of random weights, that are believed to be such heads), misfit (median),
        calibration (bins of examples: predicted, measured), identified: victims, candidates, first
        (share of examples whose score is the highest of all candidates'), first_of_class (among as
        many as the class has examples), membership (tpr_at_fpr, intervals: images of the class that
        a head was not trained on are the negatives); or null.
      fingerprint: of the victims' features.
      files: sha256 of samples.npz.
    """

    victims: int
    examples: int
    heads: int
    shadow_models: int
    accuracy: float | None
    privacy: dict[str, Any] | None
    threshold: float
    attackers: dict[str, Any]
    not_available: dict[str, str]
    recovery: dict[str, Any] | None
    fingerprint: str
    files: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySummary:
    """What the summary.json of a study holds.

    Attributes:
      runs: folder -> that run's summary.
      variants: name -> attackers (name -> TPR at FPR 1 %, mean over trials), accuracy, epsilon.
      seconds: of all runs.
    """

    runs: dict[str, Any]
    variants: dict[str, Any]
    seconds: float


# --- results --------------------------------------------------------------------------------------


def told_of(outcome: Attacked, threshold: float) -> dict[str, Any]:
    """Return what a summary says of an attacker."""
    return outcome.evaluation.summary(threshold) | {"top1": outcome.top1}


def sections(
    victims: Victims, outcomes: Mapping[str, Attacked], told: Mapping[str, Any], folder: Path
) -> list[page.Section]:
    """Write pictures of all attackers into a folder; return the sections of the report.

    Args:
      victims: the heads.
      outcomes: of the attackers.
      told: what the summary says of them.
      folder: of the run.
    """
    shown, sheets = [], {}
    near = victims.neighbours.nearest
    for name, outcome in outcomes.items():
        own = told[name]
        shown.append(
            reconstruction.Attacker(
                name,
                outcome.evaluation.true,
                outcome.evaluation.random,
                outcome.evaluation.cumulative(),
                {
                    float(at): (rate, *own["intervals"][at])
                    for at, rate in own["tpr_at_fpr"].items()
                },
                outcome.evaluation.rates(victims.threshold),
                outcome.top1,
            )
        )
        truth = outcome.truth
        sheets[name] = {
            kind: reconstruction.sheet(
                outcome.found[some], victims.images[truth[some]], victims.images[near[truth[some]]]
            )
            for kind, some in reconstruction.chosen(outcome.samples, 10).items()
        }
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for name, kinds in sheets.items():
        for kind, png in kinds.items():
            write_atomic(pictures / f"{name}_{kind}.png", png)
    return reconstruction.sections(shown, victims.threshold, sheets)


class Attack(command.Loaded):
    """A config with its features and reconstructors read.

    Attributes:
      config: the config.
      setting: heads and the attacker's data.
      reconstructors: name -> a trained one.
      not_available: attacker -> why it does not apply.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.setting = Setting(config)
        self.not_available: dict[str, str] = {}
        self.reconstructors = self._reconstructors()
        reason = self.setting.unrecoverable
        if reason:
            self.not_available["recovery"] = reason
        if self.setting.training.head != "linear":
            self.not_available["ridge"] = "a class has weights of its own in linear heads alone"
        if reason and not self.reconstructors and self.setting.training.head != "linear":
            raise ValueError(f"no attacker is left: {reason}; name reconstructors")

    def with_seed(self, seed: int) -> Self:
        """Return the same with other initial weights and random weights."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, seed=seed, trials=1)
        other.setting = self.setting.with_seed(seed)
        return other

    def _reconstructors(self) -> dict[str, Trained]:
        found: dict[str, Trained] = {}
        for folder in self.config.reconstructors:
            name = Path(folder).name
            if name in found or name in ("ridge", "recovery"):
                raise ValueError(f"reconstructors: {name!r} is the name of another attacker")
            own = trained.load(folder)
            reason = unfit(own, self.setting)
            if reason:
                self.not_available[name] = reason
            else:
                found[name] = own
        return found

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Make the heads, attack them and write the results; return the summary.

        Raises:
          Interrupted: SIGTERM or Ctrl-C came.
        """
        setting, config = self.setting, self.config
        folder.begin()
        reads = "recovery" not in self.not_available
        stages = [Stretch("shadow models", config.statistics)]
        if reads:
            stages.append(Stretch("exact recovery", 2 * config.victims, 0.02))
        total, done = sum(stage.steps for stage in stages), 0
        compiled = compilation.seconds()
        with Signals() as stopping, Progress(stages) as bar:

            def see(stage: int, count: int, **values: Any) -> None:
                nonlocal done
                shown = {name: np.full(count, value) for name, value in values.items()}
                bar.update(stage, done, shown)
                done += count
                if stopping() and done < total:
                    raise folder.stopped(stopping.number, done, total)

            fitting = setting.fitting()
            statistics_ = setting.learned(fitting, lambda: see(0, 1, seeds=done + 1))
            victims = setting.victims(statistics_)
            read: dict[str, Recovered] = {}
            if reads:
                began, before = time.perf_counter(), compilation.seconds()

                def told(count: int, found: Recovered) -> None:
                    see(1, count, misfit=float(np.median(found.misfit)))

                read["weights"] = setting.read(victims.weights, told)
                taken = time.perf_counter() - began - (compilation.seconds() - before)
                folder.clock.stepping, folder.clock.steps = taken, len(victims.weights)
                read["random"] = setting.read(victims.random, told)
        outcomes = {
            name: attacked(victims, *pair)
            for name, pair in self._reconstructions(victims, fitting, read).items()
        }
        identified = self._identified(victims, read.get("weights"))
        folder.clock.compiling = compilation.seconds() - compiled
        summary: dict[str, Any] = {}
        parallel.on_main(
            lambda: summary.update(self._write(folder, victims, outcomes, read, identified)),
            FolderError,
        )
        return summary

    def _reconstructions(
        self, victims: Victims, fitting: ridge.Fitting | None, read: Mapping[str, Recovered]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return what every attacker makes of the victims' weights, and of random ones."""
        found: dict[str, Callable[[str], np.ndarray]] = {}

        def of_weights(attack: Any) -> Callable[[str], np.ndarray]:
            return lambda kind: attack(getattr(victims, kind))

        def of_features(decode: Any) -> Callable[[str], np.ndarray]:
            return lambda kind: decode(read[kind].means)

        if fitting is not None:
            found["ridge"] = of_weights(fitting.fit().reconstruct)
        if read:
            found["recovery"] = of_features(self.setting.linear)
        for name, own in self.reconstructors.items():
            weights = own.origin.input == "weights"
            found[name] = of_weights(own.of_weights) if weights else of_features(own.of_features)
        return {name: (attack("weights"), attack("random")) for name, attack in found.items()}

    def _identified(self, victims: Victims, read: Recovered | None) -> dict[str, Any] | None:
        """Return how well exact recovery tells which images heads were trained on."""
        count = min(self.config.identified, len(victims.weights))
        if read is None or not count:
            return None
        setting = self.setting
        some = Recovered(*(array[:count] for array in read))
        candidates = np.asarray(setting.test.features)
        first, first_of_class, members, others = [], [], [], []
        labels = victims.labels
        for head in range(count):
            one = Recovered(*(array[head : head + 1] for array in some))
            scores = identification.scores(one, setting.labels, candidates, setting.prior)[0]
            true = victims.indices[head]
            own = scores[labels[true], true]
            places = identification.ranks(scores[None, labels[true]], true[None])[0]
            first.append(places == 0)
            each = np.bincount(labels[true])[labels[true]]
            first_of_class.append(places < each)
            members.append(own)
            rest = np.setdiff1d(np.arange(len(labels)), true)
            rest = rest[permutation(len(rest), head)[: 10 * len(true)]]
            others.append(scores[labels[rest], rest])
        groups = np.repeat(np.arange(count), [len(x) for x in members])
        other_groups = np.repeat(np.arange(count), [len(x) for x in others])
        evaluation = Evaluation(
            -np.concatenate(members), -np.concatenate(others), groups, other_groups
        )
        return {
            "victims": count,
            "candidates": len(candidates),
            "first": float(np.mean(np.concatenate(first))),
            "first_of_class": float(np.mean(np.concatenate(first_of_class))),
            "membership": evaluation.told(),
        }

    def _write(
        self,
        folder: RunFolder,
        victims: Victims,
        outcomes: Mapping[str, Attacked],
        read: Mapping[str, Recovered],
        identified: dict[str, Any] | None,
    ) -> dict[str, Any]:
        setting, config = self.setting, self.config
        told = {name: told_of(outcome, victims.threshold) for name, outcome in outcomes.items()}
        found = None
        if read:
            found = self._recovery(victims, read) | {"identified": identified}
        body = sections(victims, outcomes, told, folder.path)
        if found is not None:
            body[1:1] = reconstruction.recovery_sections(found)
        arrays = {
            f"{name}.{kind}": getattr(outcome.evaluation, kind).astype(np.float32)
            for name, outcome in outcomes.items()
            for kind in ("true", "random")
        }
        write_arrays(folder.path / SAMPLES, arrays)
        summary = Summary(
            **command.shared(folder, hardware.of_mesh(setting.factory.mesh)),
            victims=len(victims.weights),
            examples=setting.examples,
            heads=setting.factory.layout.size,
            shadow_models=setting.shadow_models,
            accuracy=setting.accuracy(victims.weights),
            privacy=shadows.promised(setting.training, setting.examples),
            threshold=victims.threshold,
            attackers=told,
            not_available=self.not_available,
            recovery=found,
            fingerprint=setting.test.fingerprint,
            files={SAMPLES: sha256(folder.path / SAMPLES)},
        )
        reasons = [(name, reason) for name, reason in self.not_available.items()]
        if reasons:
            body.append(page.Section("Not available", page.Table(("attacker", "why"), reasons)))
        report = page.Page(
            "Images out of heads' weights",
            body,
            f"{len(victims.weights)} heads of {setting.examples} images each, which no attacker "
            "has seen."
            + (
                ""
                if summary.accuracy is None
                else f" On other images they are right in {100 * summary.accuracy:.1f} %."
            ),
        )
        ending = page.ending(vars(summary), hardware.describe(), configs.to_yaml(config))
        report.write(folder.path / "report.html", ending)
        return command.finish(folder, summary)

    def _recovery(self, victims: Victims, read: Mapping[str, Recovered]) -> dict[str, Any]:
        """Return how far recovered features are off, and how far they were expected to be."""
        own, prior, labels = read["weights"], self.setting.prior, self.setting.labels
        test = np.asarray(self.setting.test.features)
        classes = np.unique(labels)
        truth = np.stack(
            [test[victims.indices[:, labels == c]].mean(1, dtype=np.float64) for c in classes], 1
        )
        counts = np.bincount(labels)[classes]
        spread = prior.variances[classes].sum(-1) / counts
        measured = np.square(own.means[:, classes] - truth).sum(-1) / spread
        expected = own.mean_variances[:, classes].sum(-1) / spread
        order = np.argsort(expected, axis=None)
        bins = np.array_split(order, min(_BINS, len(order)))
        return {
            "error": float(np.sqrt(measured.mean())),
            "predicted": float(np.sqrt(expected.mean())),
            "believed": float(own.believable.mean()),
            "random_believed": float(read["random"].believable.mean()),
            "misfit": float(np.median(own.misfit)),
            "calibration": [
                {
                    "predicted": float(np.sqrt(expected.ravel()[some].mean())),
                    "measured": float(np.sqrt(measured.ravel()[some].mean())),
                }
                for some in bins
            ],
        }


def unfit(own: Trained, setting: Setting) -> str:
    """Return why a reconstructor cannot attack these heads, "" if it can."""
    origin = own.origin
    layout, width = setting.factory.layout, setting.train.features.shape[1]
    image = setting.images(setting.test).shape[1:]
    makes = (origin.network.size, origin.network.size, origin.network.channels)
    if makes != image:
        return f"it makes images {makes}, these are {image}"
    if origin.input == "features":
        if origin.size != width:
            return f"it takes features of {origin.size}, these have {width}"
        return setting.unrecoverable
    if origin.size != layout.size:
        return f"it takes heads of {origin.size} parameters, these have {layout.size}"
    return ""


def compare(
    chosen: Sequence[study.Run], summaries: Sequence[dict[str, Any]], whole: RunFolder
) -> None:
    """Write the page and the summary of a study."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run, summary in zip(chosen, summaries, strict=True):
        found.setdefault(study.title(run.variant), []).append(summary)
    svg = reconstruction.sweep_curves(found)
    if svg is not None:
        write_atomic(whole.path / "curves.svg", svg)
    body = reconstruction.study_page(found, svg)
    variants = {
        name: {
            "attackers": reconstruction.rates(trials),
            "accuracy": reconstruction.accuracy(trials),
            "epsilon": (trials[0]["privacy"] or {}).get("epsilon"),
        }
        for name, trials in found.items()
    }
    study.finish(whole, chosen, summaries, body, {"variants": variants})


def _say(summary: dict[str, Any]) -> str:
    """Say how many images come back."""
    return "\n".join(say_attackers(summary["attackers"]))


def say_attackers(attackers: Mapping[str, Any]) -> list[str]:
    """Return a line for each attacker of a summary."""
    return [
        f"{name}: TPR {told['tpr_at_fpr']['0.01']:.2f} at FPR 1%, the true image first for "
        f"{100 * told['top1']:.0f}%"
        for name, told in attackers.items()
    ]


COMMAND = command.Command(
    name="attack-heads",
    about=str(__doc__),
    config=Config,
    load=Attack,
    summary=Summary,
    files=(SAMPLES, "pictures/", "curves.svg", "report.html"),
    say=_say,
    compare=compare,
    study=StudySummary,
    less="fewer victims",
)
