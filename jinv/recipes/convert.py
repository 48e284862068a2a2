"""Check weight files against networks and write them as .pth or .safetensors.

    jinv convert --input resnet50-11ad3fa6.pth --output weights/resnet50.safetensors
    jinv convert --input downloads --output weights
    jinv convert --input out/victims/resnet18 --output resnet18.pth
    jinv convert --input checkpoint.pth --list

The input is a torch.save file of any version, also a training checkpoint or one saved from
DataParallel; or .safetensors; or a folder that `jinv pretrain` wrote; or a folder of all of these.
It is never run. Which network it is of is found by names and shapes, unless --model says it. Names
that timm or an older torchvision give to the same layers become torchvision's.

The output loads with torchvision's ``load_state_dict(strict=True)`` and with `jinv.models.load`. If
it has no suffix it is a folder; the files in it have their inputs' names and the other format: what
was torch's becomes .safetensors, what was .safetensors or jinv's becomes .pth.

Where torchvision is installed and has the network, it has to load the output, and its logits for
two random images are compared with jinv's. No output is kept where they differ by more than 1e-4 of
their size. This does not tell whether a network of timm's computes the same as torchvision's.

A file with scores beside the weights is a subnetwork of a random network (arXiv 1911.13299): give
its --model, and with --kept the share of the weights that stays. The file does not say it, and the
public code's `prune_rate` means two things: where scores are trained (SubnetConv), the share that
is kept; in FixedSubnetConv and its help the share that is removed. The published checkpoints are of
--kept 0.3. What the file tells of it is compared. The output is the network itself, 0 where weights
do not stay; or, with --format hidden-networks, a .pth with scores as the public code reads it.

Beside an output goes summary.json, or OUTPUT.summary.json where the folder has the summary of
something else; of a folder's files always the latter. --overwrite replaces what an earlier
conversion to the same output wrote, and nothing else. What cannot be converted does not stop the
rest of a folder. Errors are one line each on stderr, and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jinv import files
from jinv.files import sha256, write_atomic
from jinv.runs.command import described
from weights_convert import (
    BUFFERS,
    WeightsError,
    from_flax,
    naming,
    read,
    subnetworks,
    to_flax,
    write,
)

TIMM = "timm's"
HIDDEN = "hidden-networks"
TORCH, SAFETENSORS = (".pth.tar", ".pth", ".pt", ".bin", ".ckpt"), (".safetensors",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What summary.json holds.

    Attributes:
      model: name of the network.
      classes: number of its classes; null if it is the usual one of the network that --model names.
      input: path that was read.
      output: path that was written.
      input_sha256, output_sha256: of the files.
      names: whose names the input had, such as "timm's"; null if the network's own.
      tensors: number of tensors written.
      parameters: number of trained values: all but BatchNorm's running statistics and counters.
      bytes: size of the output.
      kept: share of the weights that stay in a subnetwork; null if it is none.
      told_of_kept: what the file tells of that share; null if there is nothing to compare.
      format: "network", or "hidden-networks" where scores were written too.
      parity: relative difference between jinv's logits and torchvision's; null if not compared.
      not_compared: why not; null if they were.
      seconds: time from start to finish.
    """

    model: str
    classes: int | None
    input: str
    output: str
    input_sha256: str
    output_sha256: str
    names: str | None
    tensors: int
    parameters: int
    bytes: int
    kept: float | None
    told_of_kept: str | None
    format: str
    parity: float | None
    not_compared: str | None
    seconds: float

    @property
    def line(self) -> str:
        """What is said of it."""
        told = [self.model, f"{self.tensors} tensors", f"{self.parameters} parameters"]
        if self.names:
            told.append(f"renamed from {self.names} names")
        if self.names == TIMM:
            told[-1] += " (they and the shapes fit; only its accuracy tells whether the rest does)"
        if self.kept is not None:
            told.append(f"a subnetwork that keeps {self.kept:g}")
        if self.told_of_kept:
            told.append(self.told_of_kept)
        if self.parity is None:
            told.append(f"not compared with torchvision: {self.not_compared}")
        else:
            told.append(f"within {self.parity:.1e} of torchvision")
        return f"{self.output}: {', '.join(told)}"


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of weights.

    Attributes:
      path: of the file.
      name: of the output, without suffix.
      model: the network, if it is known.
      classes: how many, if it is known.
      to: suffix of the other format.
      kept: share of the weights that stay in a subnetwork, if it is known.
    """

    path: Path
    name: str
    to: str
    model: str | None = None
    classes: int | None = None
    kept: float | None = None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="jinv convert",
        description=f"{__doc__}\nsummary.json holds\n\n{described(Summary)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", type=Path, required=True, metavar="PATH")
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="a .pth, .safetensors or folder"
    )
    parser.add_argument("--model", metavar="NAME", help="the network, if it is not to be found")
    parser.add_argument(
        "--classes", type=int, metavar="N", help="if not the usual number of the --model"
    )
    parser.add_argument(
        "--kept",
        type=float,
        metavar="K",
        help="of a subnetwork, the share of the weights that stays, not the one that is removed",
    )
    parser.add_argument(
        "--format",
        choices=("network", HIDDEN),
        default="network",
        help="what to write of a subnetwork: the network itself, or its scores too",
    )
    parser.add_argument("--key", metavar="NAME", help="which network of a file that holds several")
    parser.add_argument("--list", action="store_true", help="print the file's tensors and stop")
    parser.add_argument("--no-check", action="store_true", help="do not compare with torchvision")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args(arguments)
    if not args.list and not args.output:
        parser.error("give --output, or --list")
    if args.classes is not None and not args.model:
        parser.error("--classes goes with --model; without, both are found")
    if args.kept is not None and not 0 < args.kept <= 1:
        parser.error(f"--kept is a share above 0 and at most 1, not {args.kept:g}")
    return args


# --- what is read ------------------------------------------------------------------------------


def sources(path: Path) -> list[Source]:
    """Return the weights that a path names: itself, or all that are in the folder.

    Raises:
      WeightsError: it holds none.
    """
    if not path.is_dir():
        return [_file(path)]
    if trained := _trained(path):
        return [trained]
    found = []
    for inside in sorted(path.iterdir()):
        if inside.is_dir():
            found += [one] if (one := _trained(inside)) else []
        elif inside.name.endswith(TORCH + SAFETENSORS) and not inside.name.startswith("."):
            found.append(_file(inside))
    if not found:
        raise WeightsError(
            f"{path}: holds no weights ({', '.join(TORCH + SAFETENSORS)}) and no network that "
            "`jinv pretrain` wrote; give the folder that does"
        )
    return found


def _file(path: Path) -> Source:
    for suffix in TORCH + SAFETENSORS:
        if path.name.endswith(suffix) and path.name != suffix:
            to = ".pth" if suffix in SAFETENSORS else ".safetensors"
            return Source(path, path.name.removesuffix(suffix), to)
    return Source(path, path.name, ".safetensors")


def _trained(folder: Path) -> Source | None:
    """The network that `jinv pretrain` left in a folder, if it did."""
    from jinv.models import trained  # late: --list needs no JAX

    try:
        told = json.loads((folder / trained.SUMMARY).read_text(encoding="utf-8"))
        model, classes = told["model"], len(told["classes"])
        kept = trained.kept(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    weights = folder / trained.WEIGHTS
    if not isinstance(model, str) or not weights.is_file():
        return None
    return Source(weights, folder.resolve().name, ".pth", model, classes, kept)


def describe(state: Mapping[str, np.ndarray]) -> str:
    """Return one line a tensor: name, shape, element type."""
    width = max(map(len, state))
    return "\n".join(f"{name:<{width}}  {a.shape}  {a.dtype}" for name, a in state.items())


def network(
    source: Source, state: Mapping[str, np.ndarray], args: argparse.Namespace
) -> tuple[str, int | None]:
    """Return the name and the classes of the network that weights are of.

    Raises:
      WeightsError: they are of none that jinv knows.
    """
    if args.model:
        return args.model, args.classes
    if source.model:
        return source.model, source.classes
    if subnetworks.has_scores(state):
        raise WeightsError(f"{source.path}: holds a subnetwork's scores: give its --model, too")
    from jinv.models import fitting

    if found := fitting(state, source.name):
        return found
    raise WeightsError(
        f"{source.path}: its names and shapes are of no network of jinv's; say what it should be "
        "with --model NAME, and what does not fit will be told"
    )


def template(name: str, classes: int | None) -> Mapping:
    """Return the shapes and element types of a network of the zoo.

    Raises:
      WeightsError: the zoo has none of that name.
    """
    from jinv.models import template as of

    try:
        return of(name, classes)
    except (KeyError, ValueError) as error:
        reason = error.args[0] if error.args else "unknown"
        raise WeightsError(f"--model {name}: {reason}") from None


# --- what is written ---------------------------------------------------------------------------


def target_of(source: Source, output: Path, *, several: bool) -> Path:
    """Return the file that weights are written to.

    Raises:
      WeightsError: one file is to hold several networks.
    """
    if output.is_dir() or not output.suffix:
        return output / f"{source.name}{source.to}"
    if several:
        raise WeightsError(
            f"--output {output} is one file, but the input is a folder: give a folder"
        )
    return output


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse to replace an output without being told, and one that no conversion wrote.

    Raises:
      WeightsError: says what is there.
    """
    if not target.exists():
        return
    if not any(_tells_of(summary, target) for summary in _summaries(target)):
        raise WeightsError(
            f"{target}: exists, and no conversion wrote it; remove it or choose another output"
        )
    if not overwrite:
        raise WeightsError(f"{target}: exists; choose another output or give --overwrite")


