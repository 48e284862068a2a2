"""Shifts between images, found and undone inside a compiled program.

Sub-pixel translation by phase correlation (Guizar-Sicairos et al. 2008): the peak of the
normalised cross-power spectrum's inverse transform, refined by an upsampled transform around it.
Or by dense optical flow, or any function of NumPy arrays, which the program calls on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jinv import checks
from jinv.checks import Word

Register = Callable[[Array, Array], Array]
"""(images, reference), both (..., H, W, C) -> the images moved onto the reference."""


def shift_between(image: Array, reference: Array, upsample: int = 10) -> Array:
    """Find the (rows, columns) shift that moves an image (H, W, C) onto the reference.

    To 1 / upsample of a pixel; both are taken as periodic, and channels are averaged.
    """
    size = jnp.asarray(image.shape[:2])
    spectra = [jnp.fft.fft2(x.mean(-1)) for x in (reference, image)]
    product = spectra[0] * spectra[1].conj()
    power = jnp.abs(product)
    # Frequencies that are hardly there are noise: their phases must not vote.
    product = product / (power + 1e-4 * power.max())
    coarse = _peak(jnp.fft.ifft2(product))
    coarse = jnp.where(coarse > size // 2, coarse - size, coarse).astype(jnp.float32)
    region = math.ceil(upsample * 1.5)
    centre = region // 2
    fine = _peak(_upsampled(product, region, upsample, coarse * upsample - centre))
    return coarse + (fine - centre) / upsample


def _peak(correlation: Array) -> Array:
    index = jnp.argmax(jnp.abs(correlation))
    return jnp.stack(jnp.unravel_index(index, correlation.shape))


def _upsampled(product: Array, region: int, upsample: int, start: Array) -> Array:
    """Inverse transform at the positions (start + 0 .. region - 1) / upsample, by two products."""

    def kernel(size: int, first: Array) -> Array:
        positions = (first + jnp.arange(region)) / upsample
        frequencies = jnp.fft.fftfreq(size)
        return jnp.exp(2j * jnp.pi * positions[:, None] * frequencies)

    rows, columns = (kernel(n, s) for n, s in zip(product.shape, start, strict=True))
    return rows @ product @ columns.T


def shifted(image: Array, shift: Array) -> Array:
    """Move an image (H, W, C) by (rows, columns), periodic, exact for band-limited images."""
    rows, columns = (jnp.fft.fftfreq(n) for n in image.shape[:2])
    turn = jnp.exp(-2j * jnp.pi * (rows[:, None] * shift[0] + columns * shift[1]))
    spectrum = jnp.fft.fft2(image, axes=(0, 1)) * turn[:, :, None]
    return jnp.fft.ifft2(spectrum, axes=(0, 1)).real.astype(image.dtype)


def to_reference(images: Array, reference: Array) -> Array:
    """Move each image (..., H, W, C) onto its reference of the same shape."""
    shape = images.shape

    def one(image: Array, onto: Array) -> Array:
        return shifted(image, shift_between(image, onto))

    flat = images.reshape(-1, *shape[-3:])
    onto = jnp.broadcast_to(reference, shape).reshape(flat.shape)
    return jax.vmap(one)(flat, onto).reshape(shape)


def on_host(move: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Register:
    """Make a `Register` from a NumPy function of one image and its reference, both (H, W, C).

    The compiled program waits for the host, whose work is the same on every device.
    """

    def all_of_them(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
        shape = images.shape
        flat = np.asarray(images).reshape(-1, *shape[-3:])
        onto = np.asarray(reference).reshape(flat.shape)
        moved = [move(image, base) for image, base in zip(flat, onto, strict=True)]
        return np.stack(moved).reshape(shape).astype(images.dtype)

    def register(images: Array, reference: Array) -> Array:
        reference = jnp.broadcast_to(reference, images.shape)
        result = jax.ShapeDtypeStruct(images.shape, images.dtype)
        return jax.pure_callback(all_of_them, result, images, reference)

    return register


def by_flow(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Warp an image (H, W, C) onto its reference along their TV-L1 optical flow.

    Zach et al. 2007, as scikit-image computes it, on the mean over channels.

    Raises:
      ImportError: scikit-image is not installed.
    """
    try:
        from skimage.registration import optical_flow_tvl1
        from skimage.transform import warp
    except ImportError as error:
        raise ImportError("optical flow needs scikit-image: pip install scikit-image") from error
    gray = reference.mean(-1), image.mean(-1)
    low = min(g.min() for g in gray)
    span = max(float(max(g.max() for g in gray) - low), 1e-12)
    rows, columns = optical_flow_tvl1(*((g - low) / span for g in gray))
    height, width = gray[0].shape
    y, x = np.mgrid[:height, :width]
    where = np.stack([y + rows, x + columns])
    warped = [warp(channel, where, mode="edge") for channel in np.moveaxis(image, -1, 0)]
    return np.stack(warped, -1)


REGISTRATIONS: dict[str, Register | None] = {
    "none": None,
    "shift": to_reference,
    "flow": on_host(by_flow),
}
"""Ways of moving candidates onto their mean before the consensus is taken, by name."""
Name = Annotated[str, Word(lambda: REGISTRATIONS)]


def register(name: str, method: Register | None) -> None:
    """Add a way to move candidates onto each other, for `registration: NAME` in a config.

    Args:
      name: what it is called.
      method: moves images onto a reference; None moves nothing.

    Raises:
      ValueError: the name is taken.
    """
    checks.free("registration", name, REGISTRATIONS)
    REGISTRATIONS[name] = method
