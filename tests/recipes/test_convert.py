"""A conversion leaves alone what others wrote: summaries, weights, folders of trained networks."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jinv.__main__
import weights_convert
from jinv.models import parity, registry
from jinv.recipes import convert as command
from weights_convert import renames


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    state = weights_convert.from_flax(jinv.models.load("lenet", None).variables)
    weights_convert.write(path, state)
    return path


def convert(source: Path, output: Path, *flags: str) -> int:
    arguments = [
        "--input",
        str(source),
        "--model",
        "lenet",
        "--output",
        str(output),
        "--no-check",
        *flags,
    ]
    return command.main(arguments)


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


def state_of(name: str, classes: int | None = None) -> dict[str, np.ndarray]:
    """Random weights as torch lists them."""
    rng, wanted = np.random.default_rng(0), jinv.models.template(name, classes)
    draw = lambda v: rng.uniform(1, 2, v.shape).astype(v.dtype)  # noqa: E731
    return weights_convert.from_flax(jax.tree.map(draw, wanted))


def same(path: Path, state: dict[str, np.ndarray]) -> bool:
    found = weights_convert.read(path)
    return found.keys() == state.keys() and all(np.array_equal(found[n], state[n]) for n in state)


def trained_folder(folder: Path, state: dict[str, np.ndarray]) -> None:
    """What `jinv pretrain` leaves, as far as conversions look."""
    folder.mkdir()
    weights_convert.write(folder / "weights.safetensors", state)
    (folder / "summary.json").write_text(json.dumps({"model": "lenet", "classes": ["a", "b"]}))


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of all kinds of inputs, two of which are none."""
    monkeypatch.setattr(registry, "_ZOO", ("resnet20_cifar", "lenet"))  # the whole takes long
    folder = tmp_path / "in"
    folder.mkdir()
    weights_convert.write(folder / "lenet.safetensors", state_of("lenet"))
    wrapped = {f"module.{name}": value for name, value in state_of("lenet", 3).items()}
    weights_convert.write(folder / "other.pth", wrapped)
    trained_folder(folder / "run", state_of("lenet", 2))
    (folder / "broken.pt").write_text("<html>")
    weights_convert.write(folder / "unknown.pth", {"a.weight": np.ones((2, 2), np.float32)})
    (folder / "notes.txt").write_text("no weights")
    (folder / ".hidden.pth").write_text("no weights")
    (folder / "empty").mkdir()
    return folder


def test_a_folder_is_converted_as_far_as_it_can_be(
    tmp_path: Path, many: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["--input", str(many), "--output", str(out), "--no-check"]
    assert command.main(given) == 2
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.out.splitlines()] == [
        str(out / name) for name in ("lenet.pth", "other.safetensors", "run.pth")
    ]
    assert "lenet, 8 tensors" in said.out
    first, *failed = said.err.splitlines()
    assert first == "error: 2 of 5 were not converted"
    assert failed[0].startswith(f"error: {many / 'broken.pt'}: is a web page")
    assert failed[1].startswith(f"error: {many / 'unknown.pth'}: its names and shapes are of no")
    assert same(out / "lenet.pth", state_of("lenet"))
    assert same(out / "other.safetensors", state_of("lenet", 3))
    assert same(out / "run.pth", state_of("lenet", 2))
    written = {"lenet.pth", "other.safetensors", "run.pth"}
    assert {p.name for p in out.iterdir()} == written | {f"{n}.summary.json" for n in written}
    told = json.loads((out / "other.safetensors.summary.json").read_text())
    assert (told["model"], told["classes"], told["names"]) == ("lenet", 3, None)
    assert (told["parity"], told["not_compared"]) == (None, "--no-check")
    before = {p: p.read_bytes() for p in out.iterdir()}
    assert command.main(given) == 2
    assert "lenet.pth: exists; choose another output" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in out.iterdir()}
    assert command.main([*given, "--overwrite"]) == 2
    assert capsys.readouterr().err.startswith("error: 2 of 5 ")


