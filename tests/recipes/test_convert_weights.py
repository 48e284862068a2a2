"""A conversion leaves alone what others wrote: summaries, weights, folders of trained networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import jinv
import weights_convert
from jinv.recipes import convert_weights


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    state = weights_convert.from_flax(jinv.models.load("lenet", None).variables)
    weights_convert.write(path, state)
    return path


def convert(source: Path, output: Path, *flags: str) -> int:
    arguments = ["--input", str(source), "--model", "lenet", "--output", str(output), *flags]
    return convert_weights.main(arguments)


def test_a_trained_network_beside_it_keeps_its_summary(tmp_path: Path, source: Path) -> None:
    for name, text in (("summary.json", '{"model": "lenet"}'), ("weights.safetensors", "w")):
        (tmp_path / name).write_text(text)
    for flags in ((), ("--overwrite",)):
        assert convert(source, tmp_path / "weights.pth", *flags) == 0
        assert (tmp_path / "summary.json").read_text() == '{"model": "lenet"}'
    told = json.loads((tmp_path / "weights.pth.summary.json").read_text())
    assert told["model"] == "lenet"
    assert told["output"] == str(tmp_path / "weights.pth")


@pytest.mark.parametrize("summary", [None, "{}", "[1]", "no JSON", '{"input_sha256": 1}'])
def test_a_file_that_no_conversion_wrote_is_not_overwritten(
    tmp_path: Path, source: Path, summary: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "weights.safetensors"
    output.write_text("mine")
    if summary is not None:
        (tmp_path / "summary.json").write_text(summary)
    for flags in ((), ("--overwrite",)):
        assert convert(source, output, *flags) == 2
        assert "no conversion wrote it; remove it or choose" in capsys.readouterr().err
        assert output.read_text() == "mine"
    output.unlink()
    assert convert(source, output) == 0


def test_two_conversions_share_a_folder(tmp_path: Path, source: Path) -> None:
    first, second = tmp_path / "a.pth", tmp_path / "b.pth"
    assert convert(source, first) == convert(source, second) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert json.loads(before["summary.json"])["output"] == str(first)
    assert json.loads(before["b.pth.summary.json"])["output"] == str(second)
    assert convert(source, second) == 2
    assert convert(source, second, "--overwrite") == 0
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"b.pth.summary.json"}
