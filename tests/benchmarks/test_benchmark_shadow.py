"""The benchmark of shadow models: all sides do the same work, and whoever does not is found out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from jinv.shadow.store import Store

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


def test_delivery_is_timed_up_to_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "SEED", 20)
    case = shadow.CASES[2]
    found = shadow.delivery(case, 50, tmp_path / "store")
    seconds, rates = ["device_s", "host_s", "store_s"], ["host_bytes_per_s", "store_bytes_per_s"]
    assert list(found) == ["case", "models", "bytes_per_model", *seconds, *rates]
    assert (found["case"], found["models"]) == ("mnist N=10", 40)
    assert found["bytes_per_model"] == 4 * 2570
    assert all(0 < found[name] < 1 for name in seconds)
    assert found["host_bytes_per_s"] == found["bytes_per_model"] / found["host_s"]
    there = Store(tmp_path / "store")
    assert there.missing() == []
    assert (there.read(1, name="loss") < 1.5).all()


def test_other_work_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    published = torch_shadow.published

    def lazy(config: Any, *args: Any) -> Any:
        return published(shadow.dataclasses.replace(config, epochs=config.epochs - 1), *args)

    monkeypatch.setattr(torch_shadow, "published", lazy)
    case = shadow.CASES[2]
    with pytest.raises(SystemExit, match="pytorch_loop trains other weights"):
        shadow.check_agreement(case, *shadow.problem(case))
