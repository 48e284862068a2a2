"""Supervised training of a network as PyTorch does it: `Config`, `State`, `Info`, `init`, `step`.

`init` and `step` are pure; they never jit, print or read files. `run` is the place with jit and
the loop.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jinv import checks, optimise, parallel
from jinv.checks import (
    Count,
    Natural,
    NotNegative,
    Positive,
    PositiveShare,
    Share,
    ShareBelowOne,
)
from jinv.data import Dataset
from jinv.net import (
    Net,
    Outputs,
    Parameters,
    Variables,
    parameters,
    with_parameters,
    within,
)
from jinv.objective.terms import cross_entropy
from jinv.training.statistics import with_statistics
from jinv.training.views import View, Views, make_view, normalised, shown

_BATCH = PartitionSpec(parallel.BATCH)
_DROPS = 1
"""Number of dropout's key among a step's."""

Learns = Literal["all", "head", "all_but_batch_norm"]


@checks.todays_keywords
@dataclasses.dataclass(frozen=True)
class Config(Views):
    """The mathematics of a training run; every epoch drops the images that fill no batch.

    Attributes:
      epochs: passes over the images.
      batch: images a step.
      optimizer: "sgd", torch.optim.SGD; or "adam", torch.optim.AdamW.
      lr: highest learning rate: it rises linearly for `warmup` steps and falls to `lr_floor` times
        as much with a cosine.
      momentum, nesterov: of "sgd".
      weight_decay: of all parameters; with "sgd" it is added to the gradient, with "adam" it is
        decoupled from it.
      warmup: in steps.
      lr_floor: share of the learning rate at the end.
      label_smoothing: share of every label that goes to all classes alike.
      flip, crop, resized_crop, mix, mix_alpha: what is seen of the images, see `views.Views`.
      compute_dtype: of the network's arithmetic; parameters, moments and losses stay float32.
      statistics_momentum: weight of a batch in the running statistics, torch's `momentum`; by
        default every BatchNorm layer's own.
      learns: "all"; only the "head", the last linear layer; or "all_but_batch_norm", neither
        BatchNorm's parameters nor its running statistics. Without "all" the network stays in
        inference mode: BatchNorm layers normalise with their running statistics, which stay as they
        are, and nothing is dropped out.
    """

    epochs: Count = 3
    batch: Count = 128
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: Positive = 0.1
    momentum: ShareBelowOne = 0.9
    nesterov: bool = True
    weight_decay: NotNegative = 5e-4
    warmup: Natural = 100
    lr_floor: Share = 0.0
    label_smoothing: ShareBelowOne = 0.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    statistics_momentum: PositiveShare | None = None
    learns: Learns = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer == "adam":
            checks.unused(self, "optimizer is 'adam', which has its own", "momentum", "nesterov")
        if self.learns != "all":
            checks.unused(
                self,
                "running statistics stay as they are unless all is learned",
                "statistics_momentum",
            )
        if self.nesterov and not self.momentum and self.optimizer == "sgd":
            raise ValueError("nesterov needs a momentum")


class State(NamedTuple):
    """What the next step needs.

    Attributes:
      variables: all of the network's: parameters, running statistics, counters.
      optimizer: optax state of the parameters that are learned.
      step: steps done.
    """

    variables: Variables
    optimizer: optax.OptState
    step: Array


Examples = tuple[Any, ...]
"""Bytes (B, H, W, 1 or C), and labels (B,) or attributes (B, K); then what a criterion is told."""

Criterion = Callable[..., Array]
"""(logits, view, *told) -> scalar: the loss of a batch of which the network has seen a `View`."""

Step = Callable[[Array, State, Examples], tuple[State, optimise.Info]]
"""(key, state, examples) -> (state, info).

The info tells of the batch before the update: `loss`, the mean cross-entropy (of attributes, over
these too), and the term "accuracy", the share of the batch that is given its class (of attributes,
the share that is right).
"""


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of so many steps."""
    schedule = optimise.warm_cosine(config.lr, config.warmup, steps, config.lr_floor)
    if config.optimizer == "adam":
        return optax.adamw(schedule, weight_decay=config.weight_decay)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, config.momentum, config.nesterov),
    )


