"""The import graph: no cycle, no arrow upward, few rooms, and a picture that shows it as it is."""

from __future__ import annotations

import pytest

import draw_layout
from conftest import ROOT

MODULES = draw_layout.module_graph()
ROOMS = draw_layout.rooms(MODULES)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert draw_layout.cycle(MODULES) == []


def test_a_cycle_would_be_found() -> None:
    assert draw_layout.cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_one_above_it(room: str) -> None:
    assert room in draw_layout.ORDER, f"say in draw_layout.ORDER where {room} stands"
    below = draw_layout.ORDER[: draw_layout.ORDER.index(room)]
    assert ROOMS[room] <= set(below)


def test_the_top_of_the_package_fits_on_a_screen() -> None:
    modules = [path.name for path in (ROOT / "jinv").glob("*.py")]
    assert len(modules) <= 17, modules


def test_torch_is_never_imported() -> None:
    for package in ("jinv", "weights_convert"):
        for path in (ROOT / package).rglob("*.py"):
            for line in path.read_text().splitlines():
                words = line.split()
                assert words[:2] not in (["import", "torch"], ["from", "torch"]), path


def test_the_picture_shows_the_code_as_it_is() -> None:
    told = (ROOT / "docs" / "layout.svg").read_text()
    assert draw_layout.digest(ROOMS) in told, "run `python scripts/draw_layout.py`"
