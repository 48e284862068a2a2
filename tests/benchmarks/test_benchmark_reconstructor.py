"""The benchmark of the reconstructor: both sides do the same work, and other work is refused."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from jinv.models import convolution

pytest.importorskip("torch")
sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks import reconstructor, torch_reconstructor  # found through the path above

CASE = reconstructor.Case("mnist", 30, 4, 3)
PEERS = torch_reconstructor.PEERS[:2]


@pytest.fixture(scope="module")
def given() -> torch_reconstructor.Problem:
    """With two images of every class, which a softmin weighs."""
    given = reconstructor.problem(CASE)
    return given._replace(indices=np.concatenate([given.indices, given.indices[::-1]], 1))


def differences(given: Any, peers: Any = PEERS) -> dict[str, dict[str, float]]:
    return reconstructor.differences(CASE, given, peers, lambda peer: None)  # type: ignore[arg-type]


def test_both_sides_do_the_same_in_float64(
    given: torch_reconstructor.Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Maps this narrow would leave out the form that wide ones are learned in.
    monkeypatch.setattr(convolution, "_WIDE", 1)
    found = differences(given)
    assert list(found) == list(PEERS)
    for each in found.values():
        assert each["loss_difference"] < 1e-12
        assert each["direction_difference"] < 2e-7  # gradients are compared in float32


@pytest.mark.parametrize("other", ["alpha", "normalisation", "images"])
def test_other_work_is_refused(
    given: torch_reconstructor.Problem, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    their_steps = reconstructor.their_steps

    def wrong(case: Any, peer: str, given: Any) -> Any:
        if other == "normalisation":
            given = given._replace(mean=given.mean + 1e-3)
        side = their_steps(case, peer, given)
        if other == "alpha":
            side.alpha = 101.0
        if other == "images":
            side.of_each_class = 1
        return side

    monkeypatch.setattr(reconstructor, "their_steps", wrong)
    with pytest.raises(SystemExit, match="pytorch does not compute the same"):
        differences(given, PEERS[:1])


def test_steps_that_are_timed_train_alike(
    given: torch_reconstructor.Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the loss of the first shadow models after as many steps on these, in float32."""
    few = given._replace(
        weights=given.weights[:32], indices=np.repeat(given.indices[:32, :1], 10, 1)
    )  # whichever image is drawn, it is the same one
    monkeypatch.setattr(reconstructor, "CONFIG", reconstructor.training.Config(lr=0.01))
    ours = reconstructor.our_steps(CASE, few)
    theirs = reconstructor.their_steps(CASE, "pytorch", few)
    theirs.of_each_class = 10
    before, _ = theirs.loss_and_gradient(np.zeros(32, int))
    losses = []
    run = theirs.objective
    monkeypatch.setattr(theirs, "objective", lambda *args: losses.append(run(*args)) or losses[-1])
    theirs.run(5)
    state, found = ours._state, []
    for _ in range(5):
        state, info = ours.compiled(ours._key, state, ours._data)
        found.append(float(info.loss))
    assert found[0] == pytest.approx(before, rel=1e-5)
    assert found[-1] < 0.9 * before
    np.testing.assert_allclose(found, [loss.item() for loss in losses], rtol=2e-3)
    assert theirs.row == 0  # these again


def test_peers_can_be_chosen() -> None:
    parse = importlib.import_module("benchmark").parse
    options = ["reconstructor", "--out", "x.json", "--cases", "mnist", "--peers", "pytorch"]
    assert parse(options).peers == ["pytorch"]
