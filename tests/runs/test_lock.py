"""Folders of runs that are written by one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from jinv.recipes import invert
from jinv.runs import command_line, lock
from jinv.runs.run_folder import FolderError, RunFolder

HOLD = """
import pathlib, sys
from jinv.recipes import invert
from jinv.runs import command_line, lock
lock.hold(pathlib.Path(sys.argv[1]), "jinv invert", shared="shared" in sys.argv)
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    lock.release_all()


def holder(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Another process that holds the lock until it is ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_that_is_being_written_is_refused_and_stays(
    tmp_path: Path, how: dict[str, bool]
) -> None:
    RunFolder(tmp_path, {"a": 1}, command="invert").finish({"done": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = holder(tmp_path)
    with pytest.raises(FolderError) as caught:
        RunFolder(tmp_path, {"a": 1}, command="invert", **how)  # type: ignore[arg-type]
    assert f"written by process {other.pid} on " in str(caught.value)
    assert "`jinv invert`, since " in str(caught.value)
    other.kill()
    other.wait()
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != lock.NAME}
    assert after == before
    assert RunFolder(tmp_path, {"a": 1}, command="invert", resume=True).finished


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    other = holder(tmp_path)
    with pytest.raises(BlockingIOError):
        lock.hold(tmp_path, "mine")
    other.kill()
    other.wait()
    assert lock.hold(tmp_path, "mine")
    assert f"process {os.getpid()}" in (tmp_path / lock.NAME).read_text()
    assert not lock.hold(tmp_path, "mine")  # this process has it


def test_processes_that_share_a_folder_keep_others_out_till_the_last(tmp_path: Path) -> None:
    one, two = holder(tmp_path, "shared"), holder(tmp_path, "shared")
    assert lock.hold(tmp_path, "mine", shared=True)
    lock.release(tmp_path)
    assert (tmp_path / lock.NAME).exists()
    one.kill()
    one.wait()
    with pytest.raises(BlockingIOError):
        lock.hold(tmp_path, "mine")
    two.communicate("\n")
    assert lock.hold(tmp_path, "mine")
    lock.release(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_leaves_no_lock(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", {"a": 1})
    part = folder.part("below")
    assert (folder.path / lock.NAME).exists()
    part.finish({})
    folder.finish({})
    assert not list(tmp_path.rglob(lock.NAME))


def test_a_refused_folder_is_not_locked(tmp_path: Path) -> None:
    RunFolder(tmp_path, {"a": 1}).finish({})
    with pytest.raises(FolderError, match="holds a finished run"):
        RunFolder(tmp_path, {"a": 1})
    assert not (tmp_path / lock.NAME).exists()


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--overwrite",)])
def test_a_command_leaves_the_run_of_another_process_alone(
    tmp_path: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {
        "networks": [{"model": "tiny:network"}],
        "images": 2,
        "labels": [0, 1],
        "attack": {"phases": [{"steps": 1, "jitter": 1}]},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    arguments = ["--config", str(tmp_path / "r.yaml"), "--out", str(out)]
    out.mkdir()
    other = holder(out)
    assert command_line.main(invert.COMMAND, [*arguments, *flags]) == 2
    assert f"process {other.pid} on" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [lock.NAME]
    other.communicate("\n")
    assert command_line.main(invert.COMMAND, [*arguments, *flags]) == 0
    assert (out / "summary.json").exists()
    assert not (out / lock.NAME).exists()
