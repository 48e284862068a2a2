"""Invert trained networks into images of given classes: DeepInversion.

    python scripts/invert.py --config configs/demo.yaml --out out/demo
    python scripts/invert.py --config configs/deepinversion_resnet50.yaml --out out/r50 \
        --networks.0.weights resnet50-0676ba61.pth --seed 1
    python scripts/invert.py --config configs/demo.yaml --out out/demo --resume

Every key of the config can be overridden on the command line (`--config F --help` lists them).
Ctrl-C or SIGTERM saves a checkpoint; --resume goes on to the very same images. A finished run is
replaced only with --overwrite.

The output folder holds images/NNN_classCCC_NAME.png, grid.png, curves.svg, report.html,
metrics.csv, scores.csv, progress/*.png and, last of all, summary.json:

    model             names of the inverted networks, joined by "+"
    device            kind and number of the devices
    steps             steps done
    images            number of images
    targets           class of each image
    seconds           from start to finish, of all sessions of a resumed run
    seconds_per_step  without compilation
    compile_seconds   spent compiling
    loss              of the best images, in the last phase
    terms             raw value of every term of the objective at the last step
    top1              network -> fraction of the images it gives their target class
    mean_probability  network -> mean probability of the classes it gives
    files             sha256 of every image file, by name
    versions          of python, jax, jaxlib, flax and jinv

Exit codes: 0 done; 2 a mistake in what was asked for; 3 a loss that is not finite; 130 or 143
stopped and resumable.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jinv import config as configs
from jinv import (
    curves,
    data,
    hardware,
    image,
    metrics,
    models,
    optimise,
    parallel,
    report,
    session,
)
from jinv.attacks import deepinversion
from jinv.files import write_atomic
from jinv.net import Net
from jinv.objective import Member, Weights

VERSIONS = ("python", "jax", "jaxlib", "flax", "jinv")


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and where its weights are.

    Attributes:
      model: name in the registry.
      name: in logs and reports, if not the model's: two networks of one architecture need two.
      weights: a .pth or .safetensors file, "package" for weights inside an installed package, or
        "random".
      classes: number of classes, if not the usual one.
    """

    model: str
    weights: str = "package"
    classes: int | None = None
    name: str | None = None

    @property
    def label(self) -> str:
        """Its name in logs and reports."""
        return self.name or self.model

    def load(self) -> Net:
        """Read the weights."""
        weights = None if self.weights == "random" else self.weights
        net = models.load(self.model, weights, classes=self.classes)
        return dataclasses.replace(net, name=self.label)


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
      labels: "hand-picked" ImageNet classes, "random" ones, or a list; repeated as needed.
      size: of the images, one side or height and width; the first network's by default.
      gray: optimise gray images.
      class_names: a text file with one name a line, for networks of other classes.
      seed: of everything random.
      compute_dtype: of the networks' arithmetic; losses and moments stay float32.
      attack: the mathematics. In a file it may begin with `preset: NAME`.
      run: how it goes, without influence on the result.
    """

    networks: tuple[Inverted, ...]
    judges: tuple[Network, ...] = ()
    competitor: Network | None = None
    images: int = 8
    labels: Literal["hand-picked", "random"] | tuple[int, ...] = "hand-picked"
    size: int | tuple[int, int] | None = None
    gray: bool = False
    class_names: str | None = None
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    attack: deepinversion.Config = dataclasses.field(default_factory=deepinversion.Config)
    run: session.Options = dataclasses.field(default_factory=session.Options)


def read_recipe(path: Path) -> Recipe:
    """The config file as a `Recipe`, its preset applied."""
    tree = configs.read_yaml(path)
    attack = tree.get("attack")
    if isinstance(attack, dict) and "preset" in attack:
        attack = dict(attack)
        preset = attack.pop("preset")
        if preset not in deepinversion.PRESETS:
            raise configs.ConfigError(
                f"no preset is called {preset!r}; there are: {', '.join(deepinversion.PRESETS)}"
            )
        tree = {**tree, "attack": {**configs.plain(deepinversion.PRESETS[preset]), **attack}}
    return configs.build(Recipe, tree)


def parse(arguments: Sequence[str] | None = None) -> tuple[Recipe, argparse.Namespace]:
    """Command line -> (recipe with overrides, the script's own flags)."""
    import tyro

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("--config", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    args, rest = parser.parse_known_args(arguments)
    wants_help = {"-h", "--help"} & set(rest)
    if args.config is None:
        parser.print_help()
        sys.exit(0 if wants_help else 2)
    if args.out is None and not wants_help:
        parser.error("--out FOLDER is missing")
    recipe = read_recipe(args.config)
    recipe = tyro.cli(
        Recipe,
        default=recipe,
        args=rest,
        prog=f"invert.py --config {args.config} --out FOLDER",
        description="Overrides of the config.",
        config=(tyro.conf.AvoidSubcommands,),
    )
    return recipe, args


class Inversion:
    """A recipe with its networks loaded: everything that can be wrong with it has been found."""

    def __init__(self, recipe: Recipe) -> None:
        if not recipe.networks:
            raise ValueError("the config names no network to invert")
        if recipe.images < 1:
            raise ValueError(f"at least one image is needed, not {recipe.images}")
        self.recipe = recipe
        self.mesh = parallel.batch_mesh(recipe.images, recipe.run.devices)
        self.members = [Member(network.load(), network.terms) for network in recipe.networks]
        first = self.members[0].net
        self.judges = {net.name: metrics.make_judge(net) for net in self._distinct_nets()}
        self.names = data.class_names(first.classes, recipe.class_names)
        self.key, label_key, self.noise_key = jax.random.split(jax.random.key(recipe.seed), 3)
        self.targets = deepinversion.choose_targets(
            recipe.labels, recipe.images, first.classes, label_key
        )
        space = first.preprocessing
        self.attack = deepinversion.build(
            recipe.attack,
            self.members,
            self.targets,
            size=recipe.size,
            space=space.gray() if recipe.gray else space,
            competitor=recipe.competitor.load() if recipe.competitor else None,
            compute_dtype=recipe.compute_dtype,
        )

    def _distinct_nets(self) -> list[Net]:
        """The inverted networks and the judges; a judge that is inverted too counts once."""
        inverted = [member.net for member in self.members]
        given = {network.label for network in self.recipe.networks}
        nets = inverted + [j.load() for j in self.recipe.judges if j.label not in given]
        names = [net.name for net in nets]
        if len(set(names)) < len(names):
            raise ValueError(f"two networks have one name; give them names: {', '.join(names)}")
        return nets

    def run(self, run: session.Session) -> optimise.State:
        """Optimise; a loss that is not finite leaves the best images before it in the folder."""
        fixed = deepinversion.Data(
            parallel.replicate(self.mesh, self.attack.data.members),
            parallel.replicate(self.mesh, self.attack.data.competitor),
            parallel.shard(self.mesh, self.attack.data.targets),
        )
        try:
            return run.run(
                self.attack.phases,
                self.key,
                parallel.shard(self.mesh, self.attack.initial(self.noise_key)),
                fixed,
                pictures=lambda images: report.png(image.grid(self.pixels(images))),
                score=self.score,
            )
        except optimise.NonFiniteError:
            if run.state is not None:
                self.write_images(run.folder, self.pixels(run.state.best_images))
            raise

    def pixels(self, images: jax.Array) -> np.ndarray:
        """Images as bytes: what is saved, and what judges see."""
        return image.to_bytes(image.denormalise(images, self.attack.space))

    def predict(self, pixels: np.ndarray) -> dict[str, metrics.Prediction]:
        """What each judge says."""
        seen = pixels / np.float32(255)
        return {name: judge(seen) for name, judge in self.judges.items()}

    def score(self, images: jax.Array) -> dict[str, float]:
        """Each judge's top-1."""
        predictions = self.predict(self.pixels(images))
        return {name: metrics.top1(p, self.targets) for name, p in predictions.items()}

    def write_images(self, out: Path, pixels: np.ndarray) -> dict[str, str]:
        """One PNG an image, and the grid; returns the images' sha256 by file name."""
        (out / "images").mkdir(exist_ok=True)
        files = {}
        for i, (picture, target) in enumerate(zip(pixels, self.targets, strict=True)):
            slug = re.sub(r"[^a-z0-9]+", "-", self.names[target].lower()).strip("-")[:40]
            file = f"images/{i:03d}_class{target:03d}_{slug}.png"
            encoded = report.png(picture)
            write_atomic(out / file, encoded)
            files[file] = hashlib.sha256(encoded).hexdigest()
        report.write_png(out / "grid.png", image.grid(pixels))
        return files


def write_results(
    inversion: Inversion, run: session.Session, state: optimise.State
) -> dict[str, Any]:
    """Images, grid, curves, report; the summary last."""
    recipe, targets, names = inversion.recipe, inversion.targets, inversion.names
    pixels = inversion.pixels(state.best_images)
    files = inversion.write_images(run.folder, pixels)
    predictions = inversion.predict(pixels)
    terms = [name for name in run.metrics.columns() if name not in ("step", "phase")]
    machine = hardware.describe()
    run.scores.add(step=len(run.metrics.rows), **inversion.score(state.best_images))
    run.scores.save()
    summary = {
        "model": "+".join(member.net.name for member in inversion.members),
        "device": f"{inversion.mesh.size} x {inversion.mesh.devices.flat[0].device_kind}",
        "steps": len(run.metrics.rows),
        "images": recipe.images,
        "targets": targets,
        "seconds": round(run.seconds, 3),
        "seconds_per_step": round(run.clock.stepping / max(run.clock.steps, 1), 6),
        "compile_seconds": round(run.clock.compiling, 3),
        "loss": float(state.best_loss),
        "terms": {name: run.metrics.column(name)[-1] for name in terms if name != "loss"},
        "top1": {name: metrics.top1(p, targets) for name, p in predictions.items()},
        "mean_probability": {name: float(p.probability.mean()) for name, p in predictions.items()},
        "files": files,
        "versions": {name: machine[name] for name in VERSIONS},
    }
    svg = curves.plot(
        {name: run.metrics.column(name) for name in terms},
        [int(step) for step in run.metrics.column("step")],
        boundaries=_boundaries(run.metrics),
    )
    write_atomic(run.folder / "curves.svg", svg)
    pictures = [
        report.Picture(
            pixels[i],
            names[target],
            file,
            tuple(
                report.Verdict(
                    name,
                    names[p.index[i]] if p.index[i] < len(names) else f"class {p.index[i]}",
                    int(p.index[i]),
                    float(p.probability[i]),
                    bool(p.index[i] == target),
                )
                for name, p in predictions.items()
            ),
        )
        for i, (target, file) in enumerate(zip(targets, files, strict=True))
    ]
    timing = {
        "seconds": f"{summary['seconds']:.1f}",
        "seconds a step": f"{summary['seconds_per_step']:.4f}",
        "seconds compiling": f"{summary['compile_seconds']:.1f}",
    }
    report.write_html(
        run.folder / "report.html",
        f"What {summary['model']} has learned",
        [
            report.Section("Images", report.Pictures(tuple(pictures))),
            report.Section(
                "Judges",
                report.Table(
                    ("network", "gives the target class", "mean probability"),
                    tuple(
                        (
                            name + (" (inverted)" if i < len(inversion.members) else ""),
                            f"{100 * metrics.top1(p, targets):.0f}%",
                            f"{p.probability.mean():.2f}",
                        )
                        for i, (name, p) in enumerate(predictions.items())
                    ),
                ),
                "Networks that had no say in the optimisation are the test.",
            ),
            report.Section(
                "Curves", report.Figure(svg, "Every term of the objective at every step")
            ),
            report.Section(
                "Hardware and time",
                report.Table(("", "value"), tuple((machine | timing).items())),
            ),
            report.Section("Config", report.Text(configs.to_yaml(recipe))),
        ],
        lead=f"{recipe.images} images, {summary['steps']} steps, from the weights and BatchNorm "
        "statistics alone: no data was read.",
    )
    run.finish(summary)
    return summary


def _boundaries(log: session.Log) -> list[int]:
    """Steps at which a new phase began."""
    phases = [row["phase"] for row in log.rows]
    return [log.rows[i]["step"] for i in range(1, len(phases)) if phases[i] != phases[i - 1]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        recipe, args = parse(arguments)
        inversion = Inversion(recipe)
        run = session.Session(
            args.out,
            configs.plain(recipe),
            recipe.run,
            resume=args.resume,
            overwrite=args.overwrite,
        )
        if run.finished:
            print(f"{args.out} holds this run, finished: nothing to do")
            return 0
        summary = write_results(inversion, run, inversion.run(run))
    except session.Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    except optimise.NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except (ValueError, OSError, ImportError, session.SessionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, share in summary["top1"].items():
        print(f"{name} gives {100 * share:.0f}% of the images their class")
    print(f"{args.out / 'report.html'} written after {summary['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    parallel.enable_compilation_cache()
    sys.exit(main())
