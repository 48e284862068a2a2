"""Condensing a data set: one step that recovers images, and one of a student that learns them."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax.sharding import PartitionSpec
from torch import nn

import weights_convert
from benchmarks import timing, torch_cifar, torch_distillation
from benchmarks.inversion import ported
from benchmarks.torch_distillation import (
    STUDENT_PEERS,
    SYNTHESIS_PEERS,
    Drawn,
    TorchStudent,
    TorchSynthesis,
)
from jinv import image, optimise, parallel, training
from jinv.attacks import deepinversion
from jinv.distill import soft_labels
from jinv.net import Net
from jinv.objective.terms import Member, term_weights

KEY = jax.random.key(0)
FEW = 16
"""Images on which sides are compared in float64."""


@dataclasses.dataclass(frozen=True)
class Synthesis:
    """A step on so many square images with one of the presets of condensation."""

    preset: str
    network: str
    batch: int
    size: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.preset} {self.network} {self.batch}x{self.size} {self.dtype}"

    @property
    def config(self) -> deepinversion.Config:
        """Its settings; phases last as long as they are timed."""
        return deepinversion.PRESETS[self.preset]

    @property
    def jitter(self) -> tuple[int, int]:
        """Least and greatest shift."""
        shift = self.config.phases[0].jitter
        return (-shift, shift) if isinstance(shift, int) else shift

    def phase(self, steps: int) -> deepinversion.Phase:
        """So many steps with the preset's shifts."""
        return dataclasses.replace(self.config.phases[0], steps=steps)


@dataclasses.dataclass(frozen=True)
class Student:
    """A step of a student on views of so many square images."""

    network: str
    teacher: str
    batch: int
    size: int

    def __str__(self) -> str:
        return f"{self.network} of {self.teacher} {self.batch}x{self.size}"


CASES: tuple[Synthesis | Student, ...] = (
    Synthesis("sre2l_cifar100", "resnet18_cifar_slim", 100, 28),
    Synthesis("sre2l_cifar100", "resnet18_cifar", 100, 32),
    Synthesis("sre2l", "resnet18_cifar_slim", 100, 28),
    Student("resnet20_cifar", "resnet18_cifar_slim", 128, 28),
    Student("resnet18_cifar_slim", "resnet18_cifar_slim", 128, 28),
)
GPU_CASES = (
    *CASES,
    Synthesis("sre2l", "resnet18", 100, 224),
    Synthesis("sre2l", "resnet18", 100, 224, "bfloat16"),
    Student("resnet18_cifar", "resnet18_cifar", 128, 32),
)


class Evaluated(NamedTuple):
    """What a side says.

    Attributes:
      terms: name -> weighted value; their sum is differentiated.
      gradient: of the images, or of all parameters one after the other.
    """

    terms: dict[str, float]
    gradient: np.ndarray


# --- synthesis ------------------------------------------------------------------------------------


def our_attack(
    case: Synthesis, net: Net, targets: np.ndarray, steps: int, **changes: Any
) -> deepinversion.Attack:
    """What `jinv synthesise` makes a batch with."""
    config = dataclasses.replace(case.config, phases=(case.phase(steps),), **changes)
    return deepinversion.build(
        config, [Member(net)], targets.tolist(), size=case.size, compute_dtype=case.dtype
    )


def our_synthesis(case: Synthesis, net: Net, images: np.ndarray, targets: np.ndarray) -> Evaluated:
    """Of the first step: plain descent shows the gradient."""
    rate = 2.0**24  # so large that the images do not round the gradient off
    plain = {"optimizer": "sgd", "optimizer_args": {}, "schedule": "constant", "clip": False}
    attack = our_attack(case, net, targets, 2, lr=rate, **plain)
    (phase,) = attack.phases
    state = optimise.enter(phase, jnp.asarray(images), 0)
    state, info = jax.jit(phase.step)(KEY, state, attack.data)
    weights = term_weights(attack.members[0])
    terms = {name: weights[name] * float(value) for name, value in info.terms.items()}
    return Evaluated(terms, (images - np.asarray(state.images)) / rate)


