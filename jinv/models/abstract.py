"""Make networks of shapes alone, to be filled from a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from flax import nnx

M = TypeVar("M", bound=nnx.Module)


def abstract(build: Callable[..., M]) -> M:
    """Return `build(rngs=...)` with shapes and dtypes for values; nothing is drawn or allocated."""

    def trace() -> M:
        rngs = nnx.Rngs(0)
        # Flax asks a traced count for its sharding at every key, and JAX answers with an error
        # message that walks through all that was traced: seconds for a deep network.
        rngs.default.count.set_raw_value(np.zeros((), np.uint32))
        return build(rngs=rngs)

    return nnx.eval_shape(trace)
