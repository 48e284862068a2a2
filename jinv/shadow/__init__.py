"""Shadow models (arXiv 2505.14323): small heads trained by the million on frozen features."""

from jinv.shadow.config import Config, Privacy, Shadow
from jinv.shadow.training import make_train

__all__ = ["Config", "Privacy", "Shadow", "make_train"]
