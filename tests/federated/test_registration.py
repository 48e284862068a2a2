"""Shifts are found to a tenth of a pixel and undone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinv.federated import registration


def picture(seed: int = 0, shape: tuple[int, int, int] = (32, 40, 3)) -> np.ndarray:
    """Smooth noise: band-limited, so that shifts by fractions are exact."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.fft2(rng.normal(size=shape), axes=(0, 1))
    y, x = np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1])
    return np.fft.ifft2(spectrum * (np.hypot(y, x) < 0.25)[..., None], axes=(0, 1)).real


@pytest.mark.parametrize("shift", [(0, 0), (3, -5), (-7.3, 2.6), (0.4, 15.1), (-0.1, 0.5)])
def test_known_shifts_are_found_and_undone(shift: tuple[float, float]) -> None:
    reference = jnp.asarray(picture(), jnp.float32)
    moved = registration.shifted(reference, jnp.asarray(shift))
    found = jax.jit(registration.shift_between)(moved, reference)
    np.testing.assert_allclose(found, -np.asarray(shift), atol=0.051)
    back = registration.to_reference(moved, reference)
    error = np.sqrt(np.mean((np.asarray(back) - reference) ** 2))
    assert error < 0.1 * float(reference.std())


def test_whole_shifts_are_rolls() -> None:
    image = jnp.asarray(picture(), jnp.float32)
    moved = registration.shifted(image, jnp.asarray([3.0, -4.0]))
    np.testing.assert_allclose(moved, np.roll(image, (3, -4), (0, 1)), atol=1e-5)


def test_shifts_equal_scikit_images() -> None:
    """Of noisy pictures, to its own tenth of a pixel."""
    skimage = pytest.importorskip("skimage.registration")
    rng = np.random.default_rng(1)
    for seed in range(10):
        reference = picture(seed)
        true = rng.uniform(-8, 8, 2)
        moved = np.asarray(registration.shifted(jnp.asarray(reference), jnp.asarray(true)))
        moved = moved + 0.02 * rng.normal(size=moved.shape)
        found = registration.shift_between(
            jnp.asarray(moved, jnp.float32), jnp.asarray(reference, jnp.float32)
        )
        expected, _, _ = skimage.phase_cross_correlation(
            reference.mean(-1), moved.mean(-1), upsample_factor=10
        )
        np.testing.assert_allclose(found, expected, atol=0.11)


def test_every_candidate_is_moved_onto_its_own_reference() -> None:
    reference = jnp.asarray(np.stack([picture(1), picture(2)]), jnp.float32)
    shifts = jnp.asarray([[[1.0, 2], [3, -4]], [[-5, 0], [0, 6]]])
    moved = jax.vmap(jax.vmap(registration.shifted))(jnp.stack([reference] * 2), shifts)
    back = registration.to_reference(moved, jnp.stack([reference] * 2))
    np.testing.assert_allclose(back, jnp.stack([reference] * 2), atol=1e-3)


def test_optical_flow_bends_an_image_back() -> None:
    """A local shift that no translation undoes, through a compiled program."""
    import jax

    y, x = np.mgrid[:48, :48]
    reference = (np.sin(x / 3) * np.cos(y / 4) + np.hypot(x - 20, y - 25) / 30)[..., None]
    bent = np.sin((x + 1.5 * (y > 24)) / 3) * np.cos(y / 4)
    bent = (bent + np.hypot(x + 1.5 * (y > 24) - 20, y - 25) / 30)[..., None]
    flow = registration.on_host(registration.by_flow)
    moved = jax.jit(flow)(jnp.asarray(bent[None]), jnp.asarray(reference[None]))[0]
    inner = (slice(4, -4), slice(4, -4))
    before = np.abs(bent - reference)[inner].mean()
    assert np.abs(np.asarray(moved) - reference)[inner].mean() < 0.4 * before


def test_a_registration_of_ones_own_joins_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "REGISTRATIONS", dict(registration.REGISTRATIONS))
    assert list(registration.REGISTRATIONS) == ["none", "shift", "flow"]
    registration.register("stay", lambda images, reference: images)
    assert "stay" in registration.REGISTRATIONS
    with pytest.raises(ValueError, match="a new registration cannot be called 'shift'"):
        registration.register("shift", registration.to_reference)
