"""How long XLA has compiled in this process."""

from __future__ import annotations

from typing import Any

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_total = 0.0


def seconds() -> float:
    """Return the seconds since this module was first imported, programs from a cache included."""
    return _total


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    global _total
    if event == _COMPILED:
        _total += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)
