"""One paper, one file; `ATTACKS` has them by name."""

from types import ModuleType

from jinv.attacks import begin, deepinversion, gradient_inversion

ATTACKS: dict[str, ModuleType] = {
    "deepinversion": deepinversion,
    "begin": begin,
    "gradient_inversion": gradient_inversion,
}
"""Every attack's module. A new one needs an example in `tests/attack_examples.py`."""
