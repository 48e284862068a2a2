"""`jinv reconstruct` as its user meets it: heads of torch, what is refused, what was seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import recipe_examples
from jinv.recipes import reconstruct, train_reconstructor
from jinv.runs import command_line
from jinv.shadow import features


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def tree(folder: Path) -> dict[str, Any]:
    return recipe_examples.reconstruct(folder)


def run(tree: dict[str, Any], out: Path, code: int = 0) -> dict[str, Any]:
    """Run it from flags alone."""
    flags: list[str] = [*tree["heads"], "--out", str(out)]
    for key, value in tree.items():
        if key != "heads":
            values = value if isinstance(value, list) else [value]
            flags += [f"--{key}", *map(str, values)]
    assert command_line.main(reconstruct.COMMAND, flags) == code
    return {} if code else json.loads((out / "summary.json").read_text())


def test_it_tells_what_heads_have_seen(tree: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    told = run(tree, tmp_path / "out")
    right = 0
    for i, one in enumerate(told["heads"]):
        assert one["refused"] is None
        assert one["training"]["lr"] == 0.05
        assert all(c[0]["margin"] > 0 for c in one["candidates"])
        right += sum(c[0]["index"] == 3 * i + j for j, c in enumerate(one["candidates"]))
    assert right >= 6  # of 9, from 60 candidates; a third of each feature is not known
    own = features.load(folder / "train")
    with np.load(tmp_path / "out" / "recovered.npz") as found:
        assert set(found) == {f"00{i}.{name}" for i in range(3) for name in ("features", "error")}
        near = np.linalg.norm(found["000.features"] - own.features[:3])
        far = np.linalg.norm(found["000.features"] - own.features[3:6])
    assert near < 0.7 * far
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 3


def test_a_layer_of_a_torch_network(tree: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Trained by torch, saved by torch; the hyper-parameter is one of several."""
    own = features.load(folder / "train")
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.add_module("first", torch.nn.Linear(4, 16))
    net.add_module("fc", torch.nn.Linear(16, 3))
    head = net.fc
    torch.nn.init.normal_(head.weight, std=1e-3)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
    x = torch.tensor(np.asarray(own.features)[[9, 10, 11]])
    for _ in range(10):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(x), torch.arange(3)).backward()
        optimizer.step()
    path = tmp_path / "net.pth"
    torch.save(net.state_dict(), path)
    told = run(tree | {"heads": [str(path)], "lr": [0.02, 0.05]}, tmp_path / "out")
    (one,) = told["heads"]
    assert one["refused"] is None
    assert one["training"]["lr"] == pytest.approx(0.05, rel=0.1)
    assert len({c[0]["index"] for c in one["candidates"]} & {9, 10, 11}) >= 2


def test_reconstructors_of_both_kinds(tree: dict[str, Any], tmp_path: Path) -> None:
    own = {"features": tree["features"], "victims": 4, "statistics": 2, "width": 2}
    own |= {
        "sampling": {"class_size": 1, "sets": 20},
        "training": {"classes": 3, "lr": 0.05, "epochs": 10, "weight_decay": 0.0}
        | {"init_std": 1e-3},
        "reconstructor": {"steps": 2, "batch": 4},
        "run": {"scores_every": 0},
    }
    for name in ("weights", "features"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(own | {"input": name}))
        arguments = ["--config", str(path), "--out", str(tmp_path / name)]
        assert command_line.main(train_reconstructor.COMMAND, arguments) == 0
        given = {key: tree[key] for key in ("heads", "features")}
        told = run(given | {"reconstructor": str(tmp_path / name)}, tmp_path / f"by_{name}")
        assert told["attack"] == name
        assert [one["refused"] for one in told["heads"]] == [None] * 3


def test_other_heads_are_refused_with_a_reason(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tree | {"init_std": 0.5}, tmp_path / "out", code=2)
    told = capsys.readouterr().err
    assert "no head can be attacked" in told
    assert "what no example moves is" in told
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": np.zeros((4, 16)), "bias": np.zeros(4)}, "has weight (3, 16) and bias (3,)"),
        ({"weight": np.zeros((3, 16))}, "has weight (3, 16) and bias (3,)"),
        ({"weight": np.full((3, 16), np.nan), "bias": np.zeros(3)}, "not all finite"),
        (
            {f"{n}.weight": np.zeros((3, 16)) for n in "ab"}
            | {f"{n}.bias": np.zeros(3) for n in "ab"},
            "layer can be one of ['a', 'b']",
        ),
    ],
)
def test_files_without_such_a_head(
    tree: dict[str, Any],
    state: dict[str, np.ndarray],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "head.pth"
    torch.save({n: torch.tensor(a, dtype=torch.float32) for n, a in state.items()}, path)
    run(tree | {"heads": [str(path)]}, tmp_path / "out", code=2)
    assert message in capsys.readouterr().err


def test_without_anything_it_tells_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            command_line.main(reconstruct.COMMAND, arguments)
        assert stop.value.code == code
        assert "jinv reconstruct HEAD.pth --features" in capsys.readouterr().out
