"""A resumed run reads what it read before, or says what is different."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import yaml

import jinv
import weights_convert
from jinv.checks import File
from jinv.models.network import Network
from jinv.recipes import invert
from jinv.runs import command_line, config, inputs
from jinv.runs.run_folder import FolderError, RunFolder


@dataclasses.dataclass(frozen=True)
class Net:
    weights: Annotated[str, File(("package",))] = "package"
    name: str = "package"


@dataclasses.dataclass(frozen=True)
class Recipe:
    nets: tuple[Net, ...] = ()
    pictures: tuple[Annotated[str, File()], ...] = ()
    evidence: Annotated[str, File(endings=(".json", ".npz"))] | None = None
    seed: int = 0


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.pth", "package", "p.png", "ev.1.json", "ev.1.npz"):
        (tmp_path / name).write_text(name)
    (tmp_path / "trained/sub").mkdir(parents=True)
    (tmp_path / "trained/sub/weights").write_text("w")
    return tmp_path


def recipe(weights: str = "a.pth") -> Recipe:
    return Recipe((Net(), Net(weights)), ("p.png",), "ev.1")


def test_digests_are_of_the_files_that_are_named(here: Path) -> None:
    found = inputs.digests(recipe())
    assert sorted(found) == ["evidence", "nets.1.weights", "pictures.0"]
    assert inputs.digests(recipe("missing.pth")).keys() == {"evidence", "pictures.0"}
    folder = inputs.digests(recipe("~/trained"))["nets.1.weights"]
    (here / "trained/sub/weights").write_text("v")
    assert inputs.digests(recipe("~/trained"))["nets.1.weights"] != folder
    for changed, key in (("ev.1.npz", "evidence"), ("p.png", "pictures.0")):
        (here / changed).write_text("other")
        after = inputs.digests(recipe())
        assert {k for k in found if found[k] != after[k]} == {key}
        found = after


def test_names_in_a_folder_need_not_be_utf8(here: Path) -> None:
    asked = recipe("~/trained")
    (here / "trained/\udcff.png").write_text("p")
    first = inputs.digests(asked)
    (here / "trained/\udcff.png").rename(here / "trained/\udcfe.png")
    assert inputs.digests(asked) != first


@pytest.mark.parametrize("named", ["ev.1", "ev.1.npz", "ev.1.json"])
def test_all_files_of_evidence_count_however_it_is_named(here: Path, named: str) -> None:
    asked = Recipe(evidence=named)
    before = inputs.digests(asked)
    for file in ("ev.1.json", "ev.1.npz"):
        (here / file).write_text(f"other {file}")
        assert inputs.digests(asked) != before
        before = inputs.digests(asked)


def test_the_code_of_ones_own_network_counts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = here / "own_code_of_a_network.py"
    file.write_text("from tiny import network\n")
    monkeypatch.syspath_prepend(str(here))
    asked = Network("own_code_of_a_network:network")
    asked.load()
    before = inputs.digests(asked)
    assert list(before) == ["model"]
    file.write_text("from tiny import network  # another\n")
    assert inputs.digests(asked) != before
    assert not inputs.digests(Network("lenet", "random"))


def claim(path: Path, asked: Recipe) -> RunFolder:
    digests = inputs.digests(asked)
    return RunFolder(path, config.plain(asked), command="x", inputs=digests, resume=True)


def test_files_with_other_contents_are_told(here: Path) -> None:
    claim(here / "out", recipe())
    claim(here / "out", recipe())
    os.utime("a.pth", (1, 1))
    claim(here / "out", recipe())
    (here / "a.pth").write_text("retrained")
    with pytest.raises(FolderError, match=r"Different: nets\.1\.weights \(its files hold"):
        claim(here / "out", recipe())


def test_files_may_be_moved(here: Path) -> None:
    claim(here / "out", recipe())
    (here / "a.pth").rename("b.pth")
    claim(here / "out", recipe("b.pth"))
    (here / "c.pth").write_text("another")
    with pytest.raises(FolderError, match=r"nets\.1\.weights \('b\.pth' against 'c\.pth'\)"):
        claim(here / "out", recipe("c.pth"))


def test_what_an_older_version_did_not_write_down_is_not_compared(here: Path) -> None:
    out = here / "out"
    claim(out, recipe())
    lines = (out / "config.yaml").read_text().splitlines()
    kept = [line for line in lines if "sha256" not in line]
    assert len(kept) == len(lines) - 3
    (out / "config.yaml").write_text("\n".join(kept) + "\n")
    claim(out, recipe())


def written(folder: Path, **network: str) -> list[str]:
    """The flags of a short inversion, whose recipe is written into the folder."""
    tree = {
        "networks": [{"model": "tiny:network", **network}],
        "images": 2,
        "labels": [0, 1],
        "attack": {"phases": [{"steps": 2, "jitter": 1}]},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(tree))
    return ["--config", str(folder / "r.yaml"), "--out", str(folder / "out")]


def test_a_run_does_not_go_on_with_other_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = jinv.models.load("tiny:network", None)
    state = weights_convert.from_flax(net.variables)
    weights_convert.write(tmp_path / "w.safetensors", state)
    flags = written(tmp_path, weights=str(tmp_path / "w.safetensors"))
    assert command_line.main(invert.COMMAND, flags) == 0
    assert command_line.main(invert.COMMAND, [*flags, "--resume"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    more = {k: v * np.float32(1.5) if v.dtype == np.float32 else v for k, v in state.items()}
    weights_convert.write(tmp_path / "w.safetensors", more)
    assert command_line.main(invert.COMMAND, [*flags, "--resume"]) == 2
    assert "networks.0.weights (its files hold something else" in capsys.readouterr().err


def test_values_that_are_only_said_may_be_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = written(tmp_path)
    assert command_line.main(invert.COMMAND, flags) == 0
    count = jinv.models.load("tiny:network", None).classes
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"name {i}" for i in range(count)))
    capsys.readouterr()
    mended = [*flags, "--resume", "--class-names", str(names)]
    assert command_line.main(invert.COMMAND, mended) == 0
    assert f"class_names (None against '{names}')" in capsys.readouterr().out
    (tmp_path / "out/summary.json").unlink()  # as if it had been cut before its end
    shutil.rmtree(tmp_path / "out/images")
    assert command_line.main(invert.COMMAND, mended) == 0
    assert (tmp_path / "out/images/001_class001_name-1.png").exists()
