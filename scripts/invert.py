"""Invert trained networks into images of given classes: DeepInversion, alone or in ensembles.

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
    placement         in words, what the devices share
    steps             steps done
    images            number of images
    targets           class of each image; empty if no network's label term has a weight
    seconds           from start to finish, of all sessions of a resumed run
    seconds_per_step  without compilation
    compile_seconds   spent compiling
    loss              of the best images, in the last phase
    terms             raw value of every term of the objective at the last step
    top1              network -> fraction of the images it gives their target class
    confidence        network -> mean probability of the target class
    mean_probability  network -> mean probability of the classes it gives
    agreement         share of images for which two judges that had no say name the same class,
                      over all pairs of judges; null without a pair
    diversity         mean distance of two images of a class: "pixels" (root mean square, pixels in
                      [0, 1]), network -> cosine distance of its features; null without two such
    files             sha256 of every image file, by name
    versions          of python, jax, jaxlib, flax and jinv

A config with `variants` (name -> the keys that are different) or with `trials` above 1 makes
several runs, each in a folder of its own with all of the above, and a page that compares them. The
summary.json above them holds

    runs              folder -> that run's summary
    variants          name -> {inverted, trials, top1 (mean over trials), seconds}
    held_out          networks that were inverted in no run
    seconds           of all runs

On several hosts start the same command on each: SLURM (srun), Open MPI (mpirun) and Kubernetes are
recognised, else pass --coordinator HOST:PORT --processes N --process-id I. The folder must be on a
disk that all of them see; process 0 writes.

Exit codes: 0 done; 2 a mistake in what was asked for; 3 a loss that is not finite; 4 out of
memory or another failure of the device; 130 or 143 stopped and resumable.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jinv import command, parallel, session, study
from jinv import config as configs
from jinv.inversion import Recipe, prepare, recipe_from


def parse(
    arguments: Sequence[str] | None = None,
) -> tuple[Recipe, dict[str, Any], argparse.Namespace]:
    """Command line -> (recipe with overrides, its variants, the command's own flags)."""
    args, rest = command.flags(str(__doc__), arguments)
    tree = configs.read_yaml(args.config)
    variants = tree.pop("variants", None) or {}
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise configs.ConfigError("variants must map names to the keys that are different")
    recipe = command.override(recipe_from(tree), args, rest)
    return recipe, {str(name): changes for name, changes in variants.items()}, args


def invert(recipe: Recipe, variants: dict[str, Any], args: argparse.Namespace) -> None:
    """One run, or a study of several."""
    chosen = study.runs(recipe, variants)
    for each in chosen:  # a mistake in any stops all before anything is computed
        inversion = prepare(each.recipe)
    tree = configs.plain(recipe) | ({"variants": variants} if variants else {})
    how = {"resume": args.resume, "overwrite": args.overwrite}
    run = session.Session(args.out, tree, recipe.run, **how)
    if run.finished:
        parallel.say(f"{args.out} holds this run, finished: nothing to do")
        return
    if chosen[0].folder:
        study.execute(chosen, run, **how)
        parallel.say(f"{args.out / 'report.html'} written")
        return
    summary = inversion.run(run)
    for name, share in summary.get("top1", {}).items():
        parallel.say(f"{name} gives {100 * share:.0f}% of the images their class")
    parallel.say(f"{args.out / 'report.html'} written after {run.seconds:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def everything() -> None:
        recipe, variants, args = parse(arguments)
        parallel.start(args.coordinator, args.processes, args.process_id)
        invert(recipe, variants, args)

    less = "--execution.images-at-once, --execution.networks-at-once 1, fewer images"
    return command.run(everything, less)


if __name__ == "__main__":
    parallel.enable_compilation_cache()
    sys.exit(main())
