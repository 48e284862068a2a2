"""Train shadow models by the million: small heads on frozen features, each on a few examples.

    python scripts/train_shadow_models.py --config configs/shadow_fashion_mnist.yaml \
        --out out/shadows/fashion_mnist
    python scripts/train_shadow_models.py --config ... --out ... --plan
    python scripts/train_shadow_models.py --config ... --out ... --resume --seeds 100
    python scripts/train_shadow_models.py --config ... --out none

The config names a folder of features (scripts/extract_features.py), the training sets and the
training; every key can be overridden on the command line (`--config F --help` lists them). A seed
permutes the data and cuts it into training sets: seed and position name a model and its examples.
`jinv.shadow.store.Store(FOLDER)` reads the models.

--plan          tells how many models, bytes and seconds all of it takes, and stops
--resume        makes the seeds that are missing: after Ctrl-C, SIGTERM or a crash, the very same
                models; and with more --seeds than there are, the new ones
--overwrite     replaces an earlier run
--part I/N      makes every N-th seed from seed I on, into a folder that N processes share; the one
                that completes it writes statistics and summary. Without it the task of a SLURM
                array, or the process of `jax.distributed`, is such a part
--verify        reads everything in the folder, and names what is damaged
--regenerate S  makes seed S again, with --resume
--out none      keeps nothing: the summary is printed. `store: false` in the config keeps summary
                and statistics

The output folder holds shadows.json (what the models are), config.yaml, the Zarr arrays weights,
loss and attempts, statistics.npz (count, mean, std, covariance) and, last of all, summary.json:

    models, seeds, sets       how many; sets a seed
    examples                  in a training set
    parameters                P, of a model
    layout                    [name, shape] of its parameters, in the order of its P numbers
    dtype, stored             of the weights; whether they were kept
    path, path_reason         row_space or ordinary; why not row_space
    fingerprint               of the features
    privacy                   noise_multiplier, l2_norm_clip, sampling, steps, delta, epsilon (null
                              without noise); or null
    diverged                  models whose loss is no number; statistics leave them out
    loss                      mean, std, max over models, on their training sets
    restarts                  mean, most: trainings of a model; failed: models whose loss stayed too
                              high; or null
    validation                models, images; mean, std, max of the models' accuracy on the other
                              split; or not_available: why
    statistics                file, covariance (whether it is there), zero_variance (coordinates
                              that are the same in all models); or null
    bytes                     of all weights
    session                   models, seconds, models_per_second: of the process that wrote this,
                              since its last start, statistics excluded
    device                    kind and number of the devices
    versions                  of python, jax, jaxlib and jinv

Exit codes: 0 done; 2 a mistake in what was asked for, or damage found; 4 out of memory or another
failure of the device; 130 or 143 stopped, and resumable if models are stored.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jinv import parallel
from jinv.recipes.train_shadow_models import Part, Production, Recipe
from jinv.runs import command_line
from jinv.runs import config as configs
from jinv.shadow import store


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of this command alone."""
    parser.add_argument("--plan", action="store_true", help="tell what is to come, and stop")
    parser.add_argument("--part", metavar="I/N", help="every N-th seed from seed I on")
    parser.add_argument("--verify", action="store_true", help="read all, and name what is damaged")
    parser.add_argument("--regenerate", type=int, metavar="S", help="make seed S again")


def verify(folder: Path) -> None:
    """Say that everything is sound, or ValueError with what is not."""
    found = store.Store(folder)
    damaged, missing = found.damaged(), found.missing()
    if damaged:
        raise ValueError("\n".join(damaged.values()))
    parallel.say(f"{folder}: sound, {len(missing)} of {found.metadata.seeds} seeds are missing")


def plan(production: Production, folder: Path | None, seeds: int | None = None) -> None:
    """Print what is to come."""
    found = production.plan(folder, seeds)
    kept = "nothing is kept"
    if production.recipe.store and folder:
        kept = (
            f"{found['bytes'] / 1e9:.2f} GB to write, {found['free_bytes'] / 1e9:.0f} GB are free"
        )
    parallel.say(
        f"{found['models']} models of {found['parameters']} parameters, {found['examples']} "
        f"examples each, {found['path']} path, {found['chunk']} at once\n"
        f"about {found['seconds']:.0f} s at {found['models_per_second']:.0f} models a second; "
        f"{kept}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def everything() -> None:
        args, rest = command_line.flags(str(__doc__), arguments, add_flags)
        folder = None if str(args.out) == "none" else args.out
        if args.verify:
            return verify(args.out)
        tree = configs.read_yaml(args.config)
        recipe = command_line.override(configs.build(Recipe, tree), args, rest)
        parallel.start(args.coordinator, args.processes, args.process_id)
        part = Part.read(args.part)
        if folder is None:
            recipe = dataclasses.replace(recipe, store=False)
        if part.count > 1 and (not recipe.store or args.overwrite):
            raise ValueError(
                "several parts share a folder: they need a store, and none may overwrite it"
            )
        production = Production(recipe)
        if args.plan:
            return plan(production, folder)
        if folder is None:
            plan(production, None)
            return parallel.say(json.dumps(production.pass_by(None), indent=2))
        again = args.regenerate
        resume = args.resume or part.count > 1 or again is not None
        if again is not None and (not recipe.store or again % part.count != part.index):
            again = None  # another part's, or there is nothing to make again
        target = production.claim(folder, resume=resume, overwrite=args.overwrite, again=again)
        if target is None:
            return parallel.say(f"{folder} holds these models, finished: nothing to do")
        if recipe.store:
            plan(production, folder, len(production.missing(target, part)))
            done = production.fill(target, part)
            if left := target.missing():
                return parallel.say(f"{folder}: {len(left)} seeds are left to other parts")
            summary = production.finish(target, done)
        else:
            plan(production, folder)
            summary = production.pass_by(folder)
        made = summary["session"]
        parallel.say(
            f"{folder}: {summary['models']} models, {made['models']} of them now in "
            f"{made['seconds']:.0f} s"
        )
        return None

    return command_line.run(everything, "--execution.chunk with fewer models")


if __name__ == "__main__":
    parallel.enable_compilation_cache()
    sys.exit(main())
