"""Invert a client's gradient or weight update into its images: GradInversion and its relatives.

    python scripts/invert_gradients.py --config configs/gradients_small.yaml --out out/small
    python scripts/invert_gradients.py --config configs/gradients_mobilenet_v2.yaml --out out/m2 \
        --attack.steps 2000
    python scripts/invert_gradients.py --config configs/gradients_defences.yaml --out out/sweep

A config names the network, and either a `client` to simulate (its images, mode, local steps and
defence) or the `evidence` of a real one: FILE.safetensors, with the gradient under torch's names,
and FILE.json (see `jinv.federated.evidence.save`). Every key can be overridden on the command line
(`--config F --help` lists them). Ctrl-C or SIGTERM saves a checkpoint; --resume goes on to the
very same images. A finished run is replaced only with --overwrite.

The output folder holds images/NNN_reconstruction.png, grid.png (original, reconstruction, BN only,
from top to bottom), curves.svg, report.html, metrics.csv, scores.csv (PSNR on the way),
progress/*.png, bn_only/ (the same attack without the gradient, where BatchNorm statistics are
known) and, last of all, summary.json:

    model             the network's name
    device            kind and number of the devices
    evidence          images, training (victim's mode), statistics (what is known of BatchNorm:
                      none, running, exact, update), local_steps, defence (in words), epsilon and
                      delta of its noise (client-level, one round); null where they do not apply
    steps, seeds      done; at once
    seconds           of the attack, all sessions of a resumed run, without the BN-only run
    seconds_per_step  without compilation
    compile_seconds   spent compiling
    loss              of the seed that is shown
    distance          of gradients, of the seed that is shown: the least of
    distances         every seed's
    chosen_seed       which it is
    terms             raw value of every term of the objective at the last step
    labels            method, restored, and with a known truth: truth, accuracy (share of labels
                      right with multiplicity), precision, recall (of classes), exact (0 or 1)
    label_methods     every method on the same evidence: the same keys, or not_available: reason
    scores            psnr [dB], ssim, lpips, fft_2d (means over images), iip (share of images that
                      are their reconstruction's nearest among all of the client's and the
                      distractors); null where nothing is known to score against
    bn_only           the same of the attack without the gradient; null without such
    per_image         the same before averaging, in the originals' order
    not_available     score -> why it is null
    files             sha256 of every image file, by name
    versions          of python, jax, jaxlib, flax and jinv

A config with `variants` (name -> the keys that are different) or with `trials` above 1 makes
several runs, each in a folder of its own with all of the above, and a page that compares them;
variants called "NAME NUMBER" are points of a curve NAME. The summary.json above them holds

    runs              folder -> that run's summary
    variants          name -> {trials, psnr, ssim, iip, labels (accuracy): means over trials,
                      epsilon}
    seconds           of all runs

Exit codes: 0 done; 2 a mistake in what was asked for; 3 a loss that is not finite; 4 out of
memory or another failure of the device; 130 or 143 stopped and resumable.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jinv import parallel
from jinv.recipes import invert_gradients
from jinv.reports import gradients_study
from jinv.runs import command_line


def say(summary: dict[str, Any]) -> None:
    """How near the images came."""
    scores = summary["scores"]
    if scores is not None:
        parallel.say(f"PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.2f}")


LEAKS = command_line.Kind(
    invert_gradients.recipe_from, invert_gradients.prepare, gradients_study.write, say
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    less = "--execution.seeds-at-once 1, --execution.images-at-once 1"
    return command_line.main(LEAKS, str(__doc__), arguments, less)


if __name__ == "__main__":
    parallel.enable_compilation_cache()
    sys.exit(main())
