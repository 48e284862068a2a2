"""Shifts between images, found and undone inside a compiled program.

Sub-pixel translation by phase correlation (Guizar-Sicairos et al. 2008): the peak of the
normalised cross-power spectrum's inverse transform, refined by an upsampled transform around it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array


def shift_between(image: Array, reference: Array, upsample: int = 10) -> Array:
    """The (rows, columns) shift that moves an image (H, W, C) onto the reference.

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
    """An image (H, W, C) moved by (rows, columns), periodic, exact for band-limited images."""
    rows, columns = (jnp.fft.fftfreq(n) for n in image.shape[:2])
    turn = jnp.exp(-2j * jnp.pi * (rows[:, None] * shift[0] + columns * shift[1]))
    spectrum = jnp.fft.fft2(image, axes=(0, 1)) * turn[:, :, None]
    return jnp.fft.ifft2(spectrum, axes=(0, 1)).real.astype(image.dtype)


def to_reference(images: Array, reference: Array) -> Array:
    """Each image (..., H, W, C) moved onto its reference of the same shape."""
    shape = images.shape

    def one(image: Array, onto: Array) -> Array:
        return shifted(image, shift_between(image, onto))

    flat = images.reshape(-1, *shape[-3:])
    onto = jnp.broadcast_to(reference, shape).reshape(flat.shape)
    return jax.vmap(one)(flat, onto).reshape(shape)
