"""A loss term of one's own, in both attacks: images should be dark."""

import jinv
from jinv.attacks import deepinversion, gradient_inversion

DARK = {"dark": (2.0, lambda images: (images**2).mean())}


def invert(net: jinv.Net, targets: list[int]) -> deepinversion.Attack:
    return deepinversion.build(
        deepinversion.PRESETS["cifar10"], [jinv.Member(net)], targets, extra_terms=DARK
    )


def invert_gradient(net: jinv.Net, held: object, labels: list[int]) -> gradient_inversion.Attack:
    return gradient_inversion.build(SETTINGS, net, held, labels, extra_terms=DARK)


SETTINGS = gradient_inversion.Config(steps=4, seeds=1, group=0.0)
