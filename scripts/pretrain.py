"""Train a network of the zoo on labelled images: a victim to attack.

    python scripts/pretrain.py --config configs/pretrain_resnet18_fashion_mnist.yaml \
        --out out/victims/resnet18_slim
    python scripts/pretrain.py --config ... --out ... --training.epochs 5 --seed 1
    python scripts/pretrain.py --config ... --out ... --resume

Every key of the config can be overridden on the command line (`--config F --help` lists them).
With `weights` in the config the network begins with them and gets a new last layer; with `head`
this layer is trained alone first, and `training.learns: all_but_batch_norm` leaves BatchNorm as it
was (configs/pretrain_efficientnet_b0_cifar100.yaml).

A checkpoint is saved after every epoch, and on Ctrl-C or SIGTERM; --resume goes on to the very same
weights. A finished run is replaced only with --overwrite.

The output folder holds weights.safetensors (PyTorch's names and layouts), classes.txt (a name a
line), curves.svg, metrics.csv (loss and accuracy of every batch), scores.csv (test accuracy after
every epoch) and, last of all, summary.json:

    model             name of the network in the zoo
    weights           what it began with; this and the next only if it began with some
    head_epochs       done with the last layer alone
    data              as in the config
    classes           names
    preprocessing     size, mean, std, pixel_range: what makes an image normalised; the mean and
                      deviation of the training images, or what the given weights want
    device            kind and number of the devices
    epochs            done, without those of the head
    steps             done, of both
    images            number of training images
    test_images       number of test images
    test_accuracy     share of the test images that are given their class; where labels are
                      attributes, share of these that is right
    train_accuracy    the same of the training images, augmented, during the last epoch
    train_loss        mean cross-entropy during the last epoch
    seconds           from start to finish, of all sessions of a resumed run
    seconds_per_step  without compilation
    compile_seconds   spent compiling
    files             sha256 of weights.safetensors and classes.txt
    versions          of python, jax, jaxlib, flax and jinv

`jinv.models.load_trained(FOLDER)` makes a `Net` of it.

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
from jinv.recipes.pretrain import Recipe, prepare
from jinv.runs import command_line


def say(summary: dict[str, Any]) -> str:
    """The main point of a run."""
    return f"test accuracy {summary['test_accuracy']:.4f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    less = "--training.batch with fewer images"
    return command_line.main_single(Recipe, prepare, say, str(__doc__), arguments, less)


if __name__ == "__main__":
    parallel.enable_compilation_cache()
    sys.exit(main())
