"""Judges and their scores on networks whose answers are known."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import tiny
from jinv.image import Preprocessing
from jinv.net import Net, Outputs
from jinv.scores import judging
from jinv.scores.judging import Prediction

SPACE = Preprocessing(size=6, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
GRAY = Preprocessing(size=6, mean=(0.4,), std=(0.2,))


def colour_judge(space: Preprocessing = SPACE) -> Net:
    """Logits are 3 times the mean of each channel: red, green or blue. Only at its own size."""

    def apply(variables: Any, images: Any) -> Outputs:
        assert images.shape[1:3] == (space.size, space.size)
        return Outputs(variables["gain"] * images.mean((1, 2)), None, ())

    variables = {"gain": jnp.asarray(3.0)}
    return Net("colours", apply, variables, space, space.channels, ())


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def test_judge_names_the_strongest_colour() -> None:
    """Index and probability from pixels normalised as the network wants."""
    pixels = np.full((4, 6, 6, 3), 0.3, np.float32)
    for i, channel in enumerate((2, 0, 1, 2)):
        pixels[i, ..., channel] = 0.9
    found = judging.make_judge(colour_judge())(pixels)
    normalised = (pixels[:, 0, 0].astype(np.float64) - SPACE.mean) / SPACE.std
    expected = softmax(3 * normalised)
    np.testing.assert_array_equal(found.index, [2, 0, 1, 2])
    np.testing.assert_array_equal(found.index, expected.argmax(-1))
    np.testing.assert_allclose(found.probability, expected.max(-1), rtol=1e-4)
    assert isinstance(found.index, np.ndarray)
    assert found.probability.shape == (4,)


def test_judge_equals_the_network_at_its_own_size() -> None:
    net = tiny.network(seed=3)
    pixels = np.random.default_rng(0).random((5, 16, 16, 3), np.float32)
    logits = net(jnp.asarray((pixels - tiny.SPACE.mean) / tiny.SPACE.std, jnp.float32)).logits
    expected = softmax(np.asarray(logits, np.float64))
    found = judging.make_judge(net)(pixels)
    np.testing.assert_array_equal(found.index, expected.argmax(-1))
    np.testing.assert_allclose(found.probability, expected.max(-1), rtol=1e-4)


def test_judge_resamples_bicubically_and_clips() -> None:
    """Against Pillow's bicubic, which too is antialiased (its kernel is a touch sharper)."""
    pixels = np.random.default_rng(1).random((1, 18, 24, 3), np.float32)
    seen = []

    def apply(variables: Any, images: Any) -> Outputs:
        return Outputs(images.reshape(1, -1), None, ())

    net = Net("copy", apply, {}, SPACE, 6 * 6 * 3, ())
    found = judging.make_judge(net)(pixels)
    for channel in range(3):
        plane = Image.fromarray(pixels[0, ..., channel])
        plane = plane.resize((6, 6), Image.Resampling.BICUBIC)
        seen.append((np.clip(np.asarray(plane), 0, 1) - SPACE.mean[channel]) / SPACE.std[channel])
    expected = softmax(np.stack(seen, -1).reshape(1, -1).astype(np.float64))
    np.testing.assert_array_equal(found.index, expected.argmax(-1))
    np.testing.assert_allclose(found.probability, expected.max(-1), rtol=0.1)


def test_judge_clips_pixels_to_what_a_file_can_hold() -> None:
    judge = judging.make_judge(colour_judge())
    wild = np.random.default_rng(2).normal(0.5, 2, (3, 12, 9, 3)).astype(np.float32)
    tame = np.clip(wild, 0, 1)
    np.testing.assert_array_equal(judge(wild).probability, judge(tame).probability)


def test_gray_pixels_are_shown_in_three_equal_channels() -> None:
    judge = judging.make_judge(colour_judge())
    gray = np.random.default_rng(3).random((2, 6, 6, 1), np.float32)
    found, expected = judge(gray), judge(np.repeat(gray, 3, axis=-1))
    np.testing.assert_array_equal(found.index, expected.index)
    np.testing.assert_allclose(found.probability, expected.probability, rtol=1e-5)