def summary_of(target: Path, *, several: bool = False) -> Path:
    """Return where the summary of a conversion to this output goes."""
    common, own = _summaries(target)
    free = _tells_of(common, target) or not (common.exists() or several)
    return common if free else own


def _summaries(target: Path) -> tuple[Path, Path]:
    return target.parent / "summary.json", target.with_name(f"{target.name}.summary.json")


def _tells_of(summary: Path, target: Path) -> bool:
    """Whether it is the summary of a conversion to this output."""
    try:
        found = json.loads(summary.read_text(encoding="utf-8"))
        return "input_sha256" in found and Path(found["output"]).name == target.name
    except (OSError, ValueError, TypeError, KeyError):
        return False


def convert(
    source: Source, target: Path, args: argparse.Namespace, *, several: bool = False
) -> Summary:
    """Convert one file and return its summary, which is also written.

    Args:
      source: what is read.
      target: what is written.
      args: the command line.
      several: others are written to the same folder.

    Raises:
      WeightsError: says why not; nothing is written then.
    """
    start = time.perf_counter()
    check_free(target, args.overwrite)
    digest = sha256(source.path) if source.path.is_file() else ""
    state = read(source.path, key=args.key)
    model, classes = network(source, state, args)
    wanted = template(model, classes)
    names: str | None = None
    told: str | None = None
    kept: float | None = None
    try:
        if subnetworks.has_scores(state) or args.kept is not None:
            kept = share(source, args)
            arrays, told = subnetwork(state, model, classes, kept, args.format)
        elif args.format == HIDDEN:
            raise WeightsError("has no scores: --format hidden-networks is for subnetworks")
        else:
            names, arrays = naming(state, wanted), from_flax(to_flax(state, wanted))
    except WeightsError as error:
        raise WeightsError(f"{source.path}: {error}") from None
    hidden = args.format == HIDDEN
    target.parent.mkdir(parents=True, exist_ok=True)
    unchecked = target.with_name(f".{target.stem}.{os.getpid()}.unchecked{target.suffix}")
    try:
        write(unchecked, arrays, wrapper=subnetworks.WRAPPER if hidden else None)
        skipped = "it has scores" if hidden else "--no-check" if args.no_check else None
        parity, reason = (None, skipped) if skipped else check(model, classes, unchecked)
        unchecked.replace(target)
    except WeightsError as error:
        raise WeightsError(str(error).replace(str(unchecked), str(target))) from None
    finally:
        unchecked.unlink(missing_ok=True)
    trained = [a for name, a in arrays.items() if name.split(".")[-1] not in BUFFERS]
    summary = Summary(
        model=model,
        classes=classes,
        input=str(source.path),
        output=str(target),
        input_sha256=digest,
        output_sha256=sha256(target),
        names=names,
        tensors=len(arrays),
        parameters=sum(a.size for a in trained),
        bytes=target.stat().st_size,
        kept=kept,
        told_of_kept=told,
        format=args.format,
        parity=parity,
        not_compared=reason,
        seconds=round(time.perf_counter() - start, 3),
    )
    text = json.dumps(dataclasses.asdict(summary), indent=2) + "\n"
    write_atomic(summary_of(target, several=several), text)
    return summary


