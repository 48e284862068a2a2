"""Check a weight file against a jinv network and write it as .pth or .safetensors.

    jinv convert-weights --input resnet50-11ad3fa6.pth --model resnet50 \
        --output weights/resnet50.safetensors
    jinv convert-weights --input checkpoint.pth --list

The input may be a torch.save file of any version, also a training checkpoint or one saved from
DataParallel, or .safetensors; it is never run. The output loads with torchvision's
``load_state_dict(strict=True)`` and with `weights_convert.read`. Beside it goes summary.json, or
OUTPUT.summary.json where the folder has the summary of something else.

--overwrite replaces what an earlier conversion to the same output wrote, and nothing else. An
error is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jinv import files
from jinv.files import sha256, write_atomic
from jinv.runs.command import described
from weights_convert import WeightsError, from_flax, read, to_flax, write

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What summary.json holds.

    Attributes:
      model: name of the network.
      input: path that was read.
      output: path that was written.
      input_sha256, output_sha256: of the files.
      tensors: number of tensors written.
      parameters: number of trained values: all but BatchNorm's running statistics and counters.
      bytes: size of the output.
      seconds: time from start to finish.
    """

    model: str
    input: str
    output: str
    input_sha256: str
    output_sha256: str
    tensors: int
    parameters: int
    bytes: int
    seconds: float


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="jinv convert-weights",
        description=f"{__doc__}\nsummary.json holds\n\n{described(Summary)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, metavar="FILE", help=".pth or .safetensors")
    parser.add_argument("--model", metavar="NAME", help="the jinv network the weights are for")
    parser.add_argument(
        "--classes", type=int, metavar="N", help="if not the network's usual number"
    )
    parser.add_argument("--key", metavar="NAME", help="which network of a file that holds several")
    parser.add_argument("--list", action="store_true", help="print the file's tensors and stop")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args(arguments)
    if not args.list and not (args.output and args.model):
        parser.error("give --output and --model, or --list")
    return args


def template(name: str, classes: int | None) -> Mapping:
    """Return the shapes and element types of a network of the zoo.

    Raises:
      WeightsError: the zoo has none of that name.
    """
    from jinv.models import template as of  # late: --list needs no JAX

    try:
        return of(name, classes)
    except (KeyError, ValueError) as error:
        reason = error.args[0] if error.args else "unknown"
        raise WeightsError(f"--model {name}: {reason}") from None


def describe(state: Mapping[str, np.ndarray]) -> str:
    """Return one line a tensor: name, shape, element type."""
    width = max(map(len, state))
    return "\n".join(f"{name:<{width}}  {a.shape}  {a.dtype}" for name, a in state.items())


def fitted(source: Path, network: Mapping, key: str | None = None) -> dict[str, np.ndarray]:
    """Read a file and return its tensors with the network's shapes and types.

    Raises:
      WeightsError: the file cannot be read, or does not fit; the message says why.
    """
    state = read(source, key=key)
    try:
        return from_flax(to_flax(state, network))
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks."""
    return str(error).replace(":\n  ", ": ").replace("\n  ", ", ").replace("\n", "; ")


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


def summary_of(target: Path) -> Path:
    """Return where the summary of a conversion to this output goes."""
    common, own = _summaries(target)
    return common if _tells_of(common, target) or not common.exists() else own


def _summaries(target: Path) -> tuple[Path, Path]:
    return target.parent / "summary.json", target.with_name(f"{target.name}.summary.json")


def _tells_of(summary: Path, target: Path) -> bool:
    """Whether it is the summary of a conversion to this output."""
    try:
        found = json.loads(summary.read_text(encoding="utf-8"))
        return "input_sha256" in found and Path(found["output"]).name == target.name
    except (OSError, ValueError, TypeError, KeyError):
        return False


def convert(args: argparse.Namespace) -> Summary:
    """Convert one file and return its summary, which is also written."""
    start = time.perf_counter()
    source, target = files.path(args.input), files.path(args.output)
    check_free(target, args.overwrite)
    digest = sha256(source) if source.is_file() else ""
    state = fitted(source, template(args.model, args.classes), args.key)
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, state)
    trained = [a for name, a in state.items() if name.split(".")[-1] not in BUFFERS]
    summary = Summary(
        model=args.model,
        input=str(source),
        output=str(target),
        input_sha256=digest,
        output_sha256=sha256(target),
        tensors=len(state),
        parameters=sum(a.size for a in trained),
        bytes=target.stat().st_size,
        seconds=round(time.perf_counter() - start, 3),
    )
    write_atomic(summary_of(target), json.dumps(vars(summary), indent=2) + "\n")
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parse(arguments)
    try:
        if args.list:
            print(describe(read(args.input, key=args.key)))
            return 0
        summary = convert(args)
    except (WeightsError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    print(f"{summary.output}: {summary.tensors} tensors, {summary.parameters} parameters")
    return 0
