"""LPIPS: how different two images look to people (Zhang et al. 2018, arXiv 1801.03924).

d(x, y) = sum_l mean_hw sum_c w_lc (f_lc(x) - f_lc(y))^2

where f_l are VGG16's activations after ReLU 1_2, 2_2, 3_3, 4_3 and 5_3, each position's channels
scaled to length 1, and the heads w_l >= 0 were fitted to people's judgements: version 0.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import weights_convert
from jinv import files
from jinv.files import check_sha256
from jinv.models import vgg
from jinv.models.abstract import abstract
from jinv.models.package import Package
from jinv.objective import priors
from jinv.scores import similarity

VGG16 = "vgg16-397923af.pth"
HEADS = Package("lpips", "v0.1/vgg.pth", "a78928a0", "pip install --no-deps lpips==0.1.4")
SMALLEST = 16  # pixels: four poolings come before the last activation
IMAGES_AT_ONCE = 8  # of each kind: half a GiB at 224 px

# The reference's own, for images in [-1, 1]: nearly ImageNet's normalisation.
_SHIFT = np.asarray([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.asarray([0.458, 0.448, 0.450], np.float32)

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def load(vgg16_weights: str | Path | None, heads: str | Path | None = None) -> Distance:
    """LPIPS as a compiled `(found, truth) -> (B,)` of pixels (B, H, W, C) in [0, 1].

    Gray images are shown in three equal channels. The callable raises ValueError for images
    smaller than 16 pixels and for others that are not such pairs.

    Args:
      vgg16_weights: torchvision's vgg16-397923af.pth. With any other network's weights the
        distances are not LPIPS and compare with nothing published.
      heads: a file of the five linear heads; by default the one inside the package lpips.

    Raises:
      FileNotFoundError: LPIPS is not available; the message says what is missing.
      ValueError: a file is damaged or of something else.
    """
    variables, apply = differentiable(vgg16_weights, heads)

    @jax.jit
    def compiled(variables: Any, found: Array, truth: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            return apply(variables, found, truth)

    def lpips(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
        similarity.check_pairs(found, truth)
        height, width, channels = found.shape[1:]
        if min(height, width) < SMALLEST or channels not in (1, 3):
            raise ValueError(
                f"LPIPS needs images of at least {SMALLEST} x {SMALLEST} pixels and 1 or 3 "
                f"channels, not {height} x {width} x {channels}"
            )
        parts = [slice(i, i + IMAGES_AT_ONCE) for i in range(0, len(found), IMAGES_AT_ONCE)]
        values = [jax.device_get(compiled(variables, found[i], truth[i])) for i in parts]
        return np.concatenate(values)

    return lpips


def differentiable(
    vgg16_weights: str | Path | None, heads: str | Path | None = None
) -> tuple[Any, Callable[[Any, Array, Array], Array]]:
    """LPIPS as variables on the device and a pure `(variables, found, truth) -> (B,)`.

    It is `distance` with VGG16's activations, for losses. Files and errors are those of `load`.

    Raises:
      FileNotFoundError: LPIPS is not available; the message says what is missing.
    """
    if vgg16_weights is None:
        raise FileNotFoundError(f"LPIPS needs torchvision's {VGG16}: give its path")
    path = files.path(vgg16_weights)
    if not path.exists():
        raise FileNotFoundError(f"LPIPS needs torchvision's {VGG16}: there is no {path}")
    if path.name == VGG16:
        check_sha256(path, "397923af", "get a fresh copy")
    model = abstract(functools.partial(vgg.VGG, (2, 2, 3, 3, 3)))
    del model.classifier
    graphdef, shapes = nnx.split(model)
    variables = jax.device_put(
        {
            "network": _fitting(path, nnx.to_pure_dict(shapes), "features.", "VGG16"),
            "heads": _heads(HEADS.find("LPIPS's heads") if heads is None else files.path(heads)),
        }
    )

    def apply(variables: Any, found: Array, truth: Array) -> Array:
        network: vgg.VGG = nnx.merge(graphdef, variables["network"])
        return distance(network.stages, variables["heads"], found, truth)

    return variables, apply


def distance(
    stages: Callable[[Array], list[Array]],
    heads: list[Array],
    found: Array,
    truth: Array,
) -> Array:
    """LPIPS (B,) of pixels (B, H, W, 1 or 3); differentiable, also where the two are equal.

    With K B images of truth each of `found` has K of them, one after the other: (K B,).

    Args:
      stages: normalised images (N, H, W, 3) -> activations (N, h_l, w_l, C_l).
      heads: w_l (C_l,).
      found: pixels in [0, 1].
      truth: pixels in [0, 1].
    """
    pixels = jnp.concatenate([found, truth]).astype(jnp.float32)
    total = jnp.zeros(len(truth))
    for activation, head in zip(stages((2 * pixels - 1 - _SHIFT) / _SCALE), heads, strict=True):
        unit = activation / (priors.norm(activation, axis=-1)[..., None] + 1e-10)
        ours, theirs = jnp.split(unit, [len(found)])
        ours = jnp.repeat(ours, len(truth) // len(found), 0)
        total = total + (jnp.square(ours - theirs) * head).sum(-1).mean((1, 2))
    return total


def _heads(path: Path) -> list[np.ndarray]:
    """w_l (C_l,) from a file in the reference's naming."""
    channels = (64, 128, 256, 512, 512)
    shapes = {
        f"lin{i}": {"model": {1: {"weight": jax.ShapeDtypeStruct((1, 1, n, 1), np.float32)}}}
        for i, n in enumerate(channels)
    }
    found = _fitting(path, shapes, "lin", "LPIPS's heads")
    return [found[name]["model"][1]["weight"].ravel() for name in shapes]


def _fitting(path: Path, template: Mapping[Any, Any], beginning: str, what: str) -> dict[Any, Any]:
    """The file's tensors whose names begin so, as this tree."""
    state = weights_convert.read(path)
    state = {name: value for name, value in state.items() if name.startswith(beginning)}
    try:
        return weights_convert.to_flax(state, template)
    except weights_convert.WeightsError as error:
        raise weights_convert.WeightsError(f"{path} does not fit {what}: {error}") from None
