"""Jobs beside the steps come in order, and what they raise is not lost."""

from __future__ import annotations

import threading

import jax
import pytest

from jinv.runs.background import Background


def test_jobs_run_beside_the_caller_one_after_the_other() -> None:
    gate, done = threading.Event(), []

    def first() -> None:
        gate.wait(10)
        done.append(("first", threading.current_thread() is threading.main_thread()))

    with Background() as background:
        background(first)
        background(lambda: done.append(("second", False)))
        assert not done
        gate.set()
    assert done == [("first", False), ("second", False)]


def test_only_a_few_jobs_wait() -> None:
    """Each holds images."""
    gate, handed = threading.Event(), []

    def hand_over() -> None:
        with Background() as background:
            for i in range(6):
                background(lambda: gate.wait(10) and None)
                handed.append(i)

    thread = threading.Thread(target=hand_over)
    thread.start()
    thread.join(0.5)
    assert len(handed) == 3
    gate.set()
    thread.join(10)
    assert len(handed) == 6


def failing() -> None:
    raise OSError("no space left")


@pytest.mark.parametrize("how", ["next job", "wait", "end"])
def test_what_a_job_raises_comes_to_the_caller(how: str) -> None:
    def work() -> None:
        with Background() as background:
            background(failing)
            if how == "wait":
                background.wait()
            while how == "next job":
                background(lambda: None)

    with pytest.raises(OSError, match="no space left"):
        work()


def test_the_callers_own_error_counts_more() -> None:
    def work() -> None:
        with Background() as background:
            background(failing)
            raise KeyError

    with pytest.raises(KeyError):
        work()


def test_several_processes_do_their_jobs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    done = []
    with Background() as background:
        background(lambda: done.append(threading.current_thread()))
        assert done == [threading.main_thread()]
