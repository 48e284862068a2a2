"""`jinv classify` as its user meets it: real networks on photographs, folders, mistakes."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jinv import image, models
from jinv.models import registry
from jinv.recipes import classify
from jinv.runs import command_line
from jinv.runs.progress import Progress

CHELSEA, COFFEE = (f"package:skimage/data/{name}.png" for name in ("chelsea", "coffee"))
CHINA = "package:sklearn/datasets/images/china.jpg"


def run(*arguments: str | Path) -> int:
    return command_line.main(classify.COMMAND, list(map(str, arguments)))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (
            "mobilenet_v2",
            "torchvision's IMAGENET1K_V1), images of 224 x 224 px out of 256, bilinea",
        ),
        ("efficientnet_lite0", "(package), images of 224 x 224 px, bicubic"),
    ],
)
def test_real_networks_know_photographs(
    name: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cat (281 to 287), an espresso (967) and a palace (698), with and without a folder."""
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    try:
        models.packaged_weights(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    given = (CHELSEA, COFFEE, CHINA, "--model", name)
    assert run(*given, "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert shown in told
    pictures = json.loads((tmp_path / "out" / "summary.json").read_text())["pictures"]
    assert [Path(one["file"]).name for one in pictures] == [
        "chelsea.png",
        "coffee.png",
        "china.jpg",
    ]
    classes = [[top["class"] for top in one["top"]] for one in pictures]
    cats = {
        "mobilenet_v2": [285, 282, 281, 287, 728],  # torchvision's own, in test_published
        "efficientnet_lite0": [282, 285, 281, 287, 904],
    }
    assert classes[0] == cats[name]
    assert [top[0] for top in classes[1:]] == [967, 698]
    assert {len(top) for top in classes} == {5}
    if name == "efficientnet_lite0":
        logits = np.array([9.257, 9.074, 8.362])
        found = np.log([top["probability"] for top in pictures[0]["top"][:3]])
        np.testing.assert_allclose(found - found[0], logits - logits[0], atol=2e-3)
    report = (tmp_path / "out" / "report.html").read_text()
    for word in ("chelsea.png", "espresso", "palace"):
        assert word in report
    assert "espresso" in told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five photographs in folders, one of them lying on its side."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photographs"
    (root / "b" / "c").mkdir(parents=True)
    for name in ("1.png", "b/2.png", "b/c/3.png", "b/c/4.png"):
        Image.fromarray(rng.integers(0, 256, (50, 60, 3), np.uint8)).save(root / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(root / "1.png").transpose(Image.Transpose.ROTATE_90)
    turned.save(root / "b" / "turned.png", exif=exif)
    (root / "notes.txt").write_text("no picture")
    return root


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_probabilities_are_the_softmax_of_the_logits(
    folder: Path, tmp_path: Path, batch: int
) -> None:
    """Of every picture in its order, however many at once; a summary and what it is of."""
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"kind {i}" for i in range(4)))
    out = tmp_path / "out"
    arguments = ("--model", "resnet20_cifar", "--weights", "random", "--classes", "4")
    more = ("--class-names", names, "--top", "9", "--batch", batch)
    assert run(folder, *arguments, *more, "--out", out) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["model"], summary["weights"]) == ("resnet20_cifar", "random")
    assert summary["published"] is None
    assert summary["preprocessing"]["size"] == 32

    files = ["1.png", "b/2.png", "b/turned.png", "b/c/3.png", "b/c/4.png"]
    assert [one["file"] for one in summary["pictures"]] == [str(folder / file) for file in files]
    net = models.load("resnet20_cifar", None, classes=4)
    upright = ["1.png", "b/2.png", "1.png", "b/c/3.png", "b/c/4.png"]
    images = image.stack_square([Image.open(folder / f) for f in upright], net.preprocessing)
    expected = np.asarray(jax.nn.softmax(net(jnp.asarray(images)).logits))
    for one, row in zip(summary["pictures"], expected, strict=True):
        order = np.argsort(-row)
        assert [top["class"] for top in one["top"]] == order.tolist()
        assert [top["name"] for top in one["top"]] == [f"kind {i}" for i in order]
        found = [top["probability"] for top in one["top"]]
        np.testing.assert_allclose(found, row[order], atol=1e-5)


