"""Train a student from a teacher's weights alone: images are made for it while it learns.

    jinv distill --config distill_nayer_cifar100 --out out/student --teacher.weights out/teacher
    jinv distill --config ... --out out/student --resume

Every round makes a batch of images, adds them to a pool on the device, and takes some steps of the
student on the pool. The images come from one of

    generator   a small network that is trained on the teacher's statistics and on what the student
                has not learned yet, NAYER (arXiv 2310.00258)
    inversion   DeepInversion; with `inversion.attack.adaptive` the student as it is now is the
                competitor (Adaptive DeepInversion, arXiv 1912.08795)

Images that lie on disk already are for `jinv train-student`.

All devices of all processes share the images of a round, and of a step of the student, as far as
the two batches can be shared evenly; the pool is on each. The result is the same up to rounding.

A checkpoint is saved every minute, and on Ctrl-C or SIGTERM; --resume goes on to the very same
weights. A finished run is replaced only with --overwrite.

The output folder holds weights.safetensors (PyTorch's names and layouts), classes.txt, train.npz
(the pool, which is `data: {format: arrays, folder: out/student}` for other commands), grid.png and
progress/*.png (images of a round), curves.svg, metrics.csv (loss and accuracy of every step of the
student), scores.csv (test accuracy) and, last of all, summary.json.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jinv import checks, data, image, models, optimise, parallel, training
from jinv.attacks import deepinversion
from jinv.checks import Count, Natural, Seed
from jinv.data import Dataset
from jinv.distill import generator, lessons, soft_labels
from jinv.files import write_arrays
from jinv.image import Preprocessing
from jinv.models import registry
from jinv.models.network import Network
from jinv.net import Net, Variables
from jinv.objective.ensemble import Execution
from jinv.objective.terms import Member, Weights
from jinv.reports import page
from jinv.runs import command, hardware, training_run
from jinv.runs import config as configs
from jinv.runs.progress import Progress, Stretch
from jinv.runs.run_folder import FolderError, RunFolder
from jinv.runs.signals import Signals

_SHOWN = 60
"""Images in a grid."""

_BATCH, _WHOLE = PartitionSpec(parallel.BATCH), PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Inversion:
    """How a round's images are inverted.

    Attributes:
      batch: images of a round.
      terms: how much the teacher's terms count.
      attack: the mathematics; with `adaptive` the student is the competitor.
    """

    batch: Count = 100
    terms: Weights = dataclasses.field(default_factory=Weights)
    attack: deepinversion.Config = dataclasses.field(default_factory=deepinversion.Config)

    def __post_init__(self) -> None:
        checks.fields(self)


Making = generator.Config | Inversion
"""How a round's images are made."""


@checks.todays_keywords
@dataclasses.dataclass(frozen=True)
class Options(training_run.Options):
    """How a run goes; nothing here changes its result.

    Attributes:
      test_every: rounds between two tests and pictures.
      checkpoint_seconds: time between checkpoints.
    """

    checkpoint_seconds: checks.NotNegative = 60.0


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config file holds.

    Attributes:
      teacher: the network whose weights are all that is known.
      model: the student, a network of the zoo, with random weights.
      generator: makes the images; or
      inversion: makes them. One of the two.
      gray: make gray images.
      warmup: rounds that only fill the pool, before the student begins.
      steps: of the student in a round.
      test: real images to test on, their split "test".
      seed: of everything random.
      distillation: what is learned of the labels; hard ones are the classes the images were made
        for.
      training: of the student; its epochs are the rounds in which it learns.
      run: how it goes, without influence on the result.
    """

    teacher: Network
    model: registry.Name
    generator: generator.Config | None = None
    inversion: Inversion | None = None
    gray: bool = False
    warmup: Natural = 0
    steps: Count = 100
    test: data.Source | None = None
    seed: Seed = 0
    distillation: soft_labels.Config = dataclasses.field(default_factory=soft_labels.Config)
    training: training.Config = dataclasses.field(default_factory=training.Config)
    run: Options = dataclasses.field(default_factory=Options)

    def __post_init__(self) -> None:
        checks.fields(self)
        if (self.generator is None) == (self.inversion is None):
            raise ValueError("images come from a generator or from inversion: give one of the two")

    @property
    def making(self) -> Making:
        """What makes the images."""
        making = self.generator or self.inversion
        assert making is not None  # one of the two is given
        return making

    @property
    def rounds(self) -> int:
        """How often images are made."""
        return self.warmup + self.training.epochs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(training_run.Summary):
    """What summary.json holds; `epochs` are rounds, and `steps` the student's.

    Attributes:
      teacher: its name.
      teacher_accuracy: its share of right test images; null without these.
      method: "generator", "inversion" or "adaptive".
      synthesis_seconds: spent making images, without compilation.
      distillation: as in the config.
    """

    teacher: str
    teacher_accuracy: float | None
    method: str
    synthesis_seconds: float
    distillation: dict[str, Any]


class Made(NamedTuple):
    """A round's images.

    Attributes:
      pixels: (B, H, W, C), not clipped; shared by the devices, as their classes are.
      targets: (B,) classes.
      memory: what the next round needs.
    """

    pixels: Array
    targets: Array
    memory: Any


class Synthesiser(Protocol):
    """What makes a round's images."""

    def init(self, key: Array) -> Any:
        """Return the memory before the first round."""

    def make(self, key: Array, memory: Any, student: Variables, **how: Any) -> Made:
        """Make images; `how` goes to `optimise.run`."""