def learned(net: Net, variables: Variables, learns: Learns) -> dict[Any, Any]:
    """The parameters that training changes, see `Config.learns`.

    Raises:
      ValueError: the head is asked for, but the network ends in no linear layer.
    """
    every = parameters(net, variables)
    if learns == "all":
        return every
    if learns == "head":
        if net.head is None:
            raise ValueError(f"{net.name} has no head: it ends in no linear layer")
        return within(every, lambda path: path[: len(net.head or ())] == net.head)
    layers = {mean[:-1] for mean, _ in net.statistics}
    # Linen keeps a layer's parameters apart from its statistics.
    layers |= {("params", *layer[1:]) for layer in layers if layer[0] == "batch_stats"}
    return within(every, lambda path: path[:-1] not in layers)


def init(net: Net, optimizer: optax.GradientTransformation, learns: Learns = "all") -> State:
    """The state before the first step, in arrays of its own: steps take over their buffers."""
    variables = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), dict(net.variables))
    changing = learned(net, variables, learns)
    return State(variables, optimizer.init(changing), jnp.zeros((), jnp.int32))


def make_step(
    net: Net,
    config: Config,
    optimizer: optax.GradientTransformation,
    criterion: Criterion | None = None,
) -> Step:
    """One step on a batch.

    Where all is learned, the network is in training mode: BatchNorm with the moments of the whole
    batch, dropout and stochastic depth on; auxiliary heads stay as they are. Randomness of step t
    comes from `fold_in(key, t)` alone.

    Args:
      net: the network.
      config: the mathematics.
      optimizer: of the parameters that are learned.
      criterion: the loss; by default the mean cross-entropy with the labels.

    Raises:
      ValueError: the network has no training mode, or no head.
    """
    criterion = criterion or functools.partial(_cross_entropy, config.label_smoothing)
    frozen = config.learns != "all"
    forward = net.mode(training=not frozen)

    def step(key: Array, state: State, examples: Examples) -> tuple[State, optimise.Info]:
        images, labels, *told = examples
        before = learned(net, state.variables, config.learns)
        key = jax.random.fold_in(key, state.step)
        wide = jnp.result_type(*jax.tree.leaves(before))
        view = make_view(key, images, labels, config, net.preprocessing.size, net.classes, wide)
        seen = shown(net, view.pixels)
        if config.compute_dtype != "float32":
            seen = seen.astype(config.compute_dtype)
        drawn = () if frozen else (jax.random.fold_in(key, _DROPS),)

        def loss(now: Parameters) -> tuple[Array, Outputs]:
            variables = with_parameters(state.variables, now)
            outputs = forward(variables, seen, *drawn)
            return criterion(outputs.logits, view, *told), outputs

        (value, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(before)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, before)
        now = optax.apply_updates(before, updates)
        variables: Variables = with_parameters(state.variables, now)
        if not frozen:
            variables = with_statistics(
                net, variables, outputs.moments, seen.shape, config.statistics_momentum
            )
        terms = {"accuracy": _right(outputs.logits, labels).mean()}
        info = optimise.Info(value, terms, jnp.zeros((), bool))
        return State(variables, optimizer_state, state.step + 1), info

    return step


def _cross_entropy(smoothing: float, logits: Array, view: View, *_: Any) -> Array:
    """Cross-entropy of softmax and classes, or of sigmoid and attributes; the mean."""
    if not view.has_attributes:
        targets = (1 - smoothing) * view.targets + smoothing / logits.shape[-1]
        return cross_entropy(logits, targets)
    targets = (1 - smoothing) * view.targets + smoothing / 2
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean()


def _right(logits: Array, labels: Array) -> Array:
    """Whether the image is given its class (B,), or each attribute is right (B, K)."""
    return logits.argmax(-1) == labels if labels.ndim == 1 else (logits > 0) == labels