def share(source: Source, args: argparse.Namespace) -> float:
    """Return the share of the weights that stays, as the folder or the command line says it.

    Raises:
      WeightsError: neither says it, or they differ.
    """
    if args.kept is None and source.kept is None:
        raise WeightsError(
            "holds scores beside the weights, a subnetwork's: give --kept K, the share of the "
            "weights that stays. The public code's prune_rate is this share where scores are "
            "trained (SubnetConv), but the share that is removed in FixedSubnetConv and in its "
            "help; the published checkpoints are of --kept 0.3"
        )
    if None not in (args.kept, source.kept) and args.kept != source.kept:
        raise WeightsError(f"was trained to keep {source.kept:g}: leave --kept out")
    return args.kept if source.kept is None else source.kept


def subnetwork(
    state: Mapping[str, np.ndarray], model: str, classes: int | None, kept: float, form: str
) -> tuple[dict[str, np.ndarray], str]:
    """Return what to write of a subnetwork, and what it tells of the share that stays.

    Args:
      state: of the file.
      model: name of the network.
      classes: how many, if not the usual number.
      kept: share of the weights that stays.
      form: see `Summary.format`.

    Raises:
      WeightsError: the file does not fit, or speaks against the share.
    """
    from jinv import models
    from jinv.models import subnetwork as masks

    net = models.load(model, None, classes=classes)
    wanted = masks.with_scores(net.variables)
    variables = to_flax(subnetworks.completed(state, wanted), wanted)
    told = masks.check_kept(net, variables, kept)
    if form == HIDDEN:
        return subnetworks.to_public(from_flax(variables)), told
    return from_flax(masks.effective(variables, kept)), told


