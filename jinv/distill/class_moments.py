"""BatchNorm statistics of single classes, measured by one pass over real images (LPLD)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinv import training
from jinv.data import Dataset
from jinv.net import Moments, Net, Variables


def class_moments(net: Net, dataset: Dataset, batch: int = 128) -> tuple[Moments, ...]:
    """Return the moments (classes, channels) of every BatchNorm layer's input over each class.

    mu_c = mean_b mu_b and var_c = mean_b (var_b + mu_b^2) - mu_c^2 over the images b of class c,
    with the network in inference mode. arXiv 2410.15919 matches a batch of one class to these;
    unlike running statistics they are no part of a network's weights, and need its data.

    Args:
      net: the network.
      dataset: real images of every class.
      batch: images at a time.

    Raises:
      ValueError: the data has other classes, or none of some class.
    """
    labels = dataset.labels
    counts = np.bincount(labels, minlength=net.classes) if labels.ndim == 1 else np.zeros(0)
    if len(counts) != net.classes or not counts.all():
        raise ValueError(
            f"statistics of classes need images of each of the {net.classes} classes of {net.name}"
        )

    @jax.jit
    def sums(variables: Variables, images: Array, labels: Array) -> list[Moments]:
        # Image by image: moments of a batch would mix its classes.
        seen = training.normalised(net, images)
        alone = jax.vmap(lambda one: net.apply(variables, one[None]).moments)(seen)
        # Padding has the label -1, whose row is all zeros.
        member = jax.nn.one_hot(labels, net.classes, axis=0)
        add = functools.partial(jnp.matmul, member, precision="highest")
        return [Moments(add(m.mean), add(m.var + jnp.square(m.mean))) for m in alone]

    total: list[Moments] | None = None
    for images, of in training.padded(dataset, batch):
        found = sums(net.variables, images, of)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    assert total is not None
    share = 1 / jnp.asarray(counts, jnp.float32)[:, None]
    means = [m.mean * share for m in total]
    return tuple(
        Moments(mean, m.var * share - jnp.square(mean))
        for mean, m in zip(means, total, strict=True)
    )
