"""Run a tiny recipe of every command from an installed wheel, outside the checkout.

    WHEEL_ENVIRONMENT/bin/python tests/wheel.py

`make wheel` builds the wheel, installs it into an empty environment and calls this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE)

import yaml  # noqa: E402

import jinv  # noqa: E402
from jinv import recipes  # noqa: E402
from recipe_examples import EXAMPLES  # noqa: E402


def call(*arguments: str) -> str:
    """Return what a command prints."""
    program = str(Path(sys.executable).with_name("jinv"))
    done = subprocess.run(
        [program, *arguments],
        env=os.environ | {"PYTHONPATH": str(HERE)},  # for tests/tiny.py
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stderr[-4000:]}"
    return done.stdout


def main() -> None:
    """Check that the package is the wheel's, then run everything."""
    assert HERE.parent not in Path(str(jinv.__file__)).parents, jinv.__file__
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.chdir(folder)
        assert "demo " in call("configs")
        assert "--attack.lr" in call("invert", "--config", "demo", "--help")
        for name in recipes.RECIPES:
            (folder / name).mkdir()
            recipe = folder / f"{name}.yaml"
            recipe.write_text(yaml.safe_dump(EXAMPLES[name](folder / name)))
            out = folder / "out" / name
            call(name, "--config", str(recipe), "--out", str(out))
            assert json.loads((out / "summary.json").read_text())
            print(f"jinv {name}: done", flush=True)
        weights = folder / "out" / "pretrain" / "weights.safetensors"
        target = folder / "converted" / "lenet.pth"
        given = ("--input", str(weights), "--output", str(target))
        call("convert", *given)
        assert target.stat().st_size
        print("jinv convert: done", flush=True)


if __name__ == "__main__":
    main()
