"""Train a network on a teacher's soft labels, on hard labels, or both.

    jinv train-student --config student_fashion_mnist --out out/student \\
        --data.folder out/synthetic --teacher.weights out/teacher
    jinv train-student --config ... --out out/student --labels out/labels
    jinv train-student --config ... --out out/student --resume

Every view of an image (random parts, mirrored, mixed) gets the teacher's labels anew, in the
training step; or they come from a store that `jinv relabel` wrote. With `test` the student and its
teacher are tried on real images, which are not learned from.

A checkpoint is saved every minute, and on Ctrl-C or SIGTERM; --resume goes on to the very same
weights. A finished run is replaced only with --overwrite.

The output folder holds weights.safetensors (PyTorch's names and layouts; `jinv convert` makes a
.pth file of it), classes.txt, curves.svg, metrics.csv (loss and accuracy of every batch),
scores.csv (test accuracy) and, last of all, summary.json. `jinv.models.load_trained(FOLDER)` makes
a `Net` of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from jax.sharding import PartitionSpec

from jinv import checks, data, models, parallel, training
from jinv.checks import Count, File, Seed
from jinv.distill import lessons, soft_labels
from jinv.image import Preprocessing
from jinv.models import registry
from jinv.models.network import Network
from jinv.recipes.pretrain import measured
from jinv.runs import command, hardware, training_run
from jinv.runs import config as configs
from jinv.runs.run_folder import FolderError, RunFolder


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config file holds.

    Attributes:
      model: the student, a network of the zoo, with random weights.
      test: real images to test on, their split "test".
      data: the images, its split "train"; folders of classes are called as the teacher calls its
        classes, or by their numbers.
      teacher: whose labels are computed in every step. Its normalisation is the student's too.
      labels: a folder that `jinv relabel` wrote, instead of a teacher.
      images_per_class: take so many images of every class, at random; all by default.
      size: of the images as the student sees them, one side or height and width; that of the
        teacher by default.
      seed: of everything random.
      distillation: what is learned of the labels.
      training: the mathematics.
      run: how it goes, without influence on the result.
    """

    model: registry.Name
    test: data.Source | None = None
    data: data.Source = dataclasses.field(default_factory=data.Source)
    teacher: Network | None = None
    labels: Annotated[str, File()] | None = None
    images_per_class: Count | None = None
    size: Count | tuple[Count, Count] | None = None
    seed: Seed = 0
    distillation: soft_labels.Config = dataclasses.field(default_factory=soft_labels.Config)
    training: training.Config = dataclasses.field(default_factory=training.Config)
    run: training_run.Options = dataclasses.field(default_factory=training_run.Options)

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.teacher is not None and self.labels is not None:
            raise ValueError("labels come from a teacher or from a store: give one of the two")
        if self.distillation.soft and self.teacher is None and self.labels is None:
            raise ValueError(
                "soft labels need a teacher, or the folder of labels that `jinv relabel` wrote; "
                "distillation: {soft: 0, hard: 1} learns the hard ones"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(training_run.Summary):
    """What summary.json holds.

    Attributes:
      teacher: its name; null for labels of a store, or none.
      teacher_accuracy: the teacher's share of right test images; null where either is missing.
      data: as in the config.
      distillation: as in the config.
    """

    teacher: str | None
    teacher_accuracy: float | None
    data: dict[str, Any]
    distillation: dict[str, Any]


class Lesson(command.Loaded):
    """A config with its networks and images loaded.

    Attributes:
      teacher: None without one.
      net: the student, with its first weights.
      train: the images, with the teacher's classes.
      test: None without.
      phases: the training.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.teacher = config.teacher.load() if config.teacher else None
        labels = lessons.Labels(config.labels) if config.labels else None
        space, names, classes = self._known(labels)
        usual = models.entry(config.model).preprocessing
        size = config.size or (space or usual).size
        found = config.data.load("train", size)
        classes = classes or len(found.classes)
        network = self.teacher.name if self.teacher else "the teacher"
        key, choice_key = lessons.keys(config.seed)
        self.train = lessons.lesson(
            found,
            classes,
            names,
            each=config.images_per_class,
            key=choice_key,
            network=network,
        )
        self.test = None
        if config.test is not None:
            real = config.test.load("test", size)
            self.test = lessons.lesson(real, classes, self.train.classes, network=network)
        seen = self._preprocessing(space, size, usual.channels)
        net = models.load(config.model, None, classes=classes, preprocessing=seen, seed=config.seed)
        self.net = dataclasses.replace(net, class_names=self.train.classes)
        self.phases = training_run.phases([("student", config.training, key)], len(self.train))
        self._labels = labels if config.distillation.soft else None
        if self._labels is not None:
            self._labels.check(lessons.Plan.of(self.train, config.seed, seen, config.training))

    def _known(
        self, labels: lessons.Labels | None
    ) -> tuple[Preprocessing | None, tuple[str, ...] | None, int | None]:
        """Return the teacher's preprocessing, its classes' names, and their number, if known."""
        if labels is not None:
            return labels.preprocessing, labels.classes, len(labels.classes)
        if self.teacher is None:
            return None, None, None
        return self.teacher.preprocessing, self.teacher.class_names, self.teacher.classes

    def _preprocessing(
        self, space: Preprocessing | None, size: Any, channels: int
    ) -> Preprocessing:
        if space is None:
            return measured(self.train.images, channels)
        space = dataclasses.replace(space, size=size, resize=None)
        return lessons.space_of_student(space, channels)

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Train and write the results; return the summary (of the main process).

        Raises:
          Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
        """
        config, mesh, labels = self.config, self.phases[0].mesh, self._labels
        told: tuple[Any, ...] = ()
        if self.teacher is not None and config.distillation.soft:
            told = (parallel.put(mesh, PartitionSpec(), self.teacher.variables),)
        batch = PartitionSpec(parallel.BATCH)
        variables = training_run.run(
            self.net,
            self.phases,
            folder,
            self.train,
            self.test,
            test_every=config.run.test_every,
            criterion=soft_labels.make_criterion(config.distillation, self.teacher),
            told=lambda step: (
                told if labels is None else (parallel.put(mesh, batch, labels.logits[step]),)
            ),
        )
        best = lessons.accuracy(self.teacher, self.test, mesh, config.training.batch)
        summary: dict[str, Any] = {}
        parallel.on_main(lambda: summary.update(self._write(folder, variables, best)), FolderError)
        return summary

    def _write(
        self, folder: RunFolder, variables: Mapping[Any, Any], teacher_accuracy: float | None
    ) -> dict[str, Any]:
        """Write weights, names of classes, curves; the summary last."""
        config, teacher = self.config, self.teacher
        summary = Summary(
            **command.shared(folder, hardware.of_mesh(self.phases[0].mesh)),
            **training_run.write(folder, self.net, variables, self.phases, self.train, self.test),
            teacher=None if teacher is None else teacher.name,
            teacher_accuracy=teacher_accuracy,
            data=configs.plain(config.data),
            distillation=configs.plain(config.distillation),
        )
        return command.finish(folder, summary)


COMMAND = command.Command(
    name="train-student",
    about=str(__doc__),
    config=Config,
    load=Lesson,
    summary=Summary,
    files=training_run.FILES,
    say=lessons.said,
    less="--training.batch with fewer images",
)
