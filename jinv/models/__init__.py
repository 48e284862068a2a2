"""Networks by name: architecture, preprocessing, and where packaged weights are.

net = jinv.models.load("mobilenet_v2", weights="package")
net = jinv.models.load("resnet50", weights="resnet50-0676ba61.pth")
net = jinv.models.load("my_package.networks:mine", weights=None)
"""

from jinv.models.network import Network
from jinv.models.registry import (
    entry,
    fitting,
    load,
    names,
    packaged_weights,
    register,
    template,
)
from jinv.models.subnetwork import Subnetwork
from jinv.models.trained import load_trained

__all__ = [
    "Network",
    "Subnetwork",
    "entry",
    "fitting",
    "load",
    "load_trained",
    "names",
    "packaged_weights",
    "register",
    "template",
]
