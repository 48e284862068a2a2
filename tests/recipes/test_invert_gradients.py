"""The command from config to report: what it writes, refuses, and goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import weights_convert
from jinv import models
from jinv.federated import evidence
from jinv.recipes import invert_gradients
from jinv.runs import attack_run, command_line
from jinv.scores import similarity

SUMMARY_KEYS = {
    *("model", "device", "evidence", "steps", "seeds", "seconds", "seconds_per_step"),
    *("compile_seconds", "loss", "distance", "distances", "chosen_seed", "terms", "scores"),
    *("bn_only", "per_image", "not_available", "label_methods", "labels", "files", "versions"),
}
SCORES = {"psnr", "ssim", "lpips", "fft_2d", "iip"}


def write(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def run(*args: Any) -> int:
    return command_line.main(invert_gradients.COMMAND, [str(arg) for arg in args])


def pictures(folder: Path, count: int = 2) -> list[str]:
    rng = np.random.default_rng(0)
    files = []
    for i in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        files.append(str(folder / f"picture_{i}.png"))
        Image.fromarray(coarse).resize((20, 20)).save(files[-1])
    return files


def recipe(folder: Path) -> dict[str, Any]:
    return {
        "network": {"model": "resnet20_cifar", "weights": "random"},
        "client": {"files": pictures(folder), "classes": [3, 7], "statistics": "exact"},
        "labels": "identity",
        "size": 16,
        "attack": {"steps": 6, "warmup": 2, "seeds": 2, "group_from": 2, "group_every": 2},
        "run": {"chunk": 2, "pictures_every": 4, "scores_every": 4, "checkpoint_seconds": 0},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    out = folder / "out"
    assert run("--config", write(folder, recipe(folder)), "--out", out) == 0
    return out


def test_writes_what_it_promises(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    assert set(summary["scores"]) == set(summary["bn_only"]) == SCORES
    assert summary["scores"]["lpips"] is None
    assert "vgg16" in summary["not_available"]["lpips"]
    assert summary["labels"]["truth"] == [3, 7]
    assert set(summary["label_methods"]) == {"minimum", "identity", "ilrg", "llg"}
    assert summary["evidence"]["statistics"] == "exact"
    assert summary["chosen_seed"] == int(np.argmin(summary["distances"]))
    assert set(summary["terms"]) == {"gradient", "batch_norm", "tv_l2", "l2", "group"}
    assert sorted(p.name for p in (finished / "images").iterdir()) == [
        "000_reconstruction.png",
        "001_reconstruction.png",
    ]
    assert Image.open(finished / "grid.png").size == (2 + 2 * 18, 2 + 3 * 18)
    page = (finished / "report.html").read_text()
    for words in ("BatchNorm statistics alone", "not available", "linear assignment", "ilrg"):
        assert words in page


def test_scores_are_those_of_the_pictures_it_wrote(finished: Path) -> None:
    """PSNR, computed again from the files, in the originals' order."""
    summary = json.loads((finished / "summary.json").read_text())
    tree = yaml.safe_load((finished / "config.yaml").read_text())
    loaded = invert_gradients.GradientInversion(invert_gradients.COMMAND.recipe_from(tree))
    assert loaded.scorer is not None
    truth = loaded.scorer.truth
    files = sorted((finished / "images").iterdir())
    found = np.stack([np.asarray(Image.open(file)) / 255 for file in files])
    # The files are rounded to bytes, the scores are not.
    np.testing.assert_allclose(
        summary["per_image"]["psnr"], similarity.psnr(found, truth), atol=0.02
    )


