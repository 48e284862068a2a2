"""The benchmark of shadow models: all sides do the same work, and whoever does not is found out."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from conftest import ROOT

pytest.importorskip("torch")
sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks import shadow, torch_shadow  # found through the path above


@pytest.mark.parametrize("case", shadow.CASES[2:4], ids=str)
def test_all_sides_train_the_same_weights(case: shadow.Case) -> None:
    found = shadow.check_agreement(case, *shadow.problem(case))
    assert set(found) == {"pytorch_loop", "pytorch_batched"}
    assert max(found.values()) < 1e-5


@pytest.mark.filterwarnings("ignore")  # opacus' own
def test_opacus_clips_like_us() -> None:
    pytest.importorskip("opacus")
    case = shadow.CASES[5]
    assert case.private
    assert shadow.check_agreement(case, *shadow.problem(case))["opacus"] < 1e-5


def test_other_work_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    published = torch_shadow.published

    def lazy(config: Any, *args: Any) -> Any:
        return published(shadow.dataclasses.replace(config, epochs=config.epochs - 1), *args)

    monkeypatch.setattr(torch_shadow, "published", lazy)
    case = shadow.CASES[2]
    with pytest.raises(SystemExit, match="pytorch_loop trains other weights"):
        shadow.check_agreement(case, *shadow.problem(case))
