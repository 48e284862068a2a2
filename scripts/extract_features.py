"""Extract the deep features of a data set: what shadow models are trained on.

    python scripts/extract_features.py --config configs/features_fashion_mnist.yaml \
        --out out/features/fashion_mnist
    python scripts/extract_features.py --config ... --out ... --batch 64
    python scripts/extract_features.py --config ... --out ... --resume

Every key of the config can be overridden on the command line (`--config F --help` lists them).
A checkpoint is saved every ten seconds, and on Ctrl-C or SIGTERM; --resume goes on after the last
finished batch, to the very same files. A finished run is replaced only with --overwrite.

The output folder holds metrics.csv (mean norm of the features of every batch), the folders train
and test and, last of all, summary.json. Shadow models are made of `train`, the validation set of
`test`. Each of the two holds features.npy (float32), labels.npy, images.npy (bytes; not with
--images-size 0) and features.json (network, classes, shape and sha256 of every file, and their
fingerprint). The summary:

    network           model, weights, classes, name: as in the config
    data              as in the config
    classes           names
    preprocessing     size, mean, std, pixel_range: what makes an image normalised
    device            kind and number of the devices
    features          length of a feature vector
    image             height, width and channels of the images that were kept; null if none were
    images            split -> number of images
    fingerprint       split -> sha256 of all that its folder holds
    seconds           from start to finish, of all sessions of a resumed run
    seconds_per_step  of a batch, without compilation and writing
    compile_seconds   spent compiling
    versions          of python, jax, jaxlib, flax and jinv

`jinv.shadow.features.load(FOLDER/train)` reads a folder.

On several hosts start the same command on each: SLURM (srun), Open MPI (mpirun) and Kubernetes are
recognised, else pass --coordinator HOST:PORT --processes N --process-id I. The folder must be on a
disk that all of them see; process 0 writes.

Exit codes: 0 done; 2 a mistake in what was asked for; 4 out of memory or another failure of the
device; 130 or 143 stopped and resumable.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jinv import parallel
from jinv.recipes.extract_features import Recipe, prepare
from jinv.runs import command_line


def say(summary: dict[str, Any]) -> str:
    """The main point of a run."""
    return f"{sum(summary['images'].values())} x {summary['features']} features"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    less = "--batch with fewer images"
    return command_line.main_single(Recipe, prepare, say, str(__doc__), arguments, less)


if __name__ == "__main__":
    parallel.enable_compilation_cache()
    sys.exit(main())
