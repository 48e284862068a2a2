"""Write the table of networks in docs/networks.md: `python scripts/network_table.py`.

The nightly tests, which compare every network with torch, call `write` with what they found.
Without that the differences stay as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from jinv import models
from jinv.net import leaves
from weights_convert import BUFFERS

FILE = Path(__file__).resolve().parents[1] / "docs" / "networks.md"
BEGIN, END = "<!-- table: scripts/network_table.py -->\n", "<!-- end of the table -->\n"
UNKNOWN = "not yet"


def table(differences: Mapping[str, str]) -> str:
    """Return the table of all networks of the zoo.

    Args:
      differences: network -> largest relative difference to torch, in words.
    """
    lines = [
        "| network | parameters | BatchNorm layers | size | largest difference to torch |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in sorted(models.registry.zoo()):
        found = dict(leaves(models.template(name)))
        parameters = sum(math.prod(v.shape) for key, v in found.items() if key[-1] not in BUFFERS)
        norms = sum(key[-1] == "running_mean" for key in found)
        size = models.entry(name).preprocessing.size
        difference = differences.get(name, UNKNOWN)
        lines.append(f"| `{name}` | {parameters:,} | {norms} | {size} | {difference} |")
    return "\n".join(lines) + "\n"


def known() -> dict[str, str]:
    """Return the differences that the file tells."""
    rows = re.findall(r"^\| `(\w+)` \|.* \| (\S[^|]*) \|$", FILE.read_text(), re.MULTILINE)
    return dict(rows)


def write(differences: Mapping[str, float] = {}) -> None:
    """Write the table into the file.

    Args:
      differences: those that were found, by network; others stay as they are.
    """
    told = known() | {name: f"{value:.0e}" for name, value in differences.items()}
    before, rest = FILE.read_text().split(BEGIN)
    FILE.write_text(before + BEGIN + table(told) + END + rest.split(END)[1])


if __name__ == "__main__":
    write()
