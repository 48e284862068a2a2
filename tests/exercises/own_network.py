"""A network of one's own, for `model: own_network:network` in a config."""

from flax import nnx

import jinv


class Small(nnx.Module):
    def __init__(self, classes: int, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.fc = nnx.Linear(4, classes, rngs=rngs)

    def __call__(self, x):
        return self.fc(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def network(classes: int = 3) -> jinv.Net:
    return jinv.Net.from_nnx(Small(classes, nnx.Rngs(0)), jinv.Preprocessing(size=8))
