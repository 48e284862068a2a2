"""Training steps of the reconstructor beside PyTorch's, eager and compiled, in one process."""

from __future__ import annotations

import jax
import torch

from benchmarks import reconstructor, timing, torch_reconstructor
from benchmarks.reconstructor import Case
from gpu import steps
from gpu.part import Given

PUBLISHED = {"mnist": 9.5, "cifar": 58.5}
"""Hours of a million steps on a V100 (arXiv 2505.14323)."""
TINY = Case("tiny", 20, 2, 1)


def run(given: Given) -> None:
    """One row a case and peer, the compiled ones last: each takes long to compile."""
    if not given.tiny:
        timing.prepare()
    on_card = jax.default_backend() == "gpu"
    ours: dict[Case, timing.Steps] = {}
    for peer in torch_reconstructor.PEERS[1 : 3 if on_card else 2]:
        for case in (TINY,) if given.tiny else reconstructor.GPU_CASES:
            problem = reconstructor.problem(case)
            if case not in ours:
                ours[case] = reconstructor.our_steps(case, problem, chunk=steps.CHUNK)
            with torch.device("cuda" if on_card else "cpu"):
                net = torch_reconstructor.Network(case.network, lean=True)
            theirs = reconstructor.their_steps(case, peer, problem, net)
            found = steps.timed({"ours": ours[case], "peer": theirs}, 1)
            given.emit(
                case=str(case),
                dtype=case.dtype,
                peer=peer,
                **found["ours"]._asdict(),
                peer_ms=found["peer"].ms,
                peer_quartiles=found["peer"].quartiles,
                ratio=found["peer"].ms / found["ours"].ms,
                hours=found["ours"].ms * 1e6 / 3.6e6,
                published_hours=PUBLISHED.get(case.data),
            )