class _Generated:
    """Images of a generator, whose parameters are the memory."""

    def __init__(
        self,
        config: generator.Config,
        teacher: Net,
        student: Net,
        space: Preprocessing,
        mesh: Mesh,
        variables: Variables,
    ) -> None:
        self._mesh = mesh
        self._teacher = variables
        self._generator = generator.Generator(config, teacher, student, space)
        self._renew = jax.jit(self._renewed, out_shardings=NamedSharding(mesh, _WHOLE))
        self.init = self._generator.init

    def _renewed(self, key: Array, memory: Any) -> Any:
        # The run takes its parameters over; the memory is saved if it is stopped.
        return self._generator.renew(key, jax.tree.map(jnp.copy, memory))

    def make(self, key: Array, memory: Any, student: Variables, **how: Any) -> Made:
        layer_key, draw_key, run_key = jax.random.split(key, 3)
        drawn = self._generator.draw(draw_key)
        inputs, targets = parallel.put(self._mesh, _BATCH, drawn)
        told = generator.Data(self._teacher, student, inputs, targets)
        parameters = self._renew(layer_key, memory)
        state = optimise.run(self._generator.phases, run_key, parameters, told, **how)
        pixels = self._generator.generate(state.best_images, inputs)
        return Made(pixels, targets, state.best_images)


class _Inverted:
    """Images of DeepInversion, perhaps with the student as competitor."""

    def __init__(
        self, config: Inversion, teacher: Net, student: Net, space: Preprocessing, mesh: Mesh
    ) -> None:
        self._batch = config.batch
        self._classes = teacher.classes
        self._adaptive = config.attack.adaptive > 0
        self._attack = deepinversion.build(
            config.attack,
            [Member(teacher, config.terms)],
            self._targets(jax.random.key(0)),
            size=space.size,
            space=space,
            competitor=student if self._adaptive else None,
            execution=Execution(devices=mesh.size),
        )
        self._pixels = jax.jit(lambda images: image.denormalise(images, self._attack.space))

    def _targets(self, key: Array) -> Array:
        return jax.random.permutation(key, jnp.arange(self._batch) % self._classes)

    def init(self, key: Array) -> Any:
        del key
        return ()

    def make(self, key: Array, memory: Any, student: Variables, **how: Any) -> Made:
        target_key, noise_key, run_key = jax.random.split(key, 3)
        targets = self._targets(target_key)
        attack = self._attack.with_targets(targets)
        if self._adaptive:
            attack = attack.with_competitor(student)
        noise = attack.initial(noise_key)
        state = optimise.run(attack.phases, run_key, noise, attack.data, **how)
        return Made(self._pixels(state.best_images), attack.data.targets, memory)