def batches(key: Array, images: int, batch: int, start: int = 0) -> Iterator[np.ndarray]:
    """Yield the indices of every step's images, without end.

    An epoch's order is a permutation that the key and the epoch's number decide; what is left over
    at its end fills no batch and is dropped.

    Args:
      key: of the permutations.
      images: how many there are.
      batch: how many a step takes.
      start: number of the first step that is yielded.

    Raises:
      ValueError: the images fill no batch.
    """
    steps = images // batch
    if not steps:
        raise ValueError(f"{images} images fill no batch of {batch}")
    for epoch in itertools.count(start // steps):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), images))
        for i in range(start % steps if epoch == start // steps else 0, steps):
            yield order[i * batch : (i + 1) * batch]


def keys(key: Array) -> tuple[Array, Array]:
    """Return the key of the batches' order and that of the steps, of a run's key."""
    order_key, step_key = jax.random.split(key)
    return order_key, step_key


def batch_mesh(batch: int) -> Mesh:
    """As many devices as share a batch evenly."""
    count = len(parallel.devices())
    even = max(n for n in range(1, count + 1) if batch % n == 0)
    chosen = parallel.devices()[:even]
    parallel.check_all_take_part(chosen)
    return parallel.mesh(parallel.BATCH, chosen)


def run(
    net: Net,
    config: Config,
    key: Array,
    dataset: Dataset,
    *,
    mesh: Mesh,
    state: State | None = None,
    callback: Callable[[optimise.Chunk], None] = lambda chunk: None,
    should_stop: Callable[[], bool] = lambda: False,
    wanted: Callable[[int], bool] = lambda done: True,
    mark: int | None = None,
    clock: optimise.Clock | None = None,
    criterion: Criterion | None = None,
    told: Callable[[int], tuple[Any, ...]] = lambda step: (),
) -> State:
    """Train; returns the last state. The result does not depend on where a run was cut.

    Args:
      net: the network, with the weights to begin with.
      config: of the training.
      key: of the run.
      dataset: images, gray or of the network's channels; brought to its size on the device.
      mesh: of the devices that share a batch, see `batch_mesh`.
      state: to go on from; taken over. See `abstract_state`.
      callback: called after every `mark` steps, and about once a second, see `optimise.run`.
      should_stop: asked after every step, of several processes before a callback; once it is true,
        `run` calls back a last time and returns.
      wanted: see `optimise.run`.
      mark: steps; by default an epoch's.
      clock: told where the time went.
      criterion: the loss, see `make_step`.
      told: number of a step -> what its criterion is told, on the devices.

    Raises:
      optimise.NonFiniteError: after the callback has seen the finite steps.
    """
    per_epoch = len(dataset) // config.batch
    end = config.epochs * per_epoch
    optimizer = make_optimizer(config, end)
    if state is None:
        state = parallel.put(mesh, PartitionSpec(), init(net, optimizer, config.learns))
    order_key, step_key = keys(key)
    order = batches(order_key, len(dataset), config.batch, int(parallel.fetch(state.step)))

    def examples(step: int) -> Examples:
        chosen = next(order)
        batch = (dataset.images[chosen], dataset.labels[chosen])
        return *parallel.put(mesh, _BATCH, batch), *told(step)

    looks = optimise.Looks(
        callback, None, (mark or per_epoch,), clock or optimise.Clock(), should_stop, wanted
    )
    step = make_step(net, config, optimizer, criterion)
    # One by one: every step has a batch of its own.
    return optimise.drive(step, step_key, state, examples, end, looks, loop="python")[0]


def abstract_state(net: Net, config: Config, mesh: Mesh) -> State:
    """Shapes, types and shardings of a run's states, to restore a checkpoint into."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(lambda: init(net, make_optimizer(config, 1), config.learns)),
    )


def padded(dataset: Dataset, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all images and labels, batch after batch; what the last one lacks is labelled -1.

    Args:
      dataset: the images, at least one.
      batch: images of every batch, so that one program serves all.
    """
    for start in range(0, len(dataset), batch):
        images = dataset.images[start : start + batch]
        labels = dataset.labels[start : start + batch]
        missing = batch - len(images)
        images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        rest = ((0, 0),) * (labels.ndim - 1)
        yield images, np.pad(labels, ((0, missing), *rest), constant_values=-1)


def make_accuracy(net: Net, mesh: Mesh, batch: int) -> Callable[[Variables, Dataset], float]:
    """A compiled `(variables, dataset) -> accuracy`, see `Info`."""

    @jax.jit
    def right(variables: Variables, images: Array, labels: Array) -> Array:
        return _right(net.apply(variables, normalised(net, images)).logits, labels).sum()

    def accuracy(variables: Variables, dataset: Dataset) -> float:
        count = 0
        for images_and_labels in padded(dataset, batch):
            laid = parallel.put(mesh, _BATCH, images_and_labels)
            count += int(parallel.fetch(right(variables, *laid)))
        return count / dataset.labels.size

    return accuracy
