"""Variants and trials: what is run, what is compared, what survives being cut."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from jinv.recipes import invert
from jinv.runs import command_line, study
from jinv.runs import config as configs

A = {"model": "tiny:network", "classes": 10, "name": "a"}
B = A | {"name": "b", "terms": {"label": 0.5}}
RECIPE: dict[str, Any] = {
    "networks": [A, B],
    "judges": [
        A | {"name": "judge"},
        A | {"name": "b"},
    ],
    "images": 4,
    "labels": [3, 5],
    "size": 16,
    "attack": {"preset": "begin", "warmup": 2, "phases": [{"steps": 4, "jitter": 2}]},
    "run": {"chunk": 2, "pictures_every": 4, "scores_every": 5, "checkpoint_seconds": 0},
    "variants": {
        "together": {},
        "a alone": {"networks": [A]},
        "statistics": {"networks": [A | {"terms": {"label": 0.0}}]},
    },
}


def write(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def run(*args: Any) -> int:
    return command_line.main(invert.COMMAND, [str(arg) for arg in args])


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


recipe_from = invert.COMMAND.recipe_from


def runs_of(tree: dict[str, Any]) -> list[study.Run]:
    shared = {key: value for key, value in tree.items() if key != "variants"}
    return study.runs(invert.COMMAND, recipe_from(shared), tree.get("variants", {}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    assert run("--config", write(folder, RECIPE), "--out", folder / "out") == 0
    return folder / "out"


def test_variants_change_what_they_name_and_nothing_else() -> None:
    changes = {"other lr": {"attack": {"lr": 0.5}, "labels": [1]}, "same": {}}
    other, same = runs_of(RECIPE | {"variants": changes})
    assert (other.variant, other.folder) == ("other lr", "other-lr")
    assert other.config.attack.lr == 0.5
    assert other.config.labels == (1,)
    assert same.config == recipe_from({k: RECIPE[k] for k in RECIPE if k != "variants"})
    assert other.config.attack.warmup == same.config.attack.warmup == 2


def test_a_variant_may_name_a_preset_or_another_optimiser() -> None:
    sgd = {"optimizer": "sgd", "optimizer_args": {"momentum": 0.9}}
    changes = {"cifar": {"attack": {"preset": "cifar10", "lr": 0.3}}, "sgd": {"attack": sgd}}
    preset, other = runs_of(RECIPE | {"variants": changes})
    expected = dataclasses.replace(invert.PRESETS["cifar10"], lr=0.3)
    assert configs.plain(preset.config.attack) == configs.plain(expected)
    assert other.config.attack.optimizer_args == {"momentum": 0.9}
    assert other.config.attack.warmup == 2


def test_trials_have_seeds_of_their_own() -> None:
    found = runs_of(RECIPE | {"trials": 3, "seed": 7, "variants": {"x": {}, "y": {"trials": 1}}})
    assert [r.folder for r in found] == ["x/trial_0", "x/trial_1", "x/trial_2", "y"]
    assert [r.config.seed for r in found] == [7, 8, 9, 7]
    single = {key: value for key, value in RECIPE.items() if key != "variants"}
    assert [r.folder for r in runs_of(single | {"trials": 2})] == ["trial_0", "trial_1"]
    assert [r.folder for r in runs_of(single)] == [""]


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"x": {"imagse": 4}}, "variant 'x': .*imagse"),
        ({"x": {"networks": []}}, "variant 'x': networks must be a list of one or more mappings"),
        ({"a b": {}, "a-b": {}}, "different names"),
        ({"..": {}, "x": {}}, "cannot name a folder"),
        ({"checkpoints": {}}, "cannot name a folder"),
    ],
)
def test_variants_that_make_no_study_are_errors(variants: dict[str, Any], message: str) -> None:
    with pytest.raises(configs.ConfigError, match=message):
        runs_of(RECIPE | {"variants": variants})


def test_every_run_is_whole_and_one_page_compares_them(finished: Path) -> None:
    whole = summary(finished)
    assert list(whole["runs"]) == ["together", "a-alone", "statistics"]
    for folder, found in whole["runs"].items():
        assert summary(finished / folder) == found
        for file, _ in found["files"].items():
            assert Image.open(finished / folder / file).size == (16, 16)
    assert whole["held_out"] == ["judge"]
    assert whole["variants"]["together"]["inverted"] == ["a", "b"]
    assert set(whole["variants"]["a alone"]["top1"]) == {"a", "b", "judge"}
    page = (finished / "report.html").read_text()
    for text in ("together", "a alone", "statistics", "In no run had judge a say"):
        assert text in page
    assert page.count("<img") >= 3


def test_joint_runs_name_their_terms(finished: Path) -> None:
    terms = summary(finished / "together")["terms"]
    assert set(terms) == {"label[a]", "batch_norm[a]", "label[b]", "batch_norm[b]", "tv_l2"}
    assert set(summary(finished / "a-alone")["terms"]) == {"label", "batch_norm", "tv_l2"}


def test_images_from_statistics_alone_have_no_classes(finished: Path) -> None:
    found = summary(finished / "statistics")
    assert found["targets"] == []
    assert found["top1"] == found["confidence"] == {}
    assert set(found["mean_probability"]) == {"a", "b", "judge"}
    assert found["agreement"] is not None
    assert list(found["files"]) == [f"images/{i:03d}.png" for i in range(4)]
    assert set(found["terms"]) == {"batch_norm", "tv_l2"}


def test_diversity_and_agreement_are_of_the_written_images(finished: Path) -> None:
    found = summary(finished / "together")
    images = [
        np.asarray(Image.open(finished / "together" / file), float) / 255 for file in found["files"]
    ]
    pairs = [(0, 2), (1, 3)]  # classes 3, 5, 3, 5
    expected = np.mean([np.sqrt(np.mean((images[i] - images[j]) ** 2)) for i, j in pairs])
    assert found["diversity"]["pixels"] == pytest.approx(expected, rel=1e-6)
    assert found["agreement"] is None  # only one judge had no say
    assert 0 <= found["confidence"]["a"] <= 1


def test_a_cut_study_goes_on_where_it_was(finished: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", write(tmp_path, RECIPE)
    assert run("--config", recipe, "--out", out) == 0
    (out / "summary.json").unlink()
    (out / "statistics" / "summary.json").unlink()
    before = (out / "together" / "summary.json").stat().st_mtime_ns
    assert run("--config", recipe, "--out", out) == 2
    assert run("--config", recipe, "--out", out, "--resume") == 0
    assert (out / "together" / "summary.json").stat().st_mtime_ns == before
    for folder in ("together", "statistics"):
        assert summary(out)["runs"][folder]["files"] == summary(finished / folder)["files"]
    assert run("--config", recipe, "--out", out, "--resume") == 0
    assert run("--config", recipe, "--out", out, "--resume", "--attack.lr", 0.1) == 2
    assert run("--config", recipe, "--out", out, "--overwrite", "--images", 2) == 0
    assert all(found["images"] == 2 for found in summary(out)["runs"].values())


def test_an_overwriting_that_is_cut_leaves_nothing_old(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, recipe = tmp_path / "out", write(tmp_path, RECIPE)
    shutil.copytree(finished, out)

    def cut(self: invert.Inversion, own: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(invert.Inversion, "run", cut)
        assert run("--config", recipe, "--out", out, "--overwrite", "--images", 2) == 130
    assert not list(out.rglob("summary.json"))
    assert not list(out.rglob("grid.png"))
    assert run("--config", recipe, "--out", out, "--resume", "--images", 2) == 0
    assert all(found["images"] == 2 for found in summary(out)["runs"].values())


def test_a_mistake_in_the_last_variant_stops_before_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {"lost": {"networks": [A | {"weights": "gone.pth", "name": "missing"}]}}
    recipe = write(tmp_path, RECIPE | {"variants": {"together": {}} | lost})
    assert run("--config", recipe, "--out", tmp_path / "out") == 2
    assert "cannot load missing: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_trials_are_summed_up_with_their_spread(tmp_path: Path) -> None:
    single = {key: value for key, value in RECIPE.items() if key != "variants"}
    out = tmp_path / "out"
    assert run("--config", write(tmp_path, single | {"trials": 2}), "--out", out) == 0
    found = summary(out)
    first, second = found["runs"]["trial_0"], found["runs"]["trial_1"]
    assert first["files"] != second["files"]
    mean = found["variants"]["trials"]["top1"]["judge"]
    assert mean == pytest.approx((first["top1"]["judge"] + second["top1"]["judge"]) / 2)
    assert "±" in (out / "report.html").read_text()


def test_a_mistake_in_the_last_trial_stops_before_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random classes, of which only another seed's are unknown to the judge."""
    single = {key: value for key, value in RECIPE.items() if key != "variants"}
    tree = single | {"labels": "random", "images": 2, "networks": [A], "trials": 12}
    judge = A | {"name": "narrow", "classes": 9}
    recipe = write(tmp_path, tree | {"judges": [judge]})
    assert run("--config", recipe, "--out", tmp_path / "one", "--trials", 1) == 0
    capsys.readouterr()
    assert run("--config", recipe, "--out", tmp_path / "out") == 2
    assert "narrow knows classes 0 to 8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_of_an_older_version_is_gone_on_with(finished: Path, tmp_path: Path) -> None:
    """Keys that have other names or are gone, and keys that did not exist."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for path in out.rglob("config.yaml"):
        text = path.read_text().removeprefix("# jinv invert\n")
        text = text.replace("  checkpoint_seconds: 0.0\n", "  checkpoint_every: 100\n")
        text = text.replace("  networks_at_once: 1\n", "  networks_at_once: 1\n  stack: false\n")
        path.write_text(text.replace("  adaptive_temperature: 3.0\n", ""))
    (out / "summary.json").unlink()
    assert run("--config", write(tmp_path, RECIPE), "--out", out, "--resume") == 0
    assert summary(out)["runs"] == summary(finished)["runs"]
