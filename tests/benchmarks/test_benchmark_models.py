"""The benchmark of networks: both sides do the same work, and other work is refused."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from torch import nn

from conftest import ROOT
from jinv.models import layers, registry

pytest.importorskip("torchvision")
sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks import models, timing, torch_inversion  # found through the path above

CASE = models.Case("tiny", 2, 8)


def ours(*, classes: int, rngs: nnx.Rngs) -> layers.Sequential:
    conv = functools.partial(layers.Conv2d, bias=True, rngs=rngs)
    first = (conv(3, 4, 3), layers.BatchNorm2d(4), jax.nn.relu)
    second = (conv(4, 6, 3), layers.BatchNorm2d(6), jax.nn.relu)
    return layers.Sequential(*first, *second, layers.mean, layers.Linear(6, classes, rngs=rngs))


def theirs() -> nn.Module:
    first = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    second = (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*first, *second, mean, nn.Linear(6, 1000))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of this name on both sides."""
    entry = registry.Entry(ours, registry.IMAGENET, 1000)
    monkeypatch.setitem(registry._REGISTRY, CASE.network, entry)
    monkeypatch.setattr(torch_inversion, "torchvision", lambda: SimpleNamespace(models=THEIRS))


THEIRS = SimpleNamespace(tiny=theirs)


def test_a_network_is_timed_forward_and_backward(tiny: None) -> None:
    rows = list(models.measure(CASE, 2, 1))
    assert [row["case"] for row in rows] == ["tiny 2x8 forward", "tiny 2x8 gradient"]
    for row in rows:
        assert min(row[key] for key in ("ours_s", "peer_s", "trace_s", "compile_s")) > 0
        assert row["n"] == 2
        assert row["loss_difference"] < 1e-5
        assert row["norm_difference"] < 1e-4
        assert row["direction_difference"] < 1e-4


@pytest.mark.parametrize("other", ["prior", "targets", "weights"])
def test_other_work_is_refused(tiny: None, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if other == "prior":
        monkeypatch.setattr(models, "FIRST_BATCH_NORM", 11.0)
    if other == "targets":
        forward = models.Theirs.__init__
        monkeypatch.setattr(
            models.Theirs, "__init__", lambda self, net, x, y: forward(self, net, x, y[::-1].copy())
        )
    if other == "weights":
        network = models.their_network

        def wrong(case: models.Case) -> nn.Module:
            net = network(case)
            made = models.ported(case.network, net)
            net.get_parameter("3.weight").data *= 1.1
            monkeypatch.setattr(models, "ported", lambda *args: made)
            return net

        monkeypatch.setattr(models, "their_network", wrong)
    with pytest.raises(SystemExit, match="does not compute the same"):
        next(models.measure(CASE, 2, 1))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """A folder of XLA's, which keeps everything."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_enable_compilation_cache",
    )
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path), 0.0, True), strict=True):
        jax.config.update(name, value)
    models.compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    models.compilation_cache.reset_cache()


def test_compiling_is_timed_without_the_cache(cache: Path) -> None:
    x = jnp.ones(3)
    before = set(cache.iterdir())
    models.Ours(lambda x: jnp.sin(x) + 1, x)
    assert set(cache.iterdir()) == before
    jax.jit(lambda x: jnp.sin(x) + 2)(x)
    assert set(cache.iterdir()) > before


def test_every_family_has_a_network() -> None:
    def family(name: str) -> str:
        build = registry.entry(name).build
        return getattr(build, "func", build).__module__

    theirs = torch_inversion.torchvision().models
    families = {family(name) for name in registry.zoo() if hasattr(theirs, name)}
    assert families <= {family(name) for name in models.NETWORKS}


def test_networks_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parse = importlib.import_module("benchmark").parse
    args = parse(["models", "--out", str(tmp_path / "x.json"), "--networks", "vgg16", "maxvit_t"])
    timed = []
    monkeypatch.setattr(
        models, "measure", lambda case, *rest: timed.append((str(case), *rest)) or []
    )
    monkeypatch.setattr(timing, "report_rows", lambda rows, path: list(rows))
    args.run(args)
    assert timed == [("vgg16 4x112", 9, 3), ("maxvit_t 4x224", 9, 3)]
    assert models.chosen(None) == models.NETWORKS
    with pytest.raises(SystemExit, match="no network lenet on both sides; there are: resnet18"):
        models.chosen(["resnet18", "lenet"])
