"""Time convolutions under the XLA_FLAGS of this process; prints JSON. See `switches.layouts`."""

from __future__ import annotations

import json
import sys

from benchmarks import timing
from gpu.layers import Layer, program

LAYERS = (Layer(3, 64, 64, 56), Layer(1, 64, 256, 56, residual=True))

if __name__ == "__main__":
    tiny = sys.argv[1:] == ["--tiny"]
    layers = [layer.smaller() if tiny else layer for layer in LAYERS[: 1 if tiny else None]]
    print(json.dumps(timing.alternate({str(layer): program(layer) for layer in layers})))
