"""Measure jinv against what people run today.

    python scripts/benchmark.py inversion --out inversion.json
    python scripts/benchmark.py inversion --out one.json --cases mobilenet_v2 --repeats 15
    python scripts/benchmark.py inversion --out two.json --cases resnet50 84x224 bfloat16 \\
        --peers pytorch_frozen pytorch_channels_last
    python scripts/benchmark.py ensemble --out ensemble.json
    python scripts/benchmark.py gradients --out gradients.json
    python scripts/benchmark.py shadow --out shadow.json
    python scripts/benchmark.py reconstructor --out reconstructor.json
    python scripts/benchmark.py distillation --out distillation.json
    python scripts/benchmark.py models --out models.json
    python scripts/benchmark.py models --out one.json --networks densenet121 vgg16
    python scripts/benchmark.py labels --out labels.json --repeats 12

`inversion` times one DeepInversion step: frozen network, BatchNorm prior, cross-entropy, TV_2 and
L2 priors, jitter and flip, Adam, clipping. Ours is the step that `jinv.optimise.run` runs. Peers,
all with the same weights:

    pytorch_frozen     eager, weights that want no gradient, moments by `torch.var_mean`
    pytorch_published  eager, as the published code: it also computes the weights' gradients
    pytorch_channels_last   the frozen one with images and weights so laid; on GPU only
    pytorch_compiled   `torch.compile` of that, which takes a minute; on GPU only

`--peers` chooses some of them. Before timing, both sides must give the same terms of the loss and
the same gradient of the images: on CPU in float64, to 1e-6; on GPU as they will be timed, where
rounding turns the gradient by up to 0.3 in bfloat16 and 0.1 in TF32, but terms and norm agree to
0.02 and 0.005. A GPU adds ResNet-50 and MobileNetV2 on 84 images of 224 px, in bfloat16 and
float32.

`ensemble` times one such step of several networks jointly, against the first two and against

    single_steps       the sum of our steps for each network alone
    networks_at_once=None, images_at_once=2   more memory and less; these rows have ours_mib and
                       peer_mib, what XLA plans for a step beside its arguments
    one_device, data_parallel   the other placements; ours has a network on each device. Only where
                       there are several, such as JAX_NUM_CPU_DEVICES=2

`gradients` times one step of gradient inversion: gradient of the weights, its distance to the one
that was sent, BatchNorm prior, TV and L2 priors, the gradient of all that with respect to the
images, Adam, noise, clipping. Networks in evaluation mode; the same gradient, labels and initial
images for all. Peers:

    breaching          the package, 0.1.2, CPU or GPU as JAX: its own closure, optimiser and
                       schedule, its configurations `seethroughgradients` (GradInversion) and
                       `invertinggradients`. Left out with a hint where it is not installed
    pytorch            our objective in eager PyTorch, as lean as one can write it
    single_seeds       only for several seeds: ours, one seed after the other
    gradients=formed, images_at_once, seeds_at_once
                       cases called "lean": ours with less memory, or with all gradients formed;
                       with ours_mib and peer_mib as above, times of all seeds

Of several seeds at once times are of one. PyTorch's take their steps one after the other, each with
a network of its own, as breaching's restarts do (in its restarts every trial adds its hooks once
more to the same network; here it does not have to carry that). No group prior: breaching has none.
Before timing, all must give the same distance and the same gradient of it in float64: breaching's
without priors (its TV and L2 are other means), PyTorch's with them. Where a case says so, the row
of breaching has psnr_ours and psnr_peer: mean PSNR in dB of four photographs after equally many
steps from the same noise, of the images with the lowest loss; breaching by its `reconstruct`.

`shadow` times whole shadow models (ours_s, peer_s: seconds a model): linear heads in the paper's
settings for CIFAR (D = 1280) and MNIST (D = 256), from features in memory to weights in the host's
memory. Rounds last half a second a side. Peers:

    pytorch_loop       the usual way: one model at a time, DataLoader, autograd, SGD
    pytorch_batched    many models at once: batched products, gradients by hand, in place, as many
                       models at once as is fastest here
    opacus             for DP-SGD: one model at a time, as its users write it, as many steps as ours

Before timing, all must train the same weights from the same start in float64 (DP-SGD without its
noise): weight_difference, relative to how far training moves them, at most 1e-5. floor_s is
the time to write a model's weights at this machine's copying speed, floor_share its part of ours_s.
Two more tables (`--cases numbers`, `--cases memory`) have rows of their own: generator, nanoseconds
a normal number, quartiles; and models, peak_mib, seconds of a process that streams them. A third
comes only when asked for (`--cases delivery`): device_s, host_s and store_s, seconds a model that
stays on the device, comes to the host, or goes to a store in the folder for temporary files.

`reconstructor` times one training step of the published reconstructor on 32 shadow models in
memory, N = 10 (MNIST: 2570 weights, G 256; CIFAR: 12810 weights, G 512): gather and normalise,
forward, 0.5 (MSE + MAE) to the image of a class drawn, backward, Adam, running statistics. Peers,
from the same parameters:

    pytorch            eager, as published: a transposed convolution of one pixel, then blocks that
                       upsample and convolve
    pytorch_channels_last   with images and weights so laid, and a matrix product instead of the
                       transposed convolution, for which CPUs have no good kernel
    pytorch_compiled   `torch.compile` of that, and fused Adam; on GPU only

`--peers` chooses some of them. They take turns with us one after the other, since two of CIFAR's
fill the memory; on CPU a round of CIFAR is one step. Before timing, both sides must give the same
loss and the same gradient of all parameters, as in `inversion`. A GPU adds bfloat16.

`distillation` times the two halves of condensing a data set; rows have ours_images_per_s and
peer_images_per_s as well. First a step of recovery, on 100 images: DeepInversion with the presets
of condensation, for CIFAR (images rolled and mirrored) and for ImageNet (a random part of them,
enlarged), as `jinv synthesise` takes it. Peers, eager, with weights that want no gradient, as in
SRe2L's own code:

    pytorch_frozen     moments by `torch.var_mean`; the loss is not read
    pytorch_published  moments as published; every step reads its loss and may copy the images

Second a step of a student, on 128 images in memory: random parts, mirrored, CutMix, the teacher's
logits of these views, KL at T = 20, AdamW; as `jinv train-student` takes it. Peers, eager, from the
same weights:

    pytorch_batched    parts of all images at once, by two batched products
    pytorch_transforms torchvision's RandomResizedCrop and RandomHorizontalFlip image after image,
                       as users write it, but without a DataLoader, whose processes would want cores

Before timing, all must give the same loss and the same gradient for the same part, shift and
mirroring, or for the same view: on CPU in float64 on 16 images, to 1e-6; on GPU as in `inversion`.

`models` times networks themselves, one of every family of classifiers: 4 images of 112 px (MaxViT:
224) to logits, and to the gradient of cross-entropy and BatchNorm prior at the images; two rows
each. `--networks` chooses others of the zoo. The peer is eager PyTorch, forward in inference mode,
backward with weights that want no gradient. Before timing, the programs that are timed must give
the same logits, terms and gradient. Rows also have trace_s and compile_s: seconds until XLA has our
program, and until it is compiled, without XLA's cache.

`labels` times nothing: it counts which labels every method restores from gradients of trained
networks, over `--repeats` batches. MobileNetV2 and EfficientNet-Lite0 get random crops of
photographs, whose classes are what the network says of them; a ResNet-18 trained by
`configs/pretrain_resnet18_fashion_mnist.yaml` gets FashionMNIST's test images. Its rows hold case,
method, batches, and means of accuracy, precision, recall and exact
(`jinv.federated.labels.scores`).

In the others, rounds (of `--steps` steps) take turns; rounds in which other processes used the
machine are repeated (up to three times as many), and the quietest count. The JSON file holds

    machine    processor, cores, device, environment variables that matter
    versions   of Python and the packages
    rows       but for `labels`, for every case and peer:
      case, peer, device
      ours_s, peer_s      median seconds a step, or a model
      ratio               median over rounds of peer_s / ours_s: above 1, jinv is faster
      ours_quartiles_s, peer_quartiles_s, ratio_quartiles
      n                   rounds
      others              cores that other processes kept busy, median over rounds
      loss_difference     of the term of the loss that differs most between the sides, before
                          timing, relative (`ensemble`: the whole loss, in float32, of
                          pytorch_frozen)
      norm_difference     of the gradients' norms, relative; not `ensemble`
      direction_difference   length of the difference of the gradients at length 1; likewise
      psnr_ours, psnr_peer   `gradients` only

and the rows are printed as a table. torch and torchvision are needed, and scikit-image by
`gradients`: `pip install torch torchvision scikit-image`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import (
    distillation,
    ensemble,
    gradients,
    inversion,
    labels,
    models,
    reconstructor,
    shadow,
    timing,
)

COMMANDS = {
    "inversion": (inversion.run, "one DeepInversion step against PyTorch"),
    "ensemble": (ensemble.run, "one step of several networks jointly"),
    "gradients": (gradients.run, "one step of gradient inversion against PyTorch and breaching"),
    "shadow": (shadow.run, "shadow models against PyTorch and opacus"),
    "reconstructor": (reconstructor.run, "one training step of the reconstructor"),
    "distillation": (distillation.run, "condensing a data set, and a student of it"),
    "models": (models.run, "forward and gradient of one network a family against PyTorch"),
    "labels": (labels.run, "labels that are restored from gradients of trained networks"),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (run, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        command.add_argument("--out", type=Path, required=True, metavar="FILE", help="to write")
        if name == "models":
            command.add_argument("--networks", nargs="+", metavar="NAME", help="these instead")
        else:
            command.add_argument(
                "--cases", nargs="+", metavar="WORD", help="only cases with all of them"
            )
        if name in ("inversion", "reconstructor"):
            command.add_argument("--peers", nargs="+", metavar="PEER", help="only these")
        command.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds, >= 7")
        command.add_argument("--steps", type=int, default=3, metavar="N", help="steps in a round")
    args = parser.parse_args(arguments)
    if args.repeats < 7 or args.steps < 1:
        parser.error("medians need at least 7 rounds of at least one step")
    return args


if __name__ == "__main__":
    options = parse()
    timing.prepare()
    options.run(options)
