"""Read back what a trained network has learned."""

from jinv import image, models, objective, optimise, priors
from jinv.image import Preprocessing
from jinv.net import Moments, Net, Outputs

__version__ = "0.1.0"

__all__ = [
    "Moments",
    "Net",
    "Outputs",
    "Preprocessing",
    "image",
    "models",
    "objective",
    "optimise",
    "priors",
]
