"""`make gpu-check` in sizes for a CPU: every part finishes, and its keys are those documented."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from conftest import CACHE, ROOT
from jinv import backend
from jinv.recipes import invert
from jinv.runs import config as configs

pytest.importorskip("torch")
pytest.importorskip("torchvision")
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check  # found through the path above
from benchmarks import reconstructor as timed
from benchmarks import timing
from gpu import command, hlo, kernels, layout, reconstructor, strided, switches
from gpu.layers import Layer

QUICK = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "OMP_NUM_THREADS": "1",  # PyTorch's threads would wait for those of other tests
    "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiling takes all the time
}


def check(out: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Status, JSON and what is printed."""
    done = subprocess.run(
        [sys.executable, "scripts/gpu_check.py", "--out", str(out), "--tiny", *options],
        cwd=ROOT,
        env={**os.environ, **QUICK},
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    return done.returncode, json.loads((out / "gpu_check.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    return check(tmp_path_factory.mktemp("gpu"), "--seconds", "600")


def rows(found: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return next(each["rows"] for each in found["parts"] if each["part"] == part)


def keys(tree: Any) -> set[str]:
    if isinstance(tree, dict):
        return set(tree) | set().union(*map(keys, tree.values()))
    return set().union(*map(keys, tree)) if isinstance(tree, list) else set()


@pytest.mark.slow
def test_every_part_finishes(checked: tuple[int, dict[str, Any], str]) -> None:
    status, found, printed = checked
    assert [(each["part"], each["status"]) for each in found["parts"]] == [
        (part, "finished") for part in gpu_check.SHARES
    ], printed
    assert status == 0
    assert all(each["rows"] for each in found["parts"])
    assert all(f"== {part}: finished" in printed for part in gpu_check.SHARES)


@pytest.mark.slow
def test_the_docstring_tells_every_key_and_no_other(
    checked: tuple[int, dict[str, Any], str],
) -> None:
    documented = gpu_check.__doc__.partition("In the JSON:")[2]
    headings = r"^ +(?:of .*|.*peers:)$"
    lines = re.sub(headings, "", documented, flags=re.MULTILINE).splitlines()
    # A key begins a line, and may share it with others.
    begun = [re.match(r" {4,6}(\w+(?:, \w+)*)(?: {2,}|$)", line) for line in lines]
    told = {key for match in begun if match for key in match[1].split(", ")}
    assert keys(checked[1]) == told | {"seconds", "position"}


@pytest.mark.slow
def test_every_switch_is_timed_in_all_its_positions(
    checked: tuple[int, dict[str, Any], str],
) -> None:
    found = rows(checked[1], "switches")
    fields = {field.name: field.type for field in dataclasses.fields(backend.Choices)}
    assert {row["switch"] for row in found} == {*fields, "dtype", "layout"}
    for row in found:
        named = [each["position"] for each in row["positions"]]
        assert len(set(named)) == len(named) >= 2
        assert all(each["ms"] > 0 for each in row["positions"])
        if row["switch"] in fields:
            assert row["now"] == str(getattr(backend.CPU, row["switch"]))
            assert row["verdict"] in ("keep", "change")


def test_a_part_that_fails_loses_nothing_and_is_told(tmp_path: Path) -> None:
    module = importlib.import_module("gpu.part")
    given = module.Given("steps", tmp_path, True)
    given.emit(case="one", ms=1.5)
    given.emit(case="two", ms=None)
    found = gpu_check.run_part("no_such_part", tmp_path, True, 60)
    assert found["status"] == "failed"
    assert found["rows"] == []
    assert "No module named 'gpu.no_such_part'" in (tmp_path / "no_such_part.log").read_text()
    gpu_check.write(tmp_path, [{**found, "rows": [{"case": "one", "ms": 1.5}]}], 3.0)
    assert json.loads((tmp_path / "gpu_check.json").read_text())["parts"][0]["rows"]
    assert "one          1.5" in (tmp_path / "gpu_check.txt").read_text()


def test_a_part_without_time_is_ended_or_skipped(tmp_path: Path) -> None:
    assert gpu_check.run_part("steps", tmp_path, True, 1.0)["status"] == "skipped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "LEAST", 0)
        found = gpu_check.run_part("steps", tmp_path, True, 0.2)
    assert found["status"] == "out of time"
    assert found["seconds"] < 5


def test_time_that_runs_out_is_no_failure(tmp_path: Path) -> None:
    status, found, _ = check(tmp_path, "--parts", "steps", "--seconds", "1")
    assert [each["status"] for each in found["parts"]] == ["skipped"]
    assert status == 0


def spread(ms: float, width: float = 0.001) -> timing.Spread:
    return timing.Spread(ms, [ms - width, ms + width])


@pytest.mark.parametrize(
    ("now", "other", "verdict"),
    [
        (spread(1.0), spread(0.9), "change"),
        (spread(1.0), spread(1.1), "keep"),
        (spread(1.0), spread(0.98), "keep"),  # within 3%
        (spread(1.0, 0.2), spread(0.9, 0.2), "keep"),  # within the quartiles
    ],
)
def test_a_switch_changes_only_for_a_clear_gain(
    now: timing.Spread, other: timing.Spread, verdict: str
) -> None:
    found = switches.row("remat", "case", "float32", "False", {"False": now, "True": other})
    assert found["verdict"] == verdict
    assert switches.row("dtype", "case", "all", None, {"a": now, "b": other})["verdict"] is None


LAYERS = dict.fromkeys([*sum(switches.LAYERS.values(), ()), *strided.LAYERS, *layout.LAYERS])


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer} {layer.dtype}")
def test_layers_in_full_size_fit_together(layer: Layer) -> None:
    """Which `--tiny` does not see."""

    def shape(*lengths: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(lengths, layer.dtype)

    kernel, side = max(layer.kernel, 1), -(-layer.size // layer.stride)
    weight = shape(kernel, kernel, layer.inputs // layer.groups, layer.outputs)
    out = shape(layer.batch, side, side, layer.outputs)
    images = shape(layer.batch, layer.size, layer.size, layer.inputs)
    found, mean, var = jax.eval_shape(layer, weight, out, images)
    assert found == out
    assert mean.shape == var.shape == (layer.outputs,)


@pytest.mark.parametrize("network", ["mobilenet_v2", "resnet50"])
def test_the_command_is_given_a_config_it_takes(network: str) -> None:
    config = configs.build(invert.Config, command.settings(network, tiny=False))
    assert (config.images, config.size) == (84, 224)
    assert [phase.steps for phase in config.attack.phases] == [400, 200]


# What XLA writes for an H100, shortened.
HLO = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%fused_add (param_0: bf16[2,3]) -> bf16[2,3] {
  %param_0 = bf16[2,3]{1,0} parameter(0)
  ROOT %add = bf16[2,3]{1,0} add(%param_0, %param_0)
}

%body (arg: (s32[], bf16[2,3])) -> (s32[], bf16[2,3]) {
  %arg = (s32[], /*index=1*/bf16[2,3]{1,0}) parameter(0)
  %element = bf16[2,3]{1,0} get-tuple-element(%arg), index=1
  %loop_add_fusion.5 = bf16[2,3]{1,0} fusion(%element), kind=kLoop, calls=%fused_add, \
metadata={op_name="jit(step)/jvp()/add" scheduling_name="loop_add_fusion.5"}
  %cudnn-conv.1 = (bf16[2,3]{1,0}, u8[0]{0}) custom-call(%loop_add_fusion.5, %element), \
custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/conv_general_dilated"}
  ROOT %tuple = (s32[], bf16[2,3]{1,0}) tuple(%element, %element)
}

ENTRY %main.3 (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %input_reduce_fusion.2 = f32[] fusion(%x), kind=kInput, calls=%fused_reduce
  %start = (s32[], bf16[2,3]{1,0}) tuple(%x)
  %while.1 = (s32[], bf16[2,3]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %copy.7 = f32[4]{0} copy(%x)
}
"""


def test_kernels_of_a_program_and_of_its_loop_are_weighed() -> None:
    found = {kernel.name: kernel for kernel in hlo.kernels(HLO)}
    assert {name: (kernel.kind, kernel.bytes) for name, kernel in found.items()} == {
        "input_reduce_fusion.2": ("reduction", 16 + 4),
        "loop_add_fusion.5": ("loop fusion", 12 + 12),
        "cudnn-conv.1": ("convolution", 12 + 12 + 12),
        "copy.7": ("copy", 16 + 16),
    }
    assert found["cudnn-conv.1"].shape == "(bf16[2,3], u8[0])"
    assert found["loop_add_fusion.5"].op_name == "jit(step)/jvp()/add"


def test_times_of_a_gpu_profile_are_those_of_its_streams(tmp_path: Path) -> None:
    """A kernel without the name of its instruction is found by its own; others stand alone."""
    import gzip

    def line(pid: int, tid: int, name: str) -> list[dict[str, Any]]:
        return [{"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}]

    def event(tid: int, name: str, dur: float, **args: str) -> dict[str, Any]:
        return {"ph": "X", "pid": 1, "tid": tid, "ts": 0, "dur": dur, "name": name, "args": args}

    events = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
        *line(1, 7, "Stream #16(Compute)"),
        *line(1, 8, "XLA Ops"),
        event(7, "sm90_xmma_fprop", 3000, hlo_op="cudnn-conv.1"),
        event(7, "sm90_xmma_fprop", 1000, hlo_op="cudnn-conv.1"),
        event(7, "loop_add_fusion_5", 500),
        event(7, "MemcpyD2D", 250),
        event(8, "cudnn-conv.1", 4000, hlo_op="cudnn-conv.1"),
        {"ph": "X", "pid": 2, "tid": 1, "ts": 0, "dur": 9000, "name": "python", "args": {}},
        {},
    ]
    file = tmp_path / "plugins/profile/1/host.trace.json.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    spent = kernels.milliseconds(tmp_path)
    assert spent == {"cudnn-conv.1": 4.0, "loop_add_fusion_5": 0.5, "MemcpyD2D": 0.25}
    found = kernels.joined(hlo.kernels(HLO), spent)
    assert [(row["kernel"], row["ms"]) for row in found] == [
        ("cudnn-conv.1", 4.0),
        ("loop_add_fusion.5", 0.5),
        ("MemcpyD2D", 0.25),
        ("copy.7", None),
        ("input_reduce_fusion.2", None),
    ]
    np.testing.assert_allclose(found[0]["bytes_per_s"], 36 / 4e-3)
    sums = {row["kind"]: (row["count"], row["ms"]) for row in kernels.by_kind(found)}
    assert sums["convolution"] == (1, 4.0)
    assert sums["in the profile alone"] == (1, 0.25)


@pytest.mark.parametrize("case", timed.GPU_CASES, ids=str)
def test_reconstructors_in_full_size_fit_together(case: timed.Case) -> None:
    """A step of ours, without its arrays: which `--tiny` does not see."""
    sets = timed.SETS
    given = timed.Problem(
        images=np.zeros((1, 32, 32, case.channels), np.uint8),
        labels=np.zeros(1, np.int32),
        weights=np.zeros((1, 1), np.float32),
        indices=np.zeros((1, 10), np.int32),
        mean=np.zeros(case.inputs, np.float32),
        std=np.ones(case.inputs, np.float32),
    )
    net, step = timed.our_step(case, given)
    population, shadows = timed.our_data(given)
    weights = jax.ShapeDtypeStruct((sets, case.inputs), np.float32)
    indices = jax.ShapeDtypeStruct((sets, 10), np.int32)
    data = population, shadows._replace(weights=weights, indices=indices)
    state = jax.eval_shape(lambda key: timed.training.init(net, timed.CONFIG, key), timed.KEY)
    after, info = jax.eval_shape(step, timed.KEY, state, data)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )
    assert info.loss.dtype == np.float32
    assert reconstructor.PUBLISHED[case.data] > 0
