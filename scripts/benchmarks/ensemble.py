"""One step of several networks jointly."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.inversion import ported, problem
from benchmarks.torch_inversion import JITTER, L2, LR, TV_L2, TorchInversion, torch_network
from jinv import models, optimise
from jinv.attacks import deepinversion
from jinv.net import Net
from jinv.objective import ensemble
from jinv.objective.terms import Member


@dataclasses.dataclass(frozen=True)
class Case:
    """Networks that see the same square images; PyTorch has no peer for random copies."""

    networks: tuple[str, ...]
    batch: int
    size: int

    def __str__(self) -> str:
        return f"{'+'.join(self.networks)} {self.batch}x{self.size}"


CASES = (
    Case(("resnet18", "mobilenet_v2"), 4, 128),
    Case(("resnet18", "resnet50", "mobilenet_v2", "efficientnet_lite0"), 4, 128),
)
LEAN = (Case(("mobilenet_v2", "efficientnet_lite0", "efficientnet_lite1"), 8, 224),)
PLACED = (Case(("mobilenet_v2", "efficientnet_lite0"), 8, 112), Case(("mobilenet_v2",) * 2, 8, 112))


class InTurn:
    """Several attacks, a step of each in turn."""

    def __init__(self, attacks: Sequence[deepinversion.Attack], images: np.ndarray) -> None:
        self.attacks = [steps_of(attack, images, 1) for attack in attacks]

    def run(self, steps: int) -> None:
        """Take so many steps of every attack."""
        for _ in range(steps):
            for attack in self.attacks:
                attack.run(1)


def steps_of(attack: deepinversion.Attack, images: np.ndarray, chunk: int) -> timing.Steps:
    """Of images that lie on the attack's devices."""
    return timing.Steps.of(attack, _laid(attack, jnp.asarray(images)), chunk=chunk)


def _laid(attack: deepinversion.Attack, images: jax.Array) -> jax.Array:
    placement = attack.placement
    return jax.device_put(images, jax.NamedSharding(placement.mesh, placement.batch))


def attack_on(
    nets: Sequence[Net],
    case: Case,
    targets: np.ndarray,
    steps: int,
    execution: ensemble.Execution = ensemble.Execution(devices=1),
    *,
    augment: bool = True,
) -> deepinversion.Attack:
    """The published settings on all of them."""
    phase = deepinversion.Phase(steps, jitter=JITTER if augment else 0)
    flip = 0.5 if augment else 0.0
    config = deepinversion.Config(phases=(phase,), lr=LR, tv_l2=TV_L2, l2=L2, flip=flip)
    classes = (targets % nets[0].classes).tolist()
    members = [Member(net) for net in nets]
    return deepinversion.build(config, members, classes, size=case.size, execution=execution)


def first_loss(nets: Sequence[Net], case: Case, images: np.ndarray, targets: np.ndarray) -> float:
    """Of these images as they are."""
    attack = attack_on(nets, case, targets, 1, augment=False)
    state = optimise.enter(attack.phases[0], jnp.asarray(images), 0)
    return float(jax.jit(attack.phases[0].step)(jax.random.key(0), state, attack.data)[1].loss)


def _view(space: Net, net: Net) -> tuple[np.ndarray, np.ndarray]:
    """(gain, shift) from one network's normalised images to another's."""
    gain = net.preprocessing.scale / space.preprocessing.scale
    return gain, net.preprocessing.black - space.preprocessing.black * gain


def against_torch(case: Case, repeats: int, steps: int) -> Iterator[dict]:
    """Jointly against the sum of our single steps, and against an eager PyTorch loop."""
    torch_nets = [torch_network(name) for name in case.networks]
    nets = [ported(name, net) for name, net in zip(case.networks, torch_nets, strict=True)]
    images, targets = problem(case.batch, case.size)
    bounds = nets[0].preprocessing.black, nets[0].preprocessing.white
    total = steps * (1 + 3 * repeats)
    views = [_view(nets[0], net) for net in nets]
    peers: dict[str, timing.Peer] = {
        name: TorchInversion(name, torch_nets, views, images, targets, bounds, total, "float32")
        for name in ("pytorch_frozen", "pytorch_published")
    }
    peers["single_steps"] = InTurn([attack_on([n], case, targets, total) for n in nets], images)
    attack = attack_on(nets, case, targets, total)
    terms, _ = TorchInversion(
        "pytorch_frozen", torch_nets, views, images, targets, bounds, 2, "float32"
    ).terms_and_gradient()
    expected = sum(terms.values())
    difference = abs(first_loss(nets, case, images, targets) / expected - 1)
    if not difference < 1e-4:
        sys.exit(f"{case}: PyTorch does not compute the same: they differ by {difference:.1e}")
    rounds = timing.take_turns(steps_of(attack, images, steps), peers, repeats, steps)
    for name in peers:
        checked = {"loss_difference": difference} if name == "pytorch_frozen" else {}
        yield timing.row(str(case), name, rounds, **checked)


def random_nets(case: Case) -> list[Net]:
    """Weights and names of their own, also for copies."""
    return [
        dataclasses.replace(models.load(name, None, seed=i), name=f"{name}_{i}")
        for i, name in enumerate(case.networks)
    ]


def placed(case: Case, repeats: int, steps: int) -> Iterator[dict]:
    """A network a device, against all on one device and against the same data-parallel."""
    nets = random_nets(case)
    images, targets = problem(case.batch, case.size)
    total = steps * (1 + 3 * repeats)
    devices = len(nets)
    peers = {
        "one_device": steps_of(attack_on(nets, case, targets, total), images, steps),
        "data_parallel": steps_of(
            attack_on(nets, case, targets, total, ensemble.Execution(devices, "data")),
            images,
            steps,
        ),
    }
    attack = attack_on(nets, case, targets, total, ensemble.Execution(devices, "networks"))
    rounds = timing.take_turns(steps_of(attack, images, steps), peers, repeats, steps)
    for name in peers:
        yield timing.row(f"{case} on {devices} devices", name, rounds)


def lean(case: Case, repeats: int, steps: int) -> Iterator[dict]:
    """What memory options cost in time (ratio above 1: so much slower) and save in memory."""
    nets = [models.load(name, None) for name in case.networks]
    images, targets = problem(case.batch, case.size)
    total = steps * (1 + 3 * repeats)
    attack = attack_on(nets, case, targets, total)
    attacks = {
        f"{name}={value}": attack_on(
            nets, case, targets, total, ensemble.Execution(devices=1, **{name: value})
        )
        for name, value in (("networks_at_once", None), ("images_at_once", 2))
    }
    peers = {name: steps_of(other, images, steps) for name, other in attacks.items()}
    rounds = timing.take_turns(steps_of(attack, images, steps), peers, repeats, steps)
    for name, other in attacks.items():
        memory = {"ours_mib": timing.step_mib(attack), "peer_mib": timing.step_mib(other)}
        yield timing.row(str(case), name, rounds, **memory)


def run(args: argparse.Namespace) -> None:
    """The `ensemble` command."""
    kinds = [(case, against_torch) for case in CASES]
    kinds += [(case, lean) for case in LEAN]
    kinds += [(case, placed) for case in PLACED if len(case.networks) <= jax.device_count()]
    names = timing.chosen([f"{kind.__name__} {case}" for case, kind in kinds], args.cases)
    measured = (
        kind(case, args.repeats, args.steps)
        for case, kind in kinds
        if f"{kind.__name__} {case}" in names
    )
    timing.report_rows(itertools.chain.from_iterable(measured), args.out)