def drawn(case: Synthesis) -> Drawn:
    """What our first step draws."""
    key, config = jax.random.fold_in(KEY, 0), case.config
    shift_key, flip_key = jax.random.split(key)
    low, high = case.jitter
    shifts = jax.random.randint(shift_key, (2,), low, high + 1)
    box = None
    if config.crop is not None:
        (box_key,) = jax.random.split(jax.random.fold_in(key, 2), 1)
        size = (case.size, case.size)
        found = image.random_box(box_key, size, config.crop.scale, config.crop.ratio)
        box = tuple(np.asarray(found).tolist())
    flip = bool(jax.random.bernoulli(flip_key, config.flip))
    return Drawn(box, tuple(np.asarray(shifts).tolist()), flip)


def their_synthesis(
    case: Synthesis,
    peer: str,
    net: nn.Module,
    space: image.Preprocessing,
    images: np.ndarray,
    targets: np.ndarray,
    steps: int,
) -> TorchSynthesis:
    """A peer's.

    Args:
      case: what is timed.
      peer: its name.
      net: PyTorch's network.
      space: of the images.
      images, targets: to begin with.
      steps: of the schedule.
    """
    config = case.config
    return TorchSynthesis(
        peer,
        net,
        images,
        targets,
        (space.black, space.white),
        steps,
        case.dtype if images.dtype == np.float32 else "float64",
        jitter=case.jitter,
        scale=None if config.crop is None else config.crop.scale,
        flip=bool(config.flip),
    )


def measure_synthesis(case: Synthesis, repeats: int, steps: int) -> Iterator[dict]:
    """One case against every peer."""
    torch_net = torch_distillation.teacher(case.network, case.size)
    net = ported(case.network, torch_net)
    generator = np.random.default_rng(0)
    shape = (case.batch, case.size, case.size, 3)
    images = generator.normal(size=shape).astype(np.float32)
    targets = np.arange(case.batch) % net.classes
    total = steps * (1 + 3 * repeats)
    given = (net.preprocessing, images, targets, total)
    sides = {p: their_synthesis(case, p, torch_net, *given) for p in SYNTHESIS_PEERS}
    checked = compare_synthesis(case, net, torch_net, images, targets, sides)
    attack = our_attack(case, net, targets, total)
    ours = timing.Steps.of(attack, jnp.asarray(images), chunk=steps)
    rounds = timing.take_turns(ours, sides, repeats, steps)
    yield from rows(case, rounds, checked)


def compare_synthesis(
    case: Synthesis,
    net: Net,
    torch_net: nn.Module,
    images: np.ndarray,
    targets: np.ndarray,
    sides: dict[str, TorchSynthesis],
) -> dict[str, dict[str, float]]:
    """For each peer, how far its first step is from ours; ends the program if it is far.

    On CPU in float64 on a few images; on GPU as it will be timed.

    Args:
      case: what is timed.
      net, torch_net: ours and theirs, of the same weights.
      images, targets: to begin with.
      sides: the peers.
    """
    what = {name: f"{case}: {name}" for name in sides}
    if jax.default_backend() == "gpu":
        ours, same = our_synthesis(case, net, images, targets), drawn(case)
        tolerance = timing.ROUNDED[case.dtype]
        return {
            name: timing.agreement(what[name], ours, side.terms_and_gradient_of(same), tolerance)
            for name, side in sides.items()
        }
    found = {}
    with jax.enable_x64(True):
        wide, few = images[:FEW].astype(np.float64), targets[:FEW]
        exact = dataclasses.replace(case, dtype="float64")
        ours, same = our_synthesis(exact, net, wide, few), drawn(case)
        double = copy.deepcopy(torch_net).double()
        for name in sides:
            side = their_synthesis(case, name, double, net.preprocessing, wide, few, 2)
            theirs = side.terms_and_gradient_of(same)
            found[name] = timing.agreement(what[name], ours, theirs, timing.EXACT)
    return found


# --- students -------------------------------------------------------------------------------------

TEMPERATURE = 20.0
IMAGES = 1000
"""In the data set, of noise."""