def check(model: str, classes: int | None, weights: Path) -> tuple[float | None, str | None]:
    """Return how far jinv's logits are from torchvision's, or None and why that is not known.

    Raises:
      WeightsError: torchvision's are others, or it does not load the file.
    """
    from jinv import models, parallel
    from jinv.models import parity

    parallel.enable_compilation_cache()
    try:
        found = parity.difference(models.load(model, weights, classes=classes), weights)
    except parity.NotComparedError as reason:
        return None, str(reason)
    if not found <= parity.LIMIT:
        raise WeightsError(
            f"{weights}: jinv's logits differ from torchvision's by {found:.1e} of their size, "
            f"which is more than {parity.LIMIT}: please report it; --no-check writes it anyway"
        )
    return found, None


# --- the command -------------------------------------------------------------------------------


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks."""
    return str(error).replace(":\n  ", ": ").replace("\n  ", ", ").replace("\n", "; ")


def run(args: argparse.Namespace) -> list[str]:
    """Convert what the input holds; return what went wrong, one line each.

    Raises:
      WeightsError: there is nothing to convert, or nowhere to write it.
    """
    path, output = files.path(args.input), files.path(args.output)
    several = path.is_dir() and _trained(path) is None
    found = sources(path)
    if args.format == HIDDEN:
        found = [dataclasses.replace(source, to=".pth") for source in found]
    targets = [target_of(source, output, several=several) for source in found]
    failed = []
    for i, (source, target) in enumerate(zip(found, targets, strict=True)):
        try:
            if target in targets[:i]:
                raise WeightsError(f"{source.path}: {target} is of another input: convert it apart")
            print(convert(source, target, args, several=several).line, flush=True)
        except (ValueError, OSError) as error:
            failed.append(one_line(error))
    if several and failed:
        failed.insert(0, f"{len(failed)} of {len(found)} were not converted")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parse(arguments)
    try:
        if args.list:
            print(describe(read(args.input, key=args.key)))
            return 0
        failed = run(args)
    except (ValueError, OSError) as error:
        failed = [one_line(error)]
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 2 if failed else 0
