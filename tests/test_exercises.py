"""What people add from outside the package, each in a file of at most 15 lines of code."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

import tiny
from conftest import ROOT
from jinv import models, optimise
from jinv.federated import evidence, labels
from jinv.recipes import invert, invert_gradients
from jinv.runs import command_line

FOLDER = ROOT / "tests" / "exercises"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_an_exercise_is_short(path: Path) -> None:
    """Docstrings, blank lines and imports do not count."""
    text = path.read_text()
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        said = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if said or isinstance(node, ast.Import | ast.ImportFrom):
            skipped |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), 1)
    assert sum(bool(line.strip()) and i not in skipped for i, line in lines) <= 15


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def save(folder: Path, tree: dict[str, Any]) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def first(attack: Any, key: int = 0) -> dict[str, float]:
    """Raw terms of an attack's first step."""
    images = attack.initial(jax.random.key(1))
    state = attack.phases[0].enter(images, 0)
    _, info = jax.jit(attack.phases[0].step)(jax.random.key(key), state, attack.data)
    return {name: float(value) for name, value in info.terms.items()} | {"loss": float(info.loss)}


def test_a_loss_term_of_ones_own(outside: None) -> None:
    import own_term

    from jinv import Member
    from jinv.attacks import deepinversion, gradient_inversion

    net = tiny.network()
    config = deepinversion.PRESETS["cifar10"]
    bare = first(deepinversion.build(config, [Member(net)], [1, 2]))
    attack = own_term.invert(net, [1, 2])
    found = first(attack)
    # The term sees the images as the network does, rolled and mirrored, which change no mean.
    dark = float(np.square(np.asarray(attack.initial(jax.random.key(1)))).mean())
    assert found["dark"] == pytest.approx(dark, rel=1e-5)
    assert found["loss"] == pytest.approx(bare["loss"] + 2 * dark, rel=1e-5)
    held, _ = evidence.simulate(net, tiny.noise((2, 16, 16, 3)), [1, 2])
    attack = own_term.invert_gradient(net, held, [1, 2])
    bare = first(gradient_inversion.build(own_term.SETTINGS, net, held, [1, 2]))
    assert first(attack)["loss"] == pytest.approx(bare["loss"] + 2 * dark, rel=1e-4)


def test_a_network_of_ones_own_by_config(outside: None, tmp_path: Path) -> None:
    tree = {
        "networks": [{"model": "own_network:network"}],
        "judges": [{"model": "own_network:network", "classes": 4, "name": "wider"}],
        "images": 3,
        "labels": [2, 0],
        "attack": {"phases": [{"steps": 3, "jitter": 1}]},
    }
    out = tmp_path / "out"
    arguments = ["--config", save(tmp_path, tree), "--out", str(out)]
    assert command_line.main(invert.COMMAND, arguments) == 0
    assert read(out)["targets"] == [2, 0, 2]
    assert set(read(out)["top1"]) == {"own_network:network", "wider"}
    assert models.load("own_network:network", None).classes == 3


def test_a_label_method_of_ones_own(outside: None, tmp_path: Path) -> None:
    net = models.load("lenet", None)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 28, 28, 1)).astype(np.float32)
    held, _ = evidence.simulate(net, images, [6, 6])
    evidence.save(tmp_path / "client", held)
    try:
        import own_labels  # noqa: F401 - registers the method

        tree = {
            "network": {"model": "lenet", "weights": "random"},
            "evidence": str(tmp_path / "client"),
            "labels": "loudest",
            "attack": {"steps": 2, "seeds": 1, "group": 0.0},
        }
        out = tmp_path / "out"
        arguments = ["--config", save(tmp_path, tree), "--out", str(out)]
        assert command_line.main(invert_gradients.COMMAND, arguments) == 0
    finally:
        labels.METHODS.pop("loudest", None)
    assert read(out)["labels"]["restored"] == [6, 6]
    assert read(out)["label_methods"]["loudest"]["restored"] == [6, 6]


def test_a_recipe_of_ones_own_with_its_command(
    outside: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import own_command

    tree = {"network": {"model": "lenet", "weights": "random"}}
    out = tmp_path / "out"
    arguments = ["--config", save(tmp_path, tree), "--out", str(out)]
    assert command_line.main(own_command.COMMAND, arguments) == 0
    net = models.load("lenet", None)
    (weight,) = (leaf for leaf in jax.tree.leaves(net.variables) if leaf.shape == (588, 10))
    assert read(out) == {"mean": pytest.approx(float(np.mean(weight)), abs=1e-7)}
    assert command_line.main(own_command.COMMAND, arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main(own_command.COMMAND, ["--help"])
    assert "    mean  of the head's weights." in capsys.readouterr().out


def test_loops_take_attacks_with_terms_of_ones_own(outside: None) -> None:
    """`optimise.run` goes on with it: the term falls."""
    import own_term

    attack = own_term.invert(tiny.network(), [1, 2])
    seen: list[float] = []
    optimise.run(
        attack.phases,
        jax.random.key(0),
        attack.initial(jax.random.key(1)),
        attack.data,
        callback=lambda chunk: seen.extend(chunk.metrics["dark"].tolist()),
        should_stop=lambda: len(seen) >= 40,
    )
    assert seen[-1] < 0.9 * seen[0]