def test_pictures_come_as_the_networks_preprocessing_wants_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network's own resizing and interpolation, not the readers' usual ones."""
    name, out = "resnet20_cifar", tmp_path / "out"
    usual = models.entry(name)
    space = dataclasses.replace(usual.preprocessing, resize=32, interpolation="bilinear")
    changed = dataclasses.replace(usual, preprocessing=space)
    monkeypatch.setitem(registry._REGISTRY, name, changed)
    assert run(folder / "1.png", "--model", name, "--weights", "random", "--out", out) == 0
    found = json.loads((out / "summary.json").read_text())["pictures"][0]["top"][0]
    net = models.load(name, None)

    def expected(space: image.Preprocessing) -> float:
        images = image.stack_square([Image.open(folder / "1.png")], space)
        return float(jax.nn.softmax(net(jnp.asarray(images)).logits)[0, found["class"]])

    assert found["probability"] == pytest.approx(expected(space), abs=1e-5)
    assert found["probability"] != pytest.approx(expected(usual.preprocessing), abs=1e-3)


def test_a_long_report_says_what_it_leaves_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classify, "_SHOWN", 3)
    out = tmp_path / "out"
    assert run(folder, "--model", "lenet", "--weights", "random", "--out", out, "--batch", "2") == 0
    report = (out / "report.html").read_text()
    assert report.count("<img") == 3
    assert "2 more are in summary.json" in report


def test_mistakes_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lenet = ("--model", "lenet", "--weights", "random")
    (folder / "empty").mkdir()
    (folder / "broken.jpg").write_bytes(b"")
    (folder / "b" / "back").symlink_to(folder)
    for arguments, message in (
        ((folder / "gone.png", *lenet), "gone.png: [Errno 2] No such file"),
        ((folder / "broken.jpg", *lenet), "broken.jpg: it is empty"),
        ((folder / "empty", *lenet), "empty holds no pictures (.jpg"),
        ((folder, *lenet), "back leads back to a folder that holds it"),
        ((folder / "1.png", "--model", "lennet", "--weights", "random"), "did you mean lenet?"),
        ((folder / "1.png", "--model", "lenet"), "no package holds weights of lenet"),
        ((folder / "1.png", *lenet, "--top", "0"), "top must be a whole number of at least 1"),
        (
            (folder / "1.png", *lenet, "--class-names", "imagenet"),
            "imagenet names 1000 classes; the network has 10",
        ),
    ):
        try:
            code = run(*arguments)
        except SystemExit as stop:  # of the parser, whose message is in a box
            code = stop.code
        assert code == 2
        assert message in " ".join(capsys.readouterr().err.split())
    for flag in ("--resume", "--overwrite"):
        with pytest.raises(SystemExit) as stop:
            run(folder / "1.png", *lenet, flag)
        assert stop.value.code == 2
        assert "--out FOLDER is missing" in capsys.readouterr().err


def test_a_file_name_does_not_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    odd = tmp_path / "\x1b[2Jb\udcff.png"
    (tmp_path / "a.png").rename(odd)
    assert run(tmp_path, "--model", "lenet", "--weights", "random", "--out", tmp_path / "out") == 0
    assert "?[2Jb?.png" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told["pictures"][0]["file"] == str(odd)


def test_it_stops_without_a_folder_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update = Progress.update

    def stop(self: Progress, *arguments: object) -> None:
        update(self, *arguments)  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "update", stop)
    arguments = ("--model", "lenet", "--weights", "random", "--batch", "2")
    assert run(folder, *arguments) == 130
    assert "stopped after 2 pictures" in capsys.readouterr().err