def test_two_inputs_of_a_folder_do_not_share_an_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for suffix, classes in ((".pth", 3), (".pt", 4)):
        weights_convert.write(tmp_path / "in" / f"a{suffix}", state_of("lenet", classes))
    given = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--no-check"]
    assert command.main([*given, "--overwrite"]) == 2
    assert "a.safetensors is of another input" in capsys.readouterr().err
    assert same(tmp_path / "out" / "a.safetensors", state_of("lenet", 4))  # a.pt comes first


def test_both_directions_and_a_trained_network(tmp_path: Path) -> None:
    state = state_of("lenet", 2)
    trained_folder(tmp_path / "run", state)
    assert (
        command.main(["--input", str(tmp_path / "run"), "--output", str(tmp_path / "a.pth")]) == 0
    )
    assert same(tmp_path / "a.pth", state)
    there = ["--input", str(tmp_path / "a.pth"), "--output", str(tmp_path / "out"), "--no-check"]
    assert command.main(there) == 0
    assert same(tmp_path / "out" / "a.safetensors", state)
    back = ["--input", str(tmp_path / "out" / "a.safetensors"), "--output", str(tmp_path / "out")]
    assert command.main([*back, "--no-check"]) == 0
    assert (tmp_path / "out" / "a.pth").read_bytes() == (tmp_path / "a.pth").read_bytes()
    torch = pytest.importorskip("torch")
    assert torch.load(tmp_path / "out" / "a.pth", weights_only=True).keys() == state.keys()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--input", "in", "--output", "one.pth"], "--output one.pth is one file, but the input"),
        (["--input", "in/empty", "--output", "out"], "in/empty: holds no weights (.pth.tar, .pth,"),
        (["--input", "nowhere", "--output", "out"], "nowhere: does not exist"),
        (["--input", "in/lenet.safetensors", "--output", "x.npz"], "the suffix '.npz' names no"),
    ],
)
@pytest.mark.usefixtures("many")
def test_what_cannot_be_done_is_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main([*given, "--no-check"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"in"}


def test_nothing_is_kept_that_differs_from_torchvision(
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out" / "w.pth"
    given = ["--input", str(source), "--model", "lenet", "--output", str(output)]
    for found in (2e-4, float("nan")):
        monkeypatch.setattr(parity, "difference", lambda net, weights, found=found: found)
        assert command.main(given) == 2
        assert f"{output}: jinv's logits differ from torchvision's by" in capsys.readouterr().err
        assert not list(output.parent.iterdir())
    monkeypatch.setattr(parity, "difference", lambda net, weights: 1e-6)
    assert command.main(given) == 0
    assert "within 1.0e-06 of torchvision" in capsys.readouterr().out
    assert json.loads((output.parent / "summary.json").read_text())["parity"] == 1e-6


def test_the_line_says_that_names_alone_do_not_tell_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = state_of("mobilenet_v2", 3)
    (names,) = [n for whose, n in renames.namings(state) if whose == "timm's"]
    weights_convert.write(tmp_path / "w.pth", {names[name]: v for name, v in state.items()})
    given = ["--input", str(tmp_path / "w.pth"), "--output", str(tmp_path / "out"), "--no-check"]
    assert command.main([*given, "--model", "mobilenet_v2", "--classes", "3"]) == 0
    said = capsys.readouterr().out
    assert "renamed from timm's names (they and the shapes fit; only its accuracy tells" in said
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["names"] == "timm's"
    assert same(tmp_path / "out" / "w.safetensors", state)


def test_the_old_name_of_the_command_works_and_says_the_new_one(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jinv.__main__.main(["convert-weights", "--input", str(source), "--list"]) == 0
    said = capsys.readouterr()
    assert said.err == "`jinv convert-weights` is `jinv convert` now\n"
    assert jinv.__main__.main(["convert", "--input", str(source), "--list"]) == 0
    assert capsys.readouterr().out == said.out
