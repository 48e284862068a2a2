"""Devices and processes: where arrays lie, who is asked to join, what two processes find."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import PartitionSpec
from PIL import Image

import recipe_examples
from conftest import CACHE, ROOT
from jinv import parallel

RECIPE: dict[str, Any] = {
    "networks": [
        {"model": "tiny:network", "name": "a"},
        {"model": "tiny:network", "name": "b", "classes": 9},
    ],
    "judges": [{"model": "tiny:network", "name": "judge"}],
    "images": 4,
    "labels": [3, 5],
    "size": 16,
    "attack": {"warmup": 2, "phases": [{"steps": 20, "jitter": 2}]},
    "run": {"chunk": 2, "pictures_every": 10, "scores_every": 10, "checkpoint_seconds": 0},
}


# --- one process ---------------------------------------------------------------------------------


def test_launchers_are_recognised() -> None:
    slurm = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}
    assert parallel.launcher(slurm) == "SLURM"
    assert parallel.launcher(slurm | {"SLURM_NTASKS": "1"}) is None
    assert parallel.launcher({"OMPI_COMM_WORLD_SIZE": "4"}) == "Open MPI"
    assert parallel.launcher({"OMPI_COMM_WORLD_SIZE": "1"}) is None
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert parallel.launcher(pod) is None
    assert parallel.launcher(pod | {"JOB_COMPLETION_INDEX": "0"}) == "Kubernetes"
    assert parallel.launcher({}) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("h:1", None, None), "go together"),
        ((None, 2, 0), "go together"),
        (("h:1", 2, 2), "process_id must be 0 to 1, not 2"),
        (("host", 2, 1), "coordinator must be HOST:PORT, not 'host'"),
    ],
)
def test_half_a_request_to_join_is_an_error(given: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallel.start(*given)


def test_alone_there_is_nobody_to_ask() -> None:
    parallel.start()
    assert parallel.is_main()
    assert parallel.any_process(True)
    assert not parallel.any_process(False)
    assert parallel.first_failure("broken") == "broken"
    assert parallel.first_failure(None) is None
    with pytest.raises(OSError, match="gone"):
        parallel.on_main(lambda: (_ for _ in ()).throw(OSError("gone")), OSError)


def test_one_device_is_a_mesh_too() -> None:
    mesh = parallel.mesh(parallel.BATCH, jax.devices()[:1])
    batch = parallel.put(mesh, PartitionSpec(parallel.BATCH), jnp.arange(3))
    tree = parallel.put(mesh, PartitionSpec(), {"w": jnp.ones(2)})
    assert batch.sharding.is_equivalent_to(tree["w"].sharding, 1)
    np.testing.assert_array_equal(parallel.fetch(batch), [0, 1, 2])


# --- two processes -------------------------------------------------------------------------------


def free_port(lowest: int = 20000) -> int:
    """Launchers' ports follow from the number of the job, from 61440 on."""
    for port in range(lowest + os.getpid() % 3000, 65536):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise OSError(f"no free port above {lowest}")


def flags(i: int, port: int) -> tuple[list[str], dict[str, str]]:
    given = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id", str(i)]
    return given, {}


def slurm(i: int, port: int) -> tuple[list[str], dict[str, str]]:
    return [], {
        "SLURM_JOB_ID": str(port - 61440),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i),
    }


def open_mpi(i: int, port: int) -> tuple[list[str], dict[str, str]]:
    return [], {
        "OMPI_MCA_orte_hnp_uri": f"{(port - 61440) << 12}.0;tcp://127.0.0.1:50000",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(i),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
    }


