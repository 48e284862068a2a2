"""Training steps of the reconstructor beside PyTorch's eager ones, in one process."""

from __future__ import annotations

import jax
import torch

from benchmarks import reconstructor, timing, torch_reconstructor
from benchmarks.reconstructor import Case
from gpu import steps
from gpu.part import Given

PUBLISHED = {"mnist": 9.5, "cifar": 58.5}
"""Hours of a million steps on a V100 (arXiv 2505.14323)."""
PEER = "pytorch_channels_last"
TINY = Case("tiny", 20, 2, 1)


def run(given: Given) -> None:
    """One row a case."""
    if not given.tiny:
        timing.prepare()
    on_card = jax.default_backend() == "gpu"
    for case in (TINY,) if given.tiny else reconstructor.GPU_CASES:
        problem = reconstructor.problem(case)
        ours = reconstructor.our_steps(case, problem, chunk=steps.CHUNK)
        with torch.device("cuda" if on_card else "cpu"):
            net = torch_reconstructor.Network(case.network, lean=True)
        theirs = reconstructor.their_steps(case, PEER, problem, net)
        found = steps.timed({"ours": ours, "peer": theirs}, 1)
        given.emit(
            case=str(case),
            dtype=case.dtype,
            peer=PEER,
            **found["ours"]._asdict(),
            peer_ms=found["peer"].ms,
            peer_quartiles=found["peer"].quartiles,
            ratio=found["peer"].ms / found["ours"].ms,
            hours=found["ours"].ms * 1e6 / 3.6e6,
            published_hours=PUBLISHED.get(case.data),
        )
