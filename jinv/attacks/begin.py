"""BEGIN: Batchnorm Ensembled Generative Inversion of several networks at once.

L = sum_k [ce H(net_k(x), y) + bn sum_l (||mu_l - mu^_l||_2 + ||var_l - var^_l||_2)_k]
    + tv TV_2(x) + l2 R_l2(x)

One batch of images, in one pixel space, answers to all networks; what only one of them believes
does not survive. This is DeepInversion's objective with several members, so it is built by
`deepinversion.build`; the settings of the paper's experiments are here. With `CE = 0` the images
come from BatchNorm statistics alone. `jinv.objective.ensemble` says where networks are computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinv.attacks.deepinversion import Config, Phase
from jinv.net import Net
from jinv.objective.terms import Member, Weights

CLASSES = (985, 417, 402, 94, 63, 250, 530, 920, 386, 949)
"""ImageNet classes of the published command, four images each."""

CONFIG = Config(
    phases=(Phase(2000),),
    lr=0.8,
    optimizer_args={"b1": 0.3, "b2": 0.9, "eps": 1e-8},
    warmup=500,
    tv_l2=4e-3,
    l2=0.0,
    init_std=0.01,
)
"""The published settings of images normalised for ImageNet (`space: imagenet` in a recipe)."""

WEIGHTS = Weights(label=0.8, batch_norm=0.05, first_bn_multiplier=1.0)
"""The published ce and bn of every network (its `terms` in a recipe)."""


def members(nets: Sequence[Net], weights: Weights = WEIGHTS) -> list[Member]:
    """Give all networks equal weights. One without BatchNorm adds its cross-entropy only.

    Raises:
      ValueError: the nets are no list of networks.
    """
    if isinstance(nets, Net):
        raise ValueError("nets are a list, also of one network: [net]")
    return [Member(net, weights) for net in nets]