def training_config(case: Student, epochs: int) -> training.Config:
    """AdamW 1e-3 with a cosine, on mirrored and mixed parts of the images."""
    return training.Config(
        epochs=epochs,
        batch=case.batch,
        optimizer="adam",
        lr=1e-3,
        weight_decay=0.01,
        warmup=0,
        flip=True,
        resized_crop=(0.08, 1.0),
        mix="cutmix",
    )


class Given(NamedTuple):
    """What a student learns from, on both sides.

    Attributes:
      student, teacher: ours.
      torch_student, torch_teacher: PyTorch's, of the same weights.
      images: bytes (N, H, W, C).
      labels: (N,).
    """

    student: Net
    teacher: Net
    torch_student: nn.Module
    torch_teacher: nn.Module
    images: np.ndarray
    labels: np.ndarray


def student_problem(case: Student) -> Given:
    """Random networks, and noise for images, which takes as long as others."""
    torch.manual_seed(1)
    torch_student = torch_cifar.network(case.network)
    torch_teacher = torch_distillation.teacher(case.teacher, case.size)
    networks = ((case.network, torch_student), (case.teacher, torch_teacher))
    ours = [ported(name, net) for name, net in networks]
    student, teacher = (
        dataclasses.replace(
            net, preprocessing=dataclasses.replace(net.preprocessing, size=case.size)
        )
        for net in ours
    )
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, case.size, case.size, 3), np.uint8)
    labels = np.arange(IMAGES, dtype=np.int32) % student.classes
    return Given(student, teacher, torch_student, torch_teacher, images, labels)