def test_judges_of_one_network_share_a_program_that_dies_with_it() -> None:
    traced = []

    def apply(variables: Any, images: Any) -> Outputs:
        traced.append(images.shape)
        return Outputs(variables["gain"] * images.mean((1, 2)), None, ())

    variables = {"gain": jnp.asarray(3.0)}
    net = Net("counting", apply, variables, SPACE, 3, ())
    pixels = np.random.default_rng(4).random((2, 12, 9, 3), np.float32)
    first, second = judging.make_judge(net)(pixels), judging.make_judge(net)(pixels)
    np.testing.assert_array_equal(first.probabilities, second.probabilities)
    assert traced == [(2, 6, 6, 3)]
    held, used = weakref.ref(net), weakref.ref(apply)
    del net, apply
    gc.collect()
    assert held() is None
    assert used() is None


def test_gray_judge_sees_gray_pixels() -> None:
    net = colour_judge(GRAY)
    found = judging.make_judge(net)(np.full((2, 6, 6, 1), 0.7, np.float32))
    np.testing.assert_array_equal(found.index, [0, 0])


def test_judges_see_colours_as_gray_and_their_own_height_and_width() -> None:
    """ITU-R 601 luma for one channel; other numbers of channels are named."""
    one = tiny.network(space=dataclasses.replace(tiny.GRAY, size=(6, 10)), name="one")
    judge = judging.make_judge(one)
    colours = np.random.default_rng(0).random((3, 12, 9, 3), np.float32)
    gray = (colours @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    expected = judge(gray).probabilities
    np.testing.assert_allclose(judge(colours).probabilities, expected, atol=1e-5)
    sized = np.asarray(jax.image.resize(gray, (3, 6, 10, 1), "bicubic")).clip(0, 1)
    logits = one(jnp.asarray((sized - 0.45) / 0.25)).logits
    np.testing.assert_allclose(expected, softmax(np.asarray(logits)), atol=1e-5)
    for channels in (2, 4):
        with pytest.raises(ValueError, match=f"images of {channels} channels"):
            judge(np.zeros((2, 6, 10, channels), np.float32))


def test_top1_is_the_share_of_hits() -> None:
    prediction = Prediction(np.eye(8)[[4, 7, 7, 1]])
    assert judging.top1(prediction, [4, 7, 7, 1]) == 1
    assert judging.top1(prediction, [4, 0, 7, 0]) == 0.5
    assert judging.top1(prediction, [0, 0, 0, 0]) == 0
    with pytest.raises(ValueError, match="1 targets for 4 images"):
        judging.top1(prediction, [4])


def test_confidence_is_the_mean_probability_of_the_target() -> None:
    prediction = Prediction(np.asarray([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]))
    assert judging.confidence(prediction, [0, 2]) == pytest.approx((0.7 + 0.3) / 2)
    assert judging.confidence(prediction, [1, 1]) == pytest.approx((0.2 + 0.6) / 2)


def test_agreement_is_over_pairs_of_networks() -> None:
    says = [Prediction(np.eye(4)[index]) for index in ([0, 1, 2, 3], [0, 1, 3, 3], [0, 0, 3, 1])]
    assert judging.agreement(says[:2]) == 3 / 4
    assert judging.agreement(says) == pytest.approx((3 + 1 + 2) / 12)
    assert judging.agreement(says[:1]) is None
    assert judging.agreement([]) is None


def test_distances_and_diversity_by_hand() -> None:
    pixels = np.zeros((3, 2, 2, 1))
    pixels[1], pixels[2, 0] = 0.5, 1.0
    expected = [[0, 0.5, 0.5**0.5], [0.5, 0, 0.5], [0.5**0.5, 0.5, 0]]
    np.testing.assert_allclose(judging.pixel_distances(pixels), expected)
    features = np.asarray([[1.0, 0], [0, 2], [3, 3], [0, 0]])
    found = judging.feature_distances(features)
    np.testing.assert_allclose(found[0], [0, 1, 1 - 0.5**0.5, 1], atol=1e-12)
    assert np.isfinite(found).all()
    others = pixels[1:]
    np.testing.assert_allclose(judging.pixel_distances(pixels, others), np.asarray(expected)[:, 1:])
    np.testing.assert_array_equal(judging.feature_distances(features, features[2:]), found[:, 2:])
    distances = np.asarray([[0, 1, 2], [1, 0, 4], [2, 4, 0.0]])
    assert judging.diversity(distances, [5, 5, 5]) == pytest.approx(7 / 3)
    assert judging.diversity(distances, [5, 6, 5]) == 2
    assert judging.diversity(distances, [4, 5, 6]) is None
