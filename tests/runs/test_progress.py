"""What a person sees of a long run."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from jinv import optimise
from jinv.runs import progress


def phases() -> tuple[optimise.Phase, ...]:
    nothing = lambda *args: None  # noqa: E731
    return (
        optimise.Phase("coarse", 100, nothing, nothing, cost=0.25),
        optimise.Phase("fine", 50, nothing, nothing),
    )


def chunk(phase: int, start: int, count: int) -> tuple[int, int, dict[str, np.ndarray]]:
    metrics = {"loss": np.full(count, 2.5), "tv_l2": np.full(count, 7.0)}
    return phase, start, metrics


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_counts_later_phases_at_their_cost(clock: list[float]) -> None:
    rate = progress._Rate()
    clock[0] = 50.0  # compilation and the first steps: not counted
    assert rate.left(0, 10, 10, phases()) is None
    clock[0] = 55.0
    # 0.5 s a step: 80 coarse steps left, and 50 fine ones at four times the cost
    assert rate.left(0, 10, 20, phases()) == pytest.approx(80 * 0.5 + 50 * 2.0)


def test_lines_where_there_is_no_terminal(clock: list[float]) -> None:
    text = io.StringIO()
    with progress.Progress(phases(), Console(file=text, width=200)) as shown:
        shown.update(*chunk(0, 0, 10))
        assert text.getvalue() == ""
        clock[0] = 40.0
        shown.update(*chunk(0, 10, 10))
        shown.say(20, {"judge": 0.5})
    line, score = text.getvalue().splitlines()
    assert line.startswith("coarse  step 20/150  0:")
    assert "loss 2.5" in line
    assert "tv_l2 7" in line
    assert score == "step 20: judge 0.50"


def test_it_is_a_callback_of_a_run(clock: list[float]) -> None:
    """Of one that goes to the end, and of one whose last phase is stopped."""
    for stopped in (False, True):
        text = io.StringIO()
        shown = progress.Progress(phases(), Console(file=text, width=200, force_terminal=True))
        for phase, start, count in ((0, 0, 100), (1, 100, 10), (1, 110, 40 - 20 * stopped)):
            _, _, metrics = chunk(phase, start, count)
            ended = stopped and start == 110
            shown(optimise.Chunk(phase, start, metrics, None, ended))  # type: ignore[arg-type]
            assert shown._bar.live.is_started == (start < 110)
        assert "fine" in text.getvalue()
        assert "loss 2.5" in text.getvalue()


def test_the_bar_shows_step_time_left_and_terms() -> None:
    text = io.StringIO()
    console = Console(file=text, width=160, force_terminal=True)
    with progress.Progress(phases(), console) as shown:
        shown.update(*chunk(0, 0, 10))
        shown.update(*chunk(0, 10, 10))
    output = text.getvalue()
    assert "20/150" in output
    assert "left" in output
    assert "loss 2.5" in output


def test_an_empty_chunk_is_no_news() -> None:
    text = io.StringIO()
    with progress.Progress(phases(), Console(file=text)) as shown:
        shown.update(*chunk(0, 0, 0))
    assert text.getvalue() == ""
