"""Supervised training of a network as PyTorch does it: `Config`, `State`, `Info`, `init`, `step`.

`init` and `step` are pure; they never jit, print or read files. `run` is the place with jit and
the loop.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jinv import checks, image, optimise, parallel
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
    Moments,
    Net,
    Outputs,
    Parameters,
    Path,
    Variables,
    parameters,
    with_parameters,
)
from jinv.objective.terms import cross_entropy

_BATCH = PartitionSpec(parallel.BATCH)
_DROPS = 1
"""Number of dropout's key among a step's."""

Learns = Literal["all", "head", "all_but_batch_norm"]


@checks.todays_keywords
@dataclasses.dataclass(frozen=True)
class Config:
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
      flip: mirror every image with probability 1/2.
      crop: pixels of black margin that every image may be moved into, at random.
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
    flip: bool = False
    crop: Natural = 0
    statistics_momentum: PositiveShare | None = None
    learns: Learns = "all"

    def __post_init__(self) -> None:
        checks.fields(self)
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


Examples = tuple[Array, Array]
"""Bytes (B, H, W, 1 or C), and labels (B,) or attributes (B, K)."""

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
        return _within(every, lambda path: path[: len(net.head or ())] == net.head)
    layers = {mean[:-1] for mean, _ in net.statistics}
    # Linen keeps a layer's parameters apart from its statistics.
    layers |= {("params", *layer[1:]) for layer in layers if layer[0] == "batch_stats"}
    return _within(every, lambda path: path[:-1] not in layers)


def _within(tree: Variables, chosen: Callable[[Path], bool], path: Path = ()) -> dict[Any, Any]:
    """The leaves of a tree whose path is chosen."""
    kept: dict[Any, Any] = {}
    for key, value in tree.items():
        here = (*path, key)
        if isinstance(value, Mapping):
            inner = _within(value, chosen, here)
            if inner:
                kept[key] = inner
        elif chosen(here):
            kept[key] = value
    return kept


def init(net: Net, optimizer: optax.GradientTransformation, learns: Learns = "all") -> State:
    """The state before the first step, in arrays of its own: steps take over their buffers."""
    variables = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), dict(net.variables))
    changing = learned(net, variables, learns)
    return State(variables, optimizer.init(changing), jnp.zeros((), jnp.int32))


def make_step(net: Net, config: Config, optimizer: optax.GradientTransformation) -> Step:
    """One step on a batch.

    Where all is learned, the network is in training mode: BatchNorm with the moments of the whole
    batch, dropout and stochastic depth on; auxiliary heads stay as they are. Randomness of step t
    comes from `fold_in(key, t)` alone.

    Raises:
      ValueError: the network has no training mode, or no head.
    """
    frozen = config.learns != "all"
    forward = net.mode(training=not frozen)

    def step(key: Array, state: State, examples: Examples) -> tuple[State, optimise.Info]:
        images, labels = examples
        before = learned(net, state.variables, config.learns)
        key = jax.random.fold_in(key, state.step)
        images = augment(key, images, config)
        seen = normalised(net, images, jnp.result_type(*jax.tree.leaves(before)))
        drawn = () if frozen else (jax.random.fold_in(key, _DROPS),)

        def loss(now: Parameters) -> tuple[Array, Outputs]:
            variables = with_parameters(state.variables, now)
            outputs = forward(variables, seen, *drawn)
            return _loss(outputs.logits, labels, config.label_smoothing), outputs

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


def normalised(net: Net, images: Array, dtype: DTypeLike = "float32") -> Array:
    """Bytes of any size as the network takes them."""
    resized = image.resize_bytes(images, net.preprocessing.size)
    return image.from_bytes(resized, net.preprocessing, dtype)


def _loss(logits: Array, labels: Array, smoothing: float) -> Array:
    """Cross-entropy of softmax and classes (B,), or of sigmoid and attributes (B, K); the mean."""
    if labels.ndim == 1:
        classes = logits.shape[-1]
        targets = (1 - smoothing) * jax.nn.one_hot(labels, classes) + smoothing / classes
        return cross_entropy(logits, targets)
    targets = (1 - smoothing) * labels + smoothing / 2
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean()


def _right(logits: Array, labels: Array) -> Array:
    """Whether the image is given its class (B,), or each attribute is right (B, K)."""
    return logits.argmax(-1) == labels if labels.ndim == 1 else (logits > 0) == labels


def augment(key: Array, images: Array, config: Config) -> Array:
    """Every image of a batch of bytes (B, H, W, C) cropped and mirrored for itself."""
    if not config.crop and not config.flip:
        return images

    def one(key: Array, picture: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        batch = picture[None]
        if config.crop:
            batch = image.random_crop(crop_key, batch, config.crop)
        if config.flip:
            batch = image.flip(flip_key, batch)
        return batch[0]

    return jax.vmap(one)(jax.random.split(key, len(images)), images)


def with_statistics(
    net: Net,
    variables: Variables,
    moments: Sequence[Moments],
    shape: tuple[int, ...],
    momentum: float | None = None,
) -> Variables:
    """The variables after BatchNorm layers saw a batch: r <- (1 - m) r + m b, as torch does it.

    b is the batch's mean, and its unbiased variance, n / (n - 1) times the biased one.

    Args:
      net: the network.
      variables: its variables before.
      moments: of the batch, biased variances.
      shape: of the batch of images, which decides n.
      momentum: m of all layers; by default each layer's own.

    Raises:
      ValueError: a layer sees one value a channel, which has no variance.
    """
    assert net.counts is not None
    counts = net.counts(shape)
    if min(counts, default=2) < 2:
        raise ValueError(f"BatchNorm cannot learn from one value a channel: images {shape}")
    momenta = net.momenta if momentum is None else (momentum,) * len(counts)
    return with_moments(variables, net.statistics, moments, counts, momenta)


def with_moments(
    variables: Variables,
    statistics: Sequence[tuple[Path, Path]],
    moments: Sequence[Moments],
    counts: Sequence[int],
    momenta: Sequence[float],
) -> Variables:
    """Return the variables of any network after its BatchNorm layers saw a batch.

    Args:
      variables: before.
      statistics: paths of every layer's running mean and variance.
      moments: of the batch, biased variances, in the same order.
      counts: n of every layer: how many values of a channel its moments are of, at least 2.
      momenta: m of every layer, see `with_statistics`.
    """
    for paths, seen, n, m in zip(statistics, moments, counts, momenta, strict=True):
        new = Moments(seen.mean, seen.var * (n / (n - 1)))
        for path, now in zip(paths, new, strict=True):
            # From the variables as they are now: one layer may come twice.
            before: Any = functools.reduce(operator.getitem, path, variables)
            variables = _changed(variables, path, (1 - m) * before + m * now)
        layer: Any = functools.reduce(operator.getitem, paths[0][:-1], variables)
        if _COUNTER in layer:
            variables = _changed(variables, (*paths[0][:-1], _COUNTER), layer[_COUNTER] + 1)
    return variables


_COUNTER = "num_batches_tracked"


def _changed(variables: Variables, path: Path, value: Any) -> dict[Any, Any]:
    """The variables with another value at one path."""
    for key in reversed(path):
        value = {key: value}
    return with_parameters(variables, value)


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
    clock: optimise.Clock | None = None,
) -> State:
    """Train; returns the last state. The result does not depend on where a run was cut.

    Args:
      net: the network, with the weights to begin with.
      config: of the training.
      key: of the run.
      dataset: images, gray or of the network's channels; brought to its size on the device.
      mesh: of the devices that share a batch, see `batch_mesh`.
      state: to go on from; taken over. See `abstract_state`.
      callback: called after every epoch, and about once a second, see `optimise.run`.
      should_stop: asked after every step, of several processes before a callback; once it is true,
        `run` calls back a last time and returns.
      wanted: see `optimise.run`.
      clock: told where the time went.

    Raises:
      optimise.NonFiniteError: after the callback has seen the finite steps.
    """
    per_epoch = len(dataset) // config.batch
    end = config.epochs * per_epoch
    optimizer = make_optimizer(config, end)
    if state is None:
        state = parallel.put(mesh, PartitionSpec(), init(net, optimizer, config.learns))
    order_key, step_key = jax.random.split(key)
    order = batches(order_key, len(dataset), config.batch, int(parallel.fetch(state.step)))

    def examples(step: int) -> Examples:
        chosen = next(order)
        return parallel.put(mesh, _BATCH, (dataset.images[chosen], dataset.labels[chosen]))

    looks = optimise.Looks(
        callback, None, (per_epoch,), clock or optimise.Clock(), should_stop, wanted
    )
    step = make_step(net, config, optimizer)
    # One by one: every step has a batch of its own.
    return optimise.drive(step, step_key, state, examples, end, looks, loop="python")[0]


def abstract_state(net: Net, config: Config, mesh: Mesh) -> State:
    """Shapes, types and shardings of a run's states, to restore a checkpoint into."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(lambda: init(net, make_optimizer(config, 1), config.learns)),
    )


def make_accuracy(net: Net, mesh: Mesh, batch: int) -> Callable[[Variables, Dataset], float]:
    """A compiled `(variables, dataset) -> accuracy`, see `Info`."""

    @jax.jit
    def right(variables: Variables, images: Array, labels: Array) -> Array:
        return _right(net.apply(variables, normalised(net, images)).logits, labels).sum()

    def accuracy(variables: Variables, dataset: Dataset) -> float:
        count = 0
        for start in range(0, len(dataset), batch):
            images = dataset.images[start : start + batch]
            labels = dataset.labels[start : start + batch]
            missing = batch - len(images)  # the last batch runs the same program
            images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
            rest = ((0, 0),) * (labels.ndim - 1)
            labels = np.pad(labels, ((0, missing), *rest), constant_values=-1)
            count += int(
                parallel.fetch(right(variables, *parallel.put(mesh, _BATCH, (images, labels))))
            )
        return count / dataset.labels.size

    return accuracy
