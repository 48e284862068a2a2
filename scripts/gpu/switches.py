"""Both positions of every switch in `jinv.backend`, and of dtypes and layouts beside them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jax

from benchmarks import timing
from gpu import cases, gradients, steps
from gpu.cases import Case
from gpu.layers import Layer, program
from gpu.part import Given
from jinv import backend, prng
from jinv.models import convolution

Way = Callable[[], Any]
LAYERS: dict[str, tuple[Layer, ...]] = {
    "depthwise": (
        Layer(3, 96, 96, 112, stride=2, groups=96),
        Layer(3, 144, 144, 56, groups=144),
        Layer(3, 144, 144, 56, groups=144, dtype="float32"),
        Layer(5, 672, 672, 14, groups=672),
    ),
    "grouped": (Layer(3, 128, 128, 56, groups=32), Layer(3, 512, 512, 14, groups=32)),
    "pointwise": (
        Layer(1, 64, 256, 56, residual=True),
        Layer(1, 1024, 256, 14),
        Layer(1, 256, 512, 56, stride=2),
        Layer(1, 144, 24, 56),
    ),
    "strided": (
        Layer(3, 128, 128, 56, stride=2),
        Layer(3, 256, 256, 28, stride=2),
        Layer(3, 512, 512, 14, stride=2),
    ),
    "stem": (
        Layer(7, 3, 64, 224, stride=2),
        Layer(7, 3, 64, 224, stride=2, dtype="float32"),
        Layer(3, 3, 32, 224, stride=2),
        Layer(3, 3, 32, 224, stride=2, dtype="float32"),
    ),
    "moments": (Layer(0, 256, 256, 56, residual=True), Layer(0, 96, 96, 112, dtype="float32")),
}
LAYOUTS = {"auto": "", "NCHW": "--xla_gpu_force_conv_nchw", "NHWC": "--xla_gpu_force_conv_nhwc"}


def run(given: Given) -> None:
    """One row a switch and case."""
    positions = typing.get_type_hints(backend.Choices)
    for field in dataclasses.fields(backend.Choices):
        for case, dtype, make in CASES[field.name](given.tiny):
            ways = {}
            for position in values(positions[field.name]):
                with backend.choose(**{field.name: position}):
                    ways[str(position)] = make()
            now = str(getattr(backend.choices(), field.name))
            given.emit(**row(field.name, case, dtype, now, timing.alternate(ways)))
    given.emit(**dtypes(given.tiny))
    for found in layouts(given):
        given.emit(**found)


def values(hint: Any) -> tuple[Any, ...]:
    """The positions of a switch of this type."""
    return (False, True) if hint is bool else typing.get_args(hint)


def row(
    switch: str, case: str, dtype: str, now: str | None, found: dict[str, timing.Spread]
) -> dict[str, Any]:
    """What the positions take, and whether the code should stand at another.

    A switch is worth changing if another position is over 3% faster and its upper quartile below
    the lower one of now. Without `now` it is the user's to choose.
    """
    best = min(found, key=lambda name: found[name].ms)
    verdict = None
    if now is not None:
        here, there = found[now], found[best]
        clear = there.ms < 0.97 * here.ms and there.quartiles[1] < here.quartiles[0]
        verdict = "change" if clear else "keep"
    told = {"switch": switch, "case": case, "dtype": dtype, "now": now, "best": best}
    positions = [{"position": name, **spread._asdict()} for name, spread in found.items()]
    return {**told, "verdict": verdict, "positions": positions}


Made = Iterator[tuple[str, str, Callable[[], Way]]]
"""Case, dtype, and what compiles it as the switches stand."""


def of_layers(switch: str) -> Callable[[bool], Made]:
    """A switch that single layers show."""

    def made(tiny: bool) -> Made:
        for layer in LAYERS[switch][:1] if tiny else LAYERS[switch]:
            some = layer.smaller() if tiny else layer
            yield str(some), some.dtype, lambda some=some: program(some)  # type: ignore[misc]

    return made


def of_steps(*networks: Case) -> Callable[[bool], Made]:
    """A switch that whole steps show."""

    def made(tiny: bool) -> Made:
        for case in (cases.TINY,) if tiny else networks:
            yield str(case), case.dtype, lambda case=case: ten_steps(case)  # type: ignore[misc]

    return made


def ten_steps(case: Case) -> Way:
    """In the loop that the switches say."""
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    made = _compiled(case, backend.choices(), precision)
    return lambda: made.run(steps.CHUNK)


@functools.cache
def _compiled(case: Case, *_: Any) -> timing.Steps:
    """Steps under these settings: several switches begin from the same."""
    attack = cases.attack(case)
    return timing.Steps.of(attack, attack.initial(jax.random.key(0)), chunk=steps.CHUNK)


def of_seeds(tiny: bool) -> Made:
    """Ten steps of several candidates whose gradients are formed."""
    case = gradients.TINY if tiny else gradients.SEVERAL
    yield str(case), "float32", lambda: gradients.ten_steps(case, formed=True)


def of_numbers(tiny: bool) -> Made:
    """As many normal numbers as the images have."""
    shape = (2, 8, 8, 3) if tiny else (84, 224, 224, 3)

    def make() -> Way:
        key = prng.written_out(jax.random.key(0))
        draw = jax.jit(lambda key: jax.random.normal(key, shape)).lower(key).compile()
        return lambda: draw(key)

    yield f"normal numbers {shape}", "float32", make


def of_learning(
    form: Callable[[jax.Array, jax.Array], jax.Array], *layers: Layer
) -> Callable[[bool], Made]:
    """A switch that the gradient of the weights of 3x3 convolutions shows."""

    def made(tiny: bool) -> Made:
        for some in (layer(40, 16, 16),) if tiny else layers:

            def make(some: Layer = some) -> Way:
                weight, x = some.arrays

                def gradient(weight: jax.Array, x: jax.Array) -> jax.Array:
                    return jax.vjp(lambda weight: form(x, weight), weight)[1](x)[0]

                program = jax.jit(gradient).lower(weight, x).compile()
                return lambda: program(weight, x)

            yield f"gradient of weights, {some}", some.dtype, make

    return made


def layer(batch: int, size: int, width: int) -> Layer:
    """A 3x3 convolution whose weights are learned."""
    return Layer(3, width, width, size, batch=batch, dtype="float32")


CASES: dict[str, Callable[[bool], Made]] = {
    **{switch: of_layers(switch) for switch in LAYERS},
    "loop": of_steps(cases.MOBILENET_V2),
    "remat": of_steps(cases.MOBILENET_V2),
    "seeds": of_seeds,
    "threefry": of_numbers,
    "weights": of_learning(
        functools.partial(convolution.learned, pads=((1, 1), (1, 1))),
        layer(32, 32, 256),  # a reconstructor's
        layer(32, 16, 512),
    ),
    "images": of_learning(
        functools.partial(convolution.convolve, padding=1),
        layer(128, 32, 16),  # CIFAR ResNets'
        layer(128, 16, 128),
    ),
}
"""Every switch by its name in `backend.Choices`."""


def dtypes(tiny: bool) -> dict[str, Any]:
    """What fewer bits bring; they change the result, so nothing is to be kept."""
    half = cases.TINY if tiny else cases.MOBILENET_V2
    single = cases.in_float32(half)
    ways = {"bfloat16": ten_steps(half), "float32": ten_steps(single)}
    with jax.default_matmul_precision("highest"):
        ways["float32, highest precision"] = ten_steps(single)
    return row("dtype", str(half), "all", None, timing.alternate(ways))


def layouts(given: Given) -> Iterator[dict[str, Any]]:
    """The layout of convolutions that a flag forces, each in a process of its own."""
    found: dict[str, dict[str, timing.Spread]] = {}
    tiny = ["--tiny"] if given.tiny else []
    for name, flag in list(LAYOUTS.items())[: 2 if given.tiny else None]:
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        done = subprocess.run(
            [sys.executable, "-m", "gpu.layout", *tiny],
            env={**os.environ, "XLA_FLAGS": flags},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        for case, spread in json.loads(done.stdout.splitlines()[-1]).items():
            found.setdefault(case, {})[name] = timing.Spread(*spread)
    for case, spreads in found.items():
        yield row("layout", case, "bfloat16", "auto", spreads)