class _State(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      student: of its training.
      memory: of the synthesiser.
      images: the pool, bytes (rounds * B, H, W, C), filled from the front.
      labels: of the pool.
    """

    student: training.State
    memory: Any
    images: Array
    labels: Array


class Distillation(command.Loaded):
    """A config with its networks loaded.

    Attributes:
      teacher: the teacher.
      net: the student, with its first weights.
      batch: images of a round.
      test: None without.
      steps: of the student.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.teacher = teacher = config.teacher.load()
        space = dataclasses.replace(teacher.preprocessing, resize=None)
        usual = models.entry(config.model).preprocessing
        seen = lessons.space_of_student(space, usual.channels)
        net = models.load(
            config.model, None, classes=teacher.classes, preprocessing=seen, seed=config.seed
        )
        self.test: Dataset | None = None
        names = tuple(data.class_names(teacher.classes, None, teacher.class_names))
        if config.test is not None:
            real, known = config.test.load("test", space.size), teacher.class_names
            self.test = lessons.lesson(real, teacher.classes, known, network=teacher.name)
            names = self.test.classes
        self.classes = names
        self.net = dataclasses.replace(net, class_names=names, name=config.model)
        self.space = space.gray() if config.gray else space
        self.batch = config.making.batch
        self.mesh = training.batch_mesh(math.gcd(self.batch, config.training.batch))
        laid = parallel.put(self.mesh, _WHOLE, teacher.variables)
        self.synthesiser = self._synthesiser(laid)
        self.steps = config.training.epochs * config.steps
        optimizer = training.make_optimizer(config.training, self.steps)
        criterion = soft_labels.make_criterion(config.distillation, teacher)
        self._train = _on_pool(
            training.make_step(self.net, config.training, optimizer, criterion),
            config.training.batch,
            self.mesh,
        )
        self._told = (laid,) if config.distillation.soft else ()
        self._accuracy = training.make_accuracy(self.net, self.mesh, config.training.batch)
        self._optimizer = optimizer
        self._keys = jax.random.split(jax.random.key(config.seed), 3)

    def _synthesiser(self, teacher: Variables) -> Synthesiser:
        """Return what makes the images, of a teacher whose variables are on the devices."""
        making, shared = self.config.making, (self.teacher, self.net, self.space, self.mesh)
        if isinstance(making, Inversion):
            return _Inverted(making, *shared)
        return _Generated(making, *shared, teacher)

    @property
    def method(self) -> str:
        """Return what makes the images, in a word."""
        making = self.config.making
        if not isinstance(making, Inversion):
            return "generator"
        return "adaptive" if making.attack.adaptive else "inversion"

    def _init(self) -> _State:
        count = self.config.rounds * self.batch
        shape = (count, self.space.height, self.space.width, self.space.channels)
        state = _State(
            training.init(self.net, self._optimizer, self.config.training.learns),
            self.synthesiser.init(self._keys[0]),
            jnp.zeros(shape, jnp.uint8),
            jnp.zeros(count, jnp.int32),
        )
        return parallel.put(self.mesh, _WHOLE, state)

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Distil and write the results; return the summary (of the main process).

        Raises:
          Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
        """
        rounds = self.config.rounds
        state, done, synthesis = self._init(), 0, optimise.Clock()
        stages = [Stretch("rounds", rounds)]
        with folder.checkpoints() as manager, Signals() as stopping, Progress(stages) as bar:
            restored = folder.restore(manager, lambda meta: state)
            if restored is not None:
                meta, arrays = restored
                done, synthesis = meta["done"], optimise.Clock(**meta["synthesis"])
                state = _State(*arrays)
                state = state._replace(student=training.State(*state.student))
            try:
                while done < rounds:
                    made = self._make(state, done, clock=synthesis, should_stop=stopping)
                    if not stopping():
                        state, shown = self._learn(folder, self._added(state, made, done), done)
                        done += 1
                        bar.update(0, done - 1, shown)
                        self._look(folder, state, bar, done)
                    stop = stopping() and done < rounds
                    if stop or folder.due(self.config.run.checkpoint_seconds):
                        told = dataclasses.asdict(synthesis)
                        step = self._learned(done)
                        folder.save(manager, step, state, done=done, synthesis=told)
                    if stop:
                        raise folder.stopped(stopping.number, done, rounds)
            finally:
                folder.save_logs()
        batch = self.config.training.batch
        best = lessons.accuracy(self.teacher, self.test, self.mesh, batch)
        summary: dict[str, Any] = {}
        parallel.on_main(
            lambda: summary.update(self._write(folder, state, best, synthesis)), FolderError
        )
        return summary

    def _make(self, state: _State, done: int, **how: Any) -> Made:
        """Make the images of the round after `done` others, for the student as it is."""
        key = jax.random.fold_in(self._keys[1], done)
        student = state.student.variables
        return self.synthesiser.make(key, state.memory, student, wanted=lambda step: False, **how)

    def _added(self, state: _State, made: Made, done: int) -> _State:
        start = np.int32(done * self.batch)
        pool = _put(self.mesh, state.images, state.labels, made.pixels, made.targets, start)
        return state._replace(images=pool[0], labels=pool[1], memory=made.memory)

    def _learned(self, done: int) -> int:
        """Return how many steps the student has taken after so many rounds."""
        return max(0, done - self.config.warmup) * self.config.steps

    def _learn(
        self, folder: RunFolder, state: _State, done: int
    ) -> tuple[_State, dict[str, np.ndarray]]:
        """Take a round's steps of the student; return the state, and what the bar shows."""
        chunks: list[optimise.Chunk] = []
        looks = optimise.Looks(chunks.append, None, (), folder.clock, wanted=lambda step: False)
        count = np.int32((done + 1) * self.batch)
        pool = (state.images, state.labels, count, self._told)
        student, _ = optimise.drive(
            self._train,
            self._keys[2],
            state.student,
            lambda step: pool,
            self._learned(done + 1),
            looks,
        )
        for chunk in chunks:
            columns = {name: values.tolist() for name, values in chunk.metrics.items()}
            for i, values in enumerate(zip(*columns.values(), strict=True), chunk.start):
                folder.metrics.add(step=i, **dict(zip(columns, values, strict=True)))
        shown = chunks[-1].metrics if chunks else {"images": np.array([int(count)])}
        return state._replace(student=student), {k: v[-1:] for k, v in shown.items()}

    def _look(self, folder: RunFolder, state: _State, bar: Progress, done: int) -> None:
        """Test the student and show the round's images, after every so many rounds."""
        if done % self.config.run.test_every and done < self.config.rounds:
            return
        if self.test is not None:
            found = {"test_accuracy": self._accuracy(state.student.variables, self.test)}
            folder.scores.add(step=self._learned(done), **found)
            bar.say(done, found)
        start = (done - 1) * self.batch
        images = parallel.fetch(state.images[start : start + min(_SHOWN, self.batch)])
        parallel.on_main(lambda: _show(folder, images, done), FolderError)

    def _write(
        self,
        folder: RunFolder,
        state: _State,
        teacher_accuracy: float | None,
        synthesis: optimise.Clock,
    ) -> dict[str, Any]:
        """Write weights, pool, curves; the summary last."""
        config, student = self.config, parallel.fetch(state.student.variables)
        pool = Dataset(parallel.fetch(state.images), parallel.fetch(state.labels), self.classes)
        named = {"images": pool.images, "labels": pool.labels, "classes": np.array(self.classes)}
        write_arrays(folder.path / "train.npz", named)
        shown = pool.images[-self.batch :][:_SHOWN]
        page.write_png(folder.path / "grid.png", image.grid(shown))
        phase = training_run.Phase(
            "student", self.steps, config.training, self._keys[2], self.mesh, config.steps, 0
        )
        summary = Summary(
            **command.shared(folder, hardware.of_mesh(self.mesh)),
            **training_run.write(folder, self.net, student, [phase], pool, self.test),
            teacher=self.teacher.name,
            teacher_accuracy=teacher_accuracy,
            method=self.method,
            synthesis_seconds=round(synthesis.stepping, 3),
            distillation=configs.plain(config.distillation),
        )
        return command.finish(folder, summary)


def _on_pool(step: training.Step, batch: int, mesh: Mesh) -> Callable:
    """Return a step on images that it draws from the pool, which stays on the device."""

    def on_pool(key: Array, state: training.State, pool: Any) -> Any:
        images, labels, count, told = pool
        choice = jax.random.fold_in(jax.random.fold_in(key, _CHOICE), state.step)
        chosen = jax.random.randint(choice, (batch,), 0, count)
        shared = jax.lax.with_sharding_constraint(
            (images[chosen], labels[chosen]), NamedSharding(mesh, _BATCH)
        )
        return step(key, state, (*shared, *told))

    return on_pool


_CHOICE = 2**31
"""No step has this number."""


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _put(
    mesh: Mesh, images: Array, labels: Array, pixels: Array, targets: Array, start: np.int32
) -> tuple[Array, Array]:
    """Put a round's images into the pool, as bytes; the pool is whole on every device."""
    found = jnp.rint(jnp.clip(pixels, 0, 1) * 255).astype(jnp.uint8)
    pool = (
        jax.lax.dynamic_update_slice_in_dim(images, found, start, 0),
        jax.lax.dynamic_update_slice_in_dim(labels, targets.astype(jnp.int32), start, 0),
    )
    return jax.lax.with_sharding_constraint(pool, NamedSharding(mesh, _WHOLE))


def _show(folder: RunFolder, images: np.ndarray, done: int) -> None:
    grid = folder.path / "progress" / f"step_{done:06d}.png"
    grid.parent.mkdir(exist_ok=True)
    page.write_png(grid, image.grid(images))


COMMAND = command.Command(
    name="distill",
    about=str(__doc__),
    config=Config,
    load=Distillation,
    summary=Summary,
    files=(*training_run.FILES, "train.npz", "grid.png", "progress/"),
    say=lessons.said,
    less="a smaller batch of the generator, the inversion or the training",
)
