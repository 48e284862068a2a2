"""The kernels that XLA makes of a step for a GPU, on a machine that has none.

    python scripts/gpu_kernels.py resnet50 84 224 bfloat16
    python scripts/gpu_kernels.py mobilenet_v2 84 224 float32 --set depthwise=slices

Compiles one DeepInversion step of a network for an NVIDIA H100, and prints what its kernels read
and write: sums over every kind, then the largest. `--set` turns switches of `jinv.backend`. That
tells what XLA joins into one kernel, and so the bytes of a step, but no times: what it would try
out on a card (which algorithm a convolution takes) is left at the first choice. `--hlo FILE` keeps
the program.

It needs XLA's compiler for GPUs, of JAX's own version, and nothing else of CUDA. Give it an
environment of its own: elsewhere JAX would look for a card whenever it starts.

    pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION
"""

from __future__ import annotations

import argparse
import collections
import os
from pathlib import Path
from typing import Any

# No GPU is looked for. The plugin for it is loaded all the same.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from gpu import cases, hlo
from jinv import backend, optimise

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA's compiler asks a card; as XLA's own tests describe it."""


def compiled(case: cases.Case, switches: dict[str, Any]) -> Any:
    """A step of DeepInversion, compiled for the card."""
    card = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1")
    there = SingleDeviceSharding(card.devices[0])
    with backend.choose(**switches):
        attack = cases.attack(case)
        (phase,) = attack.phases
        images = attack.initial(jax.random.key(0))
        given = jax.random.key(0), optimise.abstract_state(phase, images), attack.data
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), given
        )
        return jax.jit(phase.step, donate_argnums=1).trace(*shapes).lower().compile()


def switch(text: str) -> tuple[str, Any]:
    """NAME=POSITION as a switch."""
    name, _, position = text.partition("=")
    return name, {"True": True, "False": False}.get(position, position)


def main() -> None:
    """Compile, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", help="of the zoo")
    parser.add_argument("batch", type=int, help="images")
    parser.add_argument("size", type=int, help="pixels a side")
    parser.add_argument("dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--set", type=switch, nargs="+", default=[], metavar="SWITCH=POSITION")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="kernels to list")
    parser.add_argument("--hlo", type=Path, metavar="FILE", help="to write the program to")
    args = parser.parse_args()
    switches = vars(backend.OTHER) | dict(args.set)
    program = compiled(cases.Case(args.network, args.batch, args.size, args.dtype), switches)
    text = program.as_text()
    if args.hlo:
        args.hlo.write_text(text)
    kernels = hlo.kernels(text)
    moved, memory = sum(k.bytes for k in kernels), program.memory_analysis().temp_size_in_bytes
    print(f"{len(kernels)} kernels move {moved / 1e9:.2f} GB; {memory / 1e9:.2f} GB of memory")
    sums: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        sums[kernel.kind] += kernel.bytes
    for kind, size in sums.most_common():
        print(f"{size / 1e9:9.2f} GB  {sum(k.kind == kind for k in kernels):4} x {kind}")
    for kernel in sorted(kernels, key=lambda k: -k.bytes)[: args.top]:
        told = f"{kernel.name:48}{kernel.shape[:70]:72}{kernel.op_name[-50:]}"
        print(f"{kernel.bytes / 1e6:9.1f} MB  {told}")


if __name__ == "__main__":
    main()
