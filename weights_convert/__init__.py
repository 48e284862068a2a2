"""Weight files of the torch world to Flax variables and back, in NumPy alone."""

from weights_convert.arrays import read_arrays
from weights_convert.errors import WeightsError
from weights_convert.layout import BUFFERS, from_flax, match, naming, shapes, to_flax
from weights_convert.read import read
from weights_convert.write import write

__all__ = [
    "BUFFERS",
    "WeightsError",
    "from_flax",
    "match",
    "naming",
    "read",
    "read_arrays",
    "shapes",
    "to_flax",
    "write",
]