def start(
    recipe: Path, out: Path, i: int, joined: Any, devices: int = 1, script: str = "invert"
) -> subprocess.Popen:
    arguments, environment = joined
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, f"scripts/{script}.py", "--config", recipe, "--out", out, *arguments]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def together(
    recipe: Path,
    out: Path,
    *extra: str,
    how: Any = flags,
    port: int = 0,
    devices: int = 1,
    script: str = "invert",
) -> list[tuple[int, str]]:
    """(exit code, output) of two processes that run the command together."""
    port = port or free_port()
    both = []
    for i in range(2):
        arguments, environment = how(i, port)
        both.append(start(recipe, out, i, ([*extra, *arguments], environment), devices, script))
    outputs = [process.communicate(timeout=300)[0] for process in both]
    return [(process.returncode, text) for process, text in zip(both, outputs, strict=True)]


def by_one(recipe: Path, out: Path, script: str = "invert") -> None:
    """Let one process run the command to its end."""
    process = start(recipe, out, 0, ([], {}), script=script)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text


def write(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def metrics_of(out: Path) -> np.ndarray:
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    return np.asarray([[float(value) for value in row.values()] for row in rows])


def pictures_of(out: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(f), int) for f in sorted((out / "images").iterdir())])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process finds."""
    folder = tmp_path_factory.mktemp("alone")
    by_one(write(folder, RECIPE), folder / "out")
    return folder / "out"


def assert_equal_runs(ours: Path, theirs: Path) -> None:
    np.testing.assert_allclose(metrics_of(ours), metrics_of(theirs), rtol=1e-3, atol=1e-5)
    assert np.abs(pictures_of(ours) - pictures_of(theirs)).mean() < 1


@pytest.mark.parametrize("placement", ["data", "networks"])
def test_two_processes_find_the_images_of_one(tmp_path: Path, alone: Path, placement: str) -> None:
    devices = 2 if placement == "data" else 1
    recipe = write(tmp_path, RECIPE | {"execution": {"placement": placement}})
    results = together(recipe, tmp_path / "out", devices=devices)
    assert [code for code, _ in results] == [0, 0], results
    assert_equal_runs(tmp_path / "out", alone)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["device"] == f"{2 * devices} x cpu"
    assert "report.html written" in results[0][1]
    assert "report.html written" not in results[1][1]
    assert results[1][1].count("step 10") == 0  # only one process speaks


def test_one_process_is_told_to_stop_and_both_resume(tmp_path: Path) -> None:
    """The signal comes to the process that does not write."""
    long = RECIPE | {"attack": {"warmup": 2, "phases": [{"steps": 60, "jitter": 2}]}}
    recipe, out, port = write(tmp_path, long), tmp_path / "out", free_port()
    both = [start(recipe, out, i, flags(i, port)) for i in range(2)]
    deadline = time.monotonic() + 200
    while not list((out / "checkpoints").glob("[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    both[1].send_signal(signal.SIGTERM)
    texts = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [143, 143], texts
    assert not (out / "summary.json").exists()
    stopped = len(metrics_of(out))
    assert 2 <= stopped < 60
    results = together(recipe, out, "--resume")
    assert [code for code, _ in results] == [0, 0], results
    steps = metrics_of(out)[:, 0]
    np.testing.assert_array_equal(steps, np.arange(60))


@pytest.mark.parametrize("how", [slurm, pytest.param(open_mpi, marks=pytest.mark.slow)])
def test_two_processes_meet_by_their_launcher(tmp_path: Path, alone: Path, how: Any) -> None:
    recipe, port = write(tmp_path, RECIPE), free_port(61441)
    results = together(recipe, tmp_path / "out", how=how, port=port)
    assert [code for code, _ in results] == [0, 0], results
    assert_equal_runs(tmp_path / "out", alone)


def test_a_mistake_in_one_process_stops_both(tmp_path: Path) -> None:
    """Before anything is computed, and both say which process and which network."""
    good = RECIPE["networks"][0]
    recipes = []
    for i, networks in enumerate(([good], [good | {"weights": "gone.pth", "name": "lost"}])):
        folder = tmp_path / str(i)
        folder.mkdir()
        recipes.append(write(folder, RECIPE | {"networks": networks}))
    port = free_port()
    both = [start(recipes[i], tmp_path / "out", i, flags(i, port)) for i in range(2)]
    texts = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [2, 2], texts
    assert "process 1: cannot load lost" in texts[0]
    assert "cannot load lost" in texts[1]
    assert "Traceback" not in "".join(texts)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fails_the_writer_stops_both(tmp_path: Path) -> None:
    """The folder cannot be made: only process 0 tries."""
    (tmp_path / "file").write_text("")
    results = together(write(tmp_path, RECIPE), tmp_path / "file" / "out")
    assert [code for code, _ in results] == [2, 2], results
    assert all("cannot make the folder" in text for _, text in results)
    assert "Traceback" not in "".join(text for _, text in results)


def test_a_folder_in_use_is_refused_by_both(tmp_path: Path, alone: Path) -> None:
    recipe = write(tmp_path, RECIPE)
    results = together(recipe, alone)
    assert [code for code, _ in results] == [2, 2], results
    assert all("holds a finished run" in text for _, text in results)


def test_two_processes_share_the_batches_of_a_data_set(tmp_path: Path) -> None:
    """The same files as of one process; only one of them writes tables and summary."""
    tree = {
        "networks": [{"model": "tiny:network"}],
        "images_per_class": 2,
        "batch": 4,
        "attack": {"warmup": 2, "phases": [{"steps": 6, "jitter": 1}]},
    }
    recipe = write(tmp_path, tree)
    script = "synthesise_dataset"
    results = together(recipe, tmp_path / "both", script=script)
    assert [code for code, _ in results] == [0, 0], results
    by_one(recipe, tmp_path / "one", script)
    found = {}
    for name in ("both", "one"):
        files = [tmp_path / name / "images.csv", *(tmp_path / name / "train").rglob("*.png")]
        found[name] = {f.relative_to(tmp_path / name): f.read_bytes() for f in files}
    assert len(found["one"]) == 15
    assert found["both"] == found["one"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["generator", "inversion"])
def test_two_processes_share_a_distillation(tmp_path: Path, method: str) -> None:
    """Two devices each share every batch; the pool of images and the student are those of one."""
    tree = recipe_examples.distill(tmp_path) | {"run": {"test_every": 2}}
    if method == "inversion":
        tree.pop("generator")
        attack = {"phases": [{"steps": 3, "jitter": 1}], "warmup": 1, "adaptive": 5.0}
        tree |= {"gray": True, "inversion": {"batch": 8, "attack": attack}}
    recipe = write(tmp_path, tree)
    results = together(recipe, tmp_path / "both", devices=2, script="distill")
    assert [code for code, _ in results] == [0, 0], results
    by_one(recipe, tmp_path / "one", "distill")
    assert json.loads((tmp_path / "both/summary.json").read_text())["device"] == "4 x cpu"
    both, one = (np.load(tmp_path / name / "train.npz") for name in ("both", "one"))
    np.testing.assert_array_equal(both["labels"], one["labels"])
    apart = np.abs(both["images"].astype(int) - one["images"])
    # Adam follows the sign of rounding errors, from round to round more.
    assert apart[:8].max() <= 1
    assert apart.mean() < 2
    np.testing.assert_allclose(
        metrics_of(tmp_path / "both"), metrics_of(tmp_path / "one"), rtol=0.01, atol=1e-4
    )


COMMANDS = [
    command if command == "train-student" else pytest.param(command, marks=pytest.mark.slow)
    for command in recipe_examples.EXAMPLES
    if command != "search"  # runs in one process, and says so
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_in_two_processes(tmp_path: Path, command: str) -> None:
    """Neither waits for the other for ever, and one of them says what one alone would."""
    tree = recipe_examples.EXAMPLES[command](tmp_path)
    if command == "invert-gradients":
        tree["attack"]["seeds"] = 2  # one for each
    recipe = write(tmp_path, tree)
    script = {"synthesise": "synthesise_dataset"}.get(command, command.replace("-", "_"))
    results = together(recipe, tmp_path / "out", script=script)
    assert [code for code, _ in results] == [0, 0], results
    assert "written after" in results[0][1]
    assert "written after" not in results[1][1]
