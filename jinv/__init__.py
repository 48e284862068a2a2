"""Read back what a trained network has learned."""

from jinv import image, models, moved, objective, optimise
from jinv.image import Preprocessing
from jinv.net import Moments, Net, Outputs
from jinv.objective import Member, Weights, priors

__version__ = "0.1.0"

__all__ = [
    "Member",
    "Moments",
    "Net",
    "Outputs",
    "Preprocessing",
    "Weights",
    "image",
    "models",
    "objective",
    "optimise",
    "priors",
]

moved.announce()
