"""Run one part: `python -m gpu.part NAME --out FOLDER [--tiny]`, which `gpu_check.py` starts."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Given:
    """What a part is given.

    Attributes:
      name: of the part.
      out: folder of all parts' files.
      tiny: whether sizes are to be those that a CPU takes seconds for.
    """

    name: str
    out: Path
    tiny: bool

    def emit(self, **row: Any) -> None:
        """Keep a row, whatever becomes of the part."""
        with (self.out / f"{self.name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def card(self) -> dict[str, Any]:
        """What the part "card" measured."""
        return json.loads((self.out / "card.jsonl").read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    importlib.import_module(f"gpu.{args.name}").run(Given(args.name, args.out, args.tiny))
