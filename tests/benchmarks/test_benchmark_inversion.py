"""What the inversion benchmark compares is the same work, and other work is refused."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from conftest import ROOT

pytest.importorskip("torchvision")
sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks import inversion, timing, torch_inversion  # found through the path above

CASE = inversion.Case("resnet18", 4, 32, "bfloat16")


@pytest.fixture(scope="module")
def given() -> Any:
    """A network on both sides, and what it is asked."""
    torch_net = torch_inversion.torch_network(CASE.network)
    net = inversion.ported(CASE.network, torch_net)
    return SimpleNamespace(
        torch_net=torch_net, net=net, problem=inversion.problem(CASE.batch, CASE.size)
    )


@pytest.fixture(scope="module")
def ours(given: Any) -> inversion.Evaluated:
    return inversion.our_evaluation(given.net, CASE, *given.problem)


def side(given: Any, dtype: str = CASE.dtype) -> torch_inversion.TorchInversion:
    space = given.net.preprocessing
    return torch_inversion.TorchInversion(
        "pytorch_frozen",
        [given.torch_net],
        [torch_inversion.SAME],
        *given.problem,
        (space.black, space.white),
        2,
        dtype,
    )


def refuses(ours: inversion.Evaluated, theirs: inversion.Evaluated) -> bool:
    try:
        inversion.check_agreement("other work", ours, theirs, timing.ROUNDED["bfloat16"])
    except SystemExit:
        return True
    return False


def test_all_peers_do_the_same_in_float64(given: Any) -> None:
    sides = {name: side(given) for name in timing.chosen_peers(torch_inversion.PEERS, None)}
    found = inversion.differences(CASE, sides, given.torch_net, given.net, *given.problem)
    assert set(found) == {"pytorch_frozen", "pytorch_published"}
    assert max(value for each in found.values() for value in each.values()) < 1e-9


def test_rounding_to_bfloat16_is_no_other_work(given: Any, ours: inversion.Evaluated) -> None:
    theirs = inversion.their_evaluation(side(given))
    assert abs(theirs.loss / inversion.their_evaluation(side(given, "float32")).loss - 1) > 1e-6
    assert not refuses(ours, theirs)


@pytest.mark.parametrize("factor", [1.1, 0.0])
@pytest.mark.parametrize("term", torch_inversion.TERMS)
def test_a_wrong_term_is_refused_in_bfloat16(
    given: Any, ours: inversion.Evaluated, term: str, factor: float
) -> None:
    wrong = side(given)
    factors = wrong._by_channel(np.ones(len(torch_inversion.TERMS))).flatten()
    factors[torch_inversion.TERMS.index(term)] = factor
    wrong.objective = lambda x: wrong.plain_objective(x) * factors
    assert refuses(ours, inversion.their_evaluation(wrong))


def test_a_wrong_weight_or_gradient_of_ours_is_refused(
    given: Any, ours: inversion.Evaluated
) -> None:
    theirs = inversion.their_evaluation(side(given))
    halves = np.concatenate([ours.gradient[:2], 0 * ours.gradient[2:]])
    for wrong in (
        ours._replace(gradient=1.1 * ours.gradient),
        ours._replace(gradient=ours.gradient[::-1]),
        ours._replace(gradient=halves * np.linalg.norm(ours.gradient) / np.linalg.norm(halves)),
        ours._replace(gradient=np.nan * ours.gradient),
        ours._replace(loss=ours.loss + 0.1 * ours.terms["l2"]),
        ours._replace(terms=ours.terms | {"label": np.nan}),
        ours._replace(terms={"label": ours.terms["label"]}),
    ):
        assert refuses(wrong, theirs)


def test_gpus_check_the_program_that_they_time(
    monkeypatch: pytest.MonkeyPatch, given: Any, ours: inversion.Evaluated
) -> None:
    timed = side(given)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(inversion, "our_evaluation", lambda *args: ours)
    monkeypatch.setattr(inversion, "TorchInversion", None)  # no second one
    seen = []

    def objective(x: Any) -> Any:
        seen.append((x.shape, x.stride(), x.requires_grad))
        return timed.plain_objective(x)

    timed.objective = objective
    rest = (given.torch_net, given.net, *given.problem)
    found = inversion.differences(CASE, {"pytorch_compiled": timed}, *rest)
    assert set(found["pytorch_compiled"]) == {
        *("loss_difference", "norm_difference", "direction_difference")
    }
    timed.run(1)
    assert len(seen) == 2
    assert seen[0] == seen[1]  # else `torch.compile` compiles again


def test_cases_and_peers_are_chosen_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timing.chosen(inversion.GPU_CASES, ["resnet50", "84x224"])
    assert [dataclasses.astuple(case) for case in found] == [
        ("resnet50", 84, 224, "bfloat16"),
        ("resnet50", 84, 224, "float32"),
    ]
    with pytest.raises(SystemExit, match="no case has 'resnet50 84x112' in its name"):
        timing.chosen(inversion.GPU_CASES, ["resnet50", "84x112"])
    assert timing.chosen_peers(torch_inversion.PEERS, ["pytorch_published"]) == (
        "pytorch_published",
    )
    with pytest.raises(SystemExit, match="no peer pytorch_compiled here; there are: pytorch_froz"):
        timing.chosen_peers(torch_inversion.PEERS, ["pytorch_compiled"])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert timing.chosen_peers(torch_inversion.PEERS, None) == torch_inversion.PEERS


def test_peers_are_an_option_of_inversion() -> None:
    parse = importlib.import_module("benchmark").parse
    options = ["--out", "x.json", "--cases", "resnet50", "84x224", "--peers", "pytorch_frozen"]
    assert parse(["inversion", *options]).peers == ["pytorch_frozen"]
    with pytest.raises(SystemExit):
        parse(["ensemble", *options])