def test_a_finished_run_is_kept(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = finished.parent / "recipe.yaml"
    before = (finished / "summary.json").read_bytes()
    assert run("--config", config, "--out", finished) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("--config", config, "--out", finished, "--resume") == 0
    assert (finished / "summary.json").read_bytes() == before


@pytest.fixture
def captured(tmp_path: Path) -> Path:
    """Evidence of a real client, as files."""
    net = models.load("lenet", None)
    rng = np.random.default_rng(0)
    held, _ = evidence.simulate(net, rng.normal(size=(1, 28, 28, 1)).astype(np.float32), [6])
    evidence.save(tmp_path / "client", held)
    return tmp_path / "client"


def lenet(**more: Any) -> dict[str, Any]:
    attack = {"preset": "dlg", "optimizer": "adam", "distance": "l2", "steps": 3}
    return {"network": {"model": "lenet", "weights": "random"}, "attack": attack, **more}


def test_evidence_of_a_real_client_is_attacked_without_its_images(
    tmp_path: Path, captured: Path
) -> None:
    config = write(tmp_path, lenet(evidence=str(captured)))
    assert run("--config", config, "--out", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["labels"] == {"method": "ilrg", "restored": [6]}
    assert summary["scores"] is summary["bn_only"] is summary["per_image"] is None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda s: s.pop("values.fc.0.bias"), "fc.0.bias"),
        (lambda s: s.update({"values.body.0.weight": np.zeros((2, 2))}), "body.0.weight"),
        (lambda s: s["values.fc.0.weight"].fill(np.nan), "fc.0.weight"),
    ],
    ids=["missing", "misshaped", "not a number"],
)
def test_wrong_evidence_is_refused_by_the_layers_name(
    damage: Any, words: str, tmp_path: Path, captured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = captured.with_suffix(".safetensors")
    state = {name: np.array(value) for name, value in weights_convert.read(file).items()}
    damage(state)
    weights_convert.write(file, state)
    config = write(tmp_path, lenet(evidence=str(captured)))
    assert run("--config", config, "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_compares_defences(tmp_path: Path) -> None:
    """Points of a curve by their names; the plain variant is the line across."""
    Image.fromarray(np.full((30, 30), 90, np.uint8)).save(tmp_path / "gray.png")
    tree = lenet(
        client={"files": [str(tmp_path / "gray.png")], "classes": [4], "statistics": "none"},
        variants={
            "none": {},
            "noise 0.1": {"client": {"defence": {"clip": 1, "noise_multiplier": 0.1}}},
            "noise 1": {"client": {"defence": {"clip": 1, "noise_multiplier": 1.0}}},
        },
    )
    assert run("--config", write(tmp_path, tree), "--out", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary) == {"runs", "variants", "seconds"}
    assert list(summary["variants"]) == ["none", "noise 0.1", "noise 1"]
    for found in summary["variants"].values():
        assert set(found) == {"trials", "psnr", "ssim", "iip", "labels", "epsilon"}
    epsilons = [found["epsilon"] for found in summary["variants"].values()]
    assert epsilons[0] is None
    assert epsilons[1] > epsilons[2] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Leakage against strength" in page


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"client": None}, "a client to simulate, or evidence"),
        ({"labels": "guess"}, "labels"),
        ({"client": {"files": ["nowhere.png"]}}, "nowhere.png"),
        ({"client": {"defence": {"noise_multiplier": 1.0}}}, "noise_multiplier is in units"),
    ],
)
def test_mistakes_are_told(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = lenet() | changes
    assert run("--config", write(tmp_path, tree), "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "changes", "words"),
    [
        ({}, {"original_classes": [10]}, "original_classes: 10 is no class of lenet, which"),
        ({}, {"originals": ["picture_0.png", "picture_1.png"]}, "1 images; 2 originals given"),
        ({}, {"originals": ["nowhere.png"]}, "nowhere.png"),
        ({}, {"class_names": "names.txt"}, "names.txt names 3 classes; the network has 10"),
        ({}, {"delta": 0}, "delta must be a number above 0 and below 1, not 0"),
        ({}, {"labels": "known", "original_classes": []}, "labels: known needs the classes"),
        ({}, {"attack": {"layers": {"fcc": 0}}}, "no layer's name begins with 'fcc'"),
        ({}, {"attack": {"optimizer_args": {"beta": 1}}}, "adam refuses its arguments"),
        ({}, {"size": 32}, "lenet cannot take"),
        ({}, {"lpips_vgg16": "nowhere.pth"}, "nowhere.pth"),
        ({"statistics": "Exact"}, {}, "statistics must be one of none, running"),
        ({"training": "false"}, {}, "training is true or false, not 'false'"),
        ({"images": 2.0}, {}, "images must be a whole number"),
        ({"imags": 2}, {}, "unknown key 'imags'; did you mean images?"),
    ],
    ids=str,
)
def test_what_is_wrong_from_the_start_is_told_before_the_first_step(
    told: dict[str, Any],
    changes: dict[str, Any],
    words: str,
    tmp_path: Path,
    captured: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attack_run, "run", lambda *_, **__: pytest.fail("a step is done"))
    pictures(tmp_path)
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    file = captured.with_suffix(".json")
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    tree = lenet(evidence="client", originals=["picture_0.png"], original_classes=[6])
    if len(changes.get("originals", ())) > 1:
        tree["original_classes"] = []
    attack = tree["attack"] | changes.pop("attack", {})
    config = write(tmp_path, tree | changes | {"attack": attack})
    assert run("--config", config, "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def of_arrays(folder: Path, shape: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """A config of a client of ten images of this shape in a NumPy file."""
    images = np.random.default_rng(0).integers(0, 256, (10, *shape), np.uint8)
    np.savez(folder / "test.npz", images=images, labels=np.arange(10) % 3)
    data = {"format": "arrays", "folder": str(folder)}
    client = {"images": 1, "distractors": 5, "statistics": "none", "data": data}
    return lenet(client=client, labels="identity") | more


@pytest.mark.parametrize(
    ("shape", "advice", "flags"),
    [
        ((20, 20, 3), "are 20 x 20 px: set size: 20\n", ("--size", "20")),
        ((20, 12, 1), "are 20 x 12 px: set size: [20, 12]\n", ("--size", "20", "12")),
    ],
)
def test_advice_about_sizes_can_be_followed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    shape: tuple[int, ...],
    advice: str,
    flags: tuple[str, ...],
) -> None:
    tree = of_arrays(tmp_path, shape, network={"model": "tiny:network"})
    how = ("--config", write(tmp_path, tree), "--out", tmp_path / "out")
    assert run(*how) == 2
    assert f"images of 16 x 16 px are wanted, the data's {advice}" in capsys.readouterr().err
    assert run(*how, *flags) == 0
    picture = Image.open(tmp_path / "out" / "images" / "000_reconstruction.png")
    assert picture.size == (shape[1], shape[0])
    size = yaml.safe_load(advice.partition("set ")[2])
    assert configured(tree | size).secret.images.shape == (1, *shape[:2], 3)


def configured(tree: dict[str, Any]) -> Any:
    return invert_gradients.GradientInversion(invert_gradients.COMMAND.recipe_from(tree))


@pytest.mark.parametrize("flags", [(), ("--size", "32"), ("--size", "28")])
def test_networks_of_a_fixed_size_get_no_such_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    tree = of_arrays(tmp_path, (32, 32, 1))
    assert run("--config", write(tmp_path, tree), "--out", tmp_path / "out", *flags) == 2
    told = capsys.readouterr().err
    assert "lenet cannot take images of 32 x 32 px (its own size is 28 x 28 px)" in told
    assert "set size" not in told


def test_a_gray_network_sees_the_luma_of_colours(tmp_path: Path) -> None:
    """Of arrays and of files, also in what reconstructions are compared with."""
    loaded = configured(of_arrays(tmp_path, (28, 28, 3)))
    with np.load(tmp_path / "test.npz") as file:
        everything = file["images"]
    luma = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in everything])
    scorer = loaded.scorer
    assert scorer is not None
    truth = np.rint(255 * scorer.truth).astype(int)
    assert (np.abs(luma[..., None] - truth).max((1, 2, 3)) == 0).sum() == 1
    assert scorer._candidates().shape == (6, 28, 28, 1)
    assert scorer(scorer.truth).scores["iip"] == 1

    Image.fromarray(everything[0]).save(tmp_path / "colour.png")
    client = {"files": [str(tmp_path / "colour.png")], "classes": [1], "statistics": "none"}
    scorer = configured(lenet(client=client)).scorer
    np.testing.assert_allclose(255 * scorer.truth[0, ..., 0], luma[0], atol=1e-3)


def test_a_colour_network_attacked_in_gray_is_scored_in_gray(tmp_path: Path) -> None:
    tree = of_arrays(tmp_path, (16, 16, 3), network={"model": "tiny:network"}, gray=True)
    scorer = configured(tree).scorer
    assert scorer._candidates().shape == (6, 16, 16, 1)
    assert scorer(scorer.truth).scores["iip"] == 1


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channels_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], channels: int
) -> None:
    tree = of_arrays(tmp_path, (28, 28, channels))
    assert run("--config", write(tmp_path, tree), "--out", tmp_path / "out") == 2
    message = f"images of {channels} channels cannot be shown to lenet, which takes 1"
    assert message in capsys.readouterr().err
