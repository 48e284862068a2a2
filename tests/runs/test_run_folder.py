"""The folder of a run: what it refuses, what it removes, and what a checkpoint keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinv.runs.run_folder import FolderError, RunFolder

FILES = ("images/", "weights.bin")


def folder(path: Path, config: dict[str, Any] | None = None, **how: Any) -> RunFolder:
    settings = {"command": "test", "files": FILES, "free": ("run.", "seeds")} | how
    return RunFolder(path, config or {"lr": 0.1, "run": {"chunk": 1}, "seeds": 1}, **settings)


@pytest.mark.gpu
def test_a_checkpoint_is_of_the_moment_it_was_saved(tmp_path: Path) -> None:
    """The next step takes over the state's buffers while it is written in the background."""
    advance = jax.jit(lambda state: {"x": state["x"] + 1}, donate_argnums=0)
    own = folder(tmp_path / "run")
    state = {"x": jnp.zeros((512, 512))}
    with own.checkpoints() as manager:
        for step in range(1, 6):
            state = advance(state)
            own.metrics.add(step=step - 1, loss=float(step))
            own.save(manager, step, state, phase=0)
    later = folder(tmp_path / "run", resume=True)
    with later.checkpoints() as manager:
        template = {
            "x": jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=state["x"].sharding)
        }
        found = later.restore(manager, lambda meta: template)
    assert found is not None
    np.testing.assert_array_equal(found[1]["x"], 5.0)
    assert found[0]["phase"] == 0
    assert later.metrics.terms()["loss"] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_checkpoints_are_due_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("jinv.runs.run_folder.time.perf_counter", lambda: now[0])
    own = folder(tmp_path / "run")
    with own.checkpoints() as manager:
        assert own.due(0)
        assert not own.due(60)
        now[0] += 60
        assert own.due(60)
        own.save(manager, 1, {"x": jnp.zeros(2)})
        assert not own.due(60)


def test_overwriting_removes_what_is_declared(tmp_path: Path) -> None:
    own = folder(tmp_path / "run")
    (own.path / "images").mkdir()
    for name in ("images/000.png", "weights.bin", "notes.txt"):
        (own.path / name).write_text("x")
    own.finish({"a": 1})
    with pytest.raises(FolderError, match="holds a finished run"):
        folder(own.path)
    again = folder(own.path, overwrite=True)
    assert sorted(p.name for p in again.path.iterdir()) == [
        ".lock",
        "config.yaml",
        "notes.txt",
    ]
    assert not again.finished


def test_overwriting_leaves_pictures_of_others(tmp_path: Path) -> None:
    own = folder(tmp_path / "run", files=("images/", "progress/", "grid.png"))
    ours = ("images/000.png", "images/012_class003_cat.png", "progress/step_000100.png")
    theirs = ("images/holiday.png", "images/100.jpg", "progress/step_1.png", "images/a/000.png")
    for name in (*ours, *theirs, "grid.png"):
        (own.path / name).parent.mkdir(parents=True, exist_ok=True)
        (own.path / name).write_text("x")
    own.finish({})
    folder(own.path, files=("images/", "progress/", "grid.png"), overwrite=True)
    left = {str(p.relative_to(own.path)) for p in own.path.rglob("*") if p.is_file()}
    assert left == {*theirs, "config.yaml", ".lock"}


@pytest.mark.parametrize("name", ["summary.json", "checkpoints", "weights.bin"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_nobody_are_left_alone(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FolderError, match=f"no run known here has written .{name}"):
        folder(tmp_path, overwrite=overwrite)
    assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_run_of_another_command_is_left_alone(tmp_path: Path, how: dict[str, bool]) -> None:
    folder(tmp_path / "run", command="pretrain").finish({"accuracy": 1})
    with pytest.raises(FolderError, match="holds a run of `jinv pretrain`, not of `jinv test`"):
        folder(tmp_path / "run", **how)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"accuracy": 1}


def test_resuming_may_change_what_is_free(tmp_path: Path) -> None:
    folder(tmp_path / "run")
    folder(tmp_path / "run", {"lr": 0.1, "run": {"chunk": 9}, "seeds": 7}, resume=True)
    with pytest.raises(FolderError, match=r"lr \(0\.1 against 0\.2\)"):
        folder(tmp_path / "run", {"lr": 0.2, "run": {"chunk": 1}, "seeds": 1}, resume=True)


def test_a_folder_of_an_older_version_is_known(tmp_path: Path) -> None:
    """Its config names no command."""
    (tmp_path / "config.yaml").write_text("lr: 0.1\nrun: {chunk: 1}\nseeds: 1\n")
    assert not folder(tmp_path, resume=True).finished
    assert folder(tmp_path, overwrite=True).path == tmp_path


def test_more_may_be_asked_of_a_finished_run(tmp_path: Path) -> None:
    own = folder(tmp_path / "run")
    own.finish({})
    own.reopen({"lr": 0.1, "seeds": 9})
    assert not own.finished
    assert "seeds: 9" in (own.path / "config.yaml").read_text()
    assert not (own.path / "summary.json").exists()
