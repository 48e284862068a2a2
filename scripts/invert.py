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

import sys
from collections.abc import Sequence
from typing import Any

from jinv import parallel
from jinv.recipes import invert
from jinv.reports import inversion_study
from jinv.runs import command_line


def say(summary: dict[str, Any]) -> None:
    """What judges think of the images."""
    for name, share in summary.get("top1", {}).items():
        parallel.say(f"{name} gives {100 * share:.0f}% of the images their class")


INVERSIONS = command_line.Kind(invert.recipe_from, invert.prepare, inversion_study.write, say)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    less = "--execution.images-at-once, --execution.networks-at-once 1, fewer images"
    return command_line.main(INVERSIONS, str(__doc__), arguments, less)


if __name__ == "__main__":
    parallel.enable_compilation_cache()
    sys.exit(main())