def our_step(case: Student, given: Given, steps: int) -> tuple[training.State, training.Step]:
    """Return the state before the first step, and a step as `jinv train-student` takes it."""
    config = training_config(case, max(1, steps * case.batch // IMAGES))
    optimizer = training.make_optimizer(config, steps)
    criterion = soft_labels.make_criterion(
        soft_labels.Config(temperature=TEMPERATURE), given.teacher
    )
    step = training.make_step(given.student, config, optimizer, criterion)
    return training.init(given.student, optimizer), step


class OurStudent:
    """Steps as `jinv.training.run` takes them, each on a batch of its own, without its looks."""

    def __init__(self, case: Student, given: Given, steps: int) -> None:
        self._mesh = training.batch_mesh(case.batch)
        order_key, self._key = training.keys(KEY)
        self._order = training.batches(order_key, len(given.images), case.batch)
        self._given = given
        state, step = our_step(case, given, steps)
        self._state, self._teacher = parallel.put(
            self._mesh, PartitionSpec(), (state, given.teacher.variables)
        )
        clock = optimise.Clock()
        self._step = optimise.compile_step(step, clock, self._key, self._state, self._examples())

    def _examples(self) -> training.Examples:
        chosen = next(self._order)
        batch = self._given.images[chosen], self._given.labels[chosen]
        laid = parallel.put(self._mesh, PartitionSpec(parallel.BATCH), batch)
        return *laid, self._teacher

    def run(self, steps: int) -> None:
        """Take so many steps, and wait until they are done."""
        infos = []
        for _ in range(steps):
            self._state, info = self._step(self._key, self._state, self._examples())
            infos.append(info)
        jax.device_get(infos)


def their_student(case: Student, peer: str, given: Given, steps: int) -> TorchStudent:
    """A peer's, from the same weights on."""
    config, space = training_config(case, 1), given.student.preprocessing
    assert config.resized_crop is not None
    return TorchStudent(
        peer,
        copy.deepcopy(given.torch_student),
        given.torch_teacher,
        given.images,
        (np.array(space.mean), np.array(space.std)),
        batch=case.batch,
        steps=steps,
        lr=config.lr,
        weight_decay=config.weight_decay,
        temperature=TEMPERATURE,
        scale=config.resized_crop,
    )


def our_student(case: Student, given: Given, count: int) -> tuple[Evaluated, np.ndarray]:
    """Of the first step on so many images, and the pixels that it sees.

    Adam's first moment is a tenth of the gradient then.
    """
    state, step = our_step(case, given, 2)
    config, space = training_config(case, 1), given.student.preprocessing
    images, labels = jnp.asarray(given.images[:count]), jnp.asarray(given.labels[:count])
    dtype = jnp.result_type(*jax.tree.leaves(given.student.variables))

    # Of one program: two could round a pixel to different bytes.
    @jax.jit
    def first(state: training.State, told: training.Examples) -> tuple[Any, ...]:
        state, info = step(KEY, state, told)
        key, classes = jax.random.fold_in(KEY, 0), given.student.classes
        view = training.make_view(key, images, labels, config, space.size, classes, dtype)
        return info.loss, optax.tree.get(state.optimizer, "mu"), view.pixels

    loss, moment, pixels = first(state, (images, labels, given.teacher.variables))
    gradient = 10 * _flat(weights_convert.from_flax(moment))
    return Evaluated({"soft": float(loss)}, gradient), np.asarray(pixels)


def _flat(gradient: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([gradient[name].ravel() for name in sorted(gradient)])


def of_student(side: TorchStudent, pixels: np.ndarray) -> Evaluated:
    """What a peer says of the pixels that we see."""
    loss, gradient = side.loss_and_gradient(pixels)
    return Evaluated({"soft": loss}, _flat(gradient))


def in_float64(given: Given) -> Given:
    """The same networks in float64."""

    def wide(net: Net) -> Net:
        variables = jax.tree.map(
            lambda leaf: np.asarray(leaf, np.float64) if leaf.dtype == np.float32 else leaf,
            net.variables,
        )
        return dataclasses.replace(net, variables=variables)

    return given._replace(
        student=wide(given.student),
        teacher=wide(given.teacher),
        torch_student=copy.deepcopy(given.torch_student).double(),
        torch_teacher=copy.deepcopy(given.torch_teacher).double(),
    )


def compare_student(
    case: Student, given: Given, sides: dict[str, TorchStudent]
) -> dict[str, dict[str, float]]:
    """For each peer, how far its loss of what our first step sees is from ours, as above.

    Args:
      case: what is timed.
      given: its problem.
      sides: the peers.
    """
    what = {name: f"{case}: {name}" for name in sides}
    if jax.default_backend() == "gpu":
        ours, pixels = our_student(case, given, case.batch)
        tolerance = timing.ROUNDED["float32"]
        return {
            name: timing.agreement(what[name], ours, of_student(side, pixels), tolerance)
            for name, side in sides.items()
        }
    found = {}
    with jax.enable_x64(True):
        double = in_float64(given)
        ours, pixels = our_student(case, double, FEW)
        for name in sides:
            theirs = of_student(their_student(case, name, double, 2), pixels)
            found[name] = timing.agreement(what[name], ours, theirs, timing.EXACT)
    return found


def measure_student(case: Student, repeats: int, steps: int) -> Iterator[dict]:
    """One case against every peer."""
    given, total = student_problem(case), steps * (1 + 3 * repeats)
    sides = {peer: their_student(case, peer, given, total) for peer in STUDENT_PEERS}
    checked = compare_student(case, given, sides)
    rounds = timing.take_turns(OurStudent(case, given, total), sides, repeats, steps)
    yield from rows(case, rounds, checked)


# --- both -----------------------------------------------------------------------------------------


def rows(
    case: Synthesis | Student, rounds: list[timing.Round], checked: dict[str, dict[str, float]]
) -> Iterator[dict]:
    """A row for every peer, with images a second."""
    for peer, differences in checked.items():
        row = timing.row(str(case), peer, rounds, **differences)
        yield {
            **row,
            "ours_images_per_s": case.batch / row["ours_s"],
            "peer_images_per_s": case.batch / row["peer_s"],
        }


def measure(case: Synthesis | Student, repeats: int, steps: int) -> Iterator[dict]:
    """Rows of one case."""
    if isinstance(case, Synthesis):
        return measure_synthesis(case, repeats, steps)
    return measure_student(case, repeats, steps)


def run(args: argparse.Namespace) -> None:
    """The `distillation` command."""
    known = GPU_CASES if jax.default_backend() == "gpu" else CASES
    cases = timing.chosen(known, args.cases)
    measured = (measure(case, args.repeats, args.steps) for case in cases)
    timing.report_rows(itertools.chain.from_iterable(measured), args.out)
