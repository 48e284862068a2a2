"""Networks by name: architecture, preprocessing, and where packaged weights are.

net = jinv.models.load("mobilenet_v2", weights="package")
net = jinv.models.load("resnet50", weights="resnet50-0676ba61.pth")
net = jinv.models.load("my_package.networks:mine", weights=None)
"""

from jinv.models.registry import entry, load, names, packaged_weights, register, template

__all__ = ["entry", "load", "names", "packaged_weights", "register", "template"]
