"""Compare a network with torchvision's of the same name and weights.

torchvision runs in a process of its own, where it is installed: jinv needs neither torch nor
torchvision, and JAX and torch in one process would fight for cores and memory.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import weights_convert
from jinv.net import Net

LIMIT = 1e-4
"""Relative difference of logits above which two networks are not the same."""

_PROGRAM = "torchvision_logits.txt"
_NOT_COMPARED, _NOT_LOADED = 3, 4  # its exit codes
_SIZE = (96, 128)
_SIZES = {"inception_v3": (139, 171), "maxvit_t": (224, 224)}  # what they take at least
_SECONDS = 600


class NotComparedError(Exception):
    """There is nothing to compare with; the message says why."""


def difference(net: Net, weights: Path) -> float:
    """Return ||logits - torchvision's|| / ||torchvision's|| of two random images.

    Args:
      net: the network that the weights make here.
      weights: the file, which torchvision's network has to load with `strict=True`.

    Raises:
      NotComparedError: torchvision is not installed, cannot be imported, or has no such network.
      WeightsError: torchvision does not load the file.
    """
    if not importlib.util.find_spec("torch") or not importlib.util.find_spec("torchvision"):
        raise NotComparedError("torchvision is not installed")
    height, width = _SIZES.get(net.name, _SIZE)
    images = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    with tempfile.TemporaryDirectory() as temporary:
        theirs = _torchvision(net, weights, images, Path(temporary))
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(net(jnp.asarray(images)).logits)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _torchvision(net: Net, weights: Path, images: np.ndarray, folder: Path) -> np.ndarray:
    """Run torchvision's network; what goes in and out lies in the folder."""
    if weights.suffix == ".safetensors":  # torch alone does not read it
        state = weights_convert.read(weights)
        weights = folder / "weights.pth"
        weights_convert.write(weights, state)
    np.save(folder / "images.npy", images.transpose(0, 3, 1, 2))
    program = resources.files("jinv.models").joinpath(_PROGRAM).read_text(encoding="utf-8")
    arguments = [net.name, str(net.classes), str(weights.absolute()), str(folder)]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, *arguments],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotComparedError(f"torchvision took more than {_SECONDS} s") from None
    said = (done.stdout if done.returncode in (_NOT_COMPARED, _NOT_LOADED) else done.stderr).strip()
    reason = said.splitlines()[-1] if said else f"torchvision ended with {done.returncode}"
    if done.returncode == _NOT_LOADED:
        raise weights_convert.WeightsError(f"torchvision does not load it: {reason}")
    if done.returncode:
        raise NotComparedError(reason)
    return np.load(folder / "logits.npy")
