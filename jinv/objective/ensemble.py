"""Several networks in one objective: their terms, and where and in what order they are computed.

A `Part` is one network's share of the objective. `build` turns parts into one function of the
images and a tree of variables that already lie where they are needed. How they are computed
(`Execution`) changes no value beyond rounding:

- placement "data": every device has every network and an even share of the batch. BatchNorm
  moments are those of the whole batch.
- placement "networks": every device has the whole batch and some of the networks. All devices
  compute at once, each the gradient of its own networks; the sum goes to all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from jinv import checks, parallel
from jinv.checks import Count
from jinv.objective.terms import weigh

NETWORKS = "networks"

Terms = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Part:
    """One network's share of the objective.

    Attributes:
      name: of the network.
      terms: pure `(variables, images, targets) -> {term: raw value}`.
      weights: of every term.
      variables: what `terms` reads.
      example: shapes of images and targets that `terms` takes.
    """

    name: str
    terms: Callable[[Any, Array, Array], Terms]
    weights: Mapping[str, float]
    variables: Any
    example: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]

    def cost(self) -> float:
        """Count the floating-point operations of one evaluation, as XLA does."""
        lowered = jax.jit(self.terms).lower(_shapes(self.variables), *self.example)
        return float((lowered.cost_analysis() or {}).get("flops", 1.0))


@checks.todays_keywords
@dataclasses.dataclass(frozen=True)
class Execution:
    """How networks are computed; no value depends on it beyond rounding.

    Attributes:
      devices: how many devices take part; all that are of use by default.
      placement: "data", "networks" (see the module), or "auto": the one that keeps more devices
        busy, "data" if both keep as many.
      networks_at_once: take gradients of so many networks at a time, so that the memory of these is
        enough; None for all. One after the other is also the fastest on CPU.
      images_at_once: take gradients of so many images of the whole batch at a time, at the price of
        one more forward pass; all at once by default. See `microbatch`.
    """

    devices: Count | None = None
    placement: Literal["auto", "data", "networks"] = "auto"
    networks_at_once: Count | None = 1
    images_at_once: Count | None = None

    def __post_init__(self) -> None:
        checks.fields(self)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the networks and the batch are.

    Attributes:
      kind: "data" or "networks".
      mesh: of the devices that take part.
      groups: indices of the networks that are computed together, one group a device if `kind` is
        "networks", else one for all.
      reason: in words.
    """

    kind: Literal["data", "networks"]
    mesh: Mesh
    groups: tuple[tuple[int, ...], ...]
    reason: str

    @property
    def batch(self) -> PartitionSpec:
        """Say how arrays with one entry an image lie."""
        return PartitionSpec(parallel.BATCH if self.kind == "data" else None)


def place(parts: Sequence[Part], images: int, execution: Execution) -> Placement:
    """Choose, or check, where this many images and these networks go.

    Args:
      parts: the networks' shares.
      images: the whole batch.
      execution: devices asked for, and the kind of placement.

    Raises:
      ValueError: these devices cannot share them; it says how many can.
    """
    devices = parallel.devices(execution.devices)
    count, kind = len(devices), execution.placement
    at_once = min(execution.images_at_once or images, images)
    even = max(n for n in range(1, count + 1) if images % n == at_once % n == 0)
    by_network = min(count, len(parts)) if len(parts) > 1 else 0
    if kind == "auto":
        kind = "networks" if by_network > even else "data"
    used = by_network if kind == "networks" else even
    if kind == "networks" and used < 2:
        raise ValueError(
            "placement 'networks' needs two networks and two devices at least; there are "
            f"{len(parts)} and {count}"
        )
    if used < count and (execution.devices is not None or execution.placement == "data"):
        raise ValueError(
            f"{count} devices cannot share {images} images evenly"
            + (f", {at_once} at once" if at_once < images else "")
            + (f", nor {len(parts)} networks" if len(parts) > 1 else "")
            + f": the most that can is --execution.devices {used}"
        )
    parallel.check_all_take_part(devices[:used])
    if kind == "networks":
        reason = f"{len(parts)} networks on {by_network} of {count} devices, every image on each"
        groups = _balanced([part.cost() for part in parts], by_network)
        return Placement(kind, parallel.mesh(NETWORKS, devices[:by_network]), groups, reason)
    reason = f"{images} images shared by {even} of {count} devices, every network on each"
    everything = tuple(range(len(parts)))
    return Placement(kind, parallel.mesh(parallel.BATCH, devices[:even]), (everything,), reason)


def _balanced(costs: Sequence[float], count: int) -> tuple[tuple[int, ...], ...]:
    """Give the dearest network first to the device that has least to do, then the next dearest."""
    groups: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        min(groups, key=lambda group: sum(costs[j] for j in group)).append(i)
    return tuple(tuple(sorted(group)) for group in groups)


Evaluate = Callable[[Any, Array, Array], tuple[Array, Terms]]
"""(data, images, targets) -> (weighted sum, {term: raw value}), differentiable once in images."""


def build(
    parts: Sequence[Part], placement: Placement, execution: Execution
) -> tuple[Evaluate, Any]:
    """Make the parts' weighted sum as a function of images, and lay out the data that it reads.

    Terms are called "label[resnet50]" if there are several networks, else "label".

    Args:
      parts: every network's share.
      placement: what `place` found for them.
      execution: how many networks are computed at a time.
    """
    groups = [
        _Group([_named(parts[i], qualified=len(parts) > 1) for i in group])
        for group in placement.groups
    ]
    if placement.kind == "networks":
        names = [name for part in parts for name in _named(part, len(parts) > 1).weights]
        return _on_devices(groups, names, placement, execution.networks_at_once)
    (group,) = groups
    data = parallel.put(placement.mesh, PartitionSpec(), group.variables())
    if execution.networks_at_once is None or execution.networks_at_once >= len(parts):
        return group.evaluate, data

    def evaluate(variables: Any, images: Array, targets: Array) -> tuple[Array, Terms]:
        turns = execution.networks_at_once
        values, gradient = group.gradient(variables, lax.stop_gradient(images), targets, turns)
        return _attach(images, weigh(values, group.weights), gradient), values

    return evaluate, data


@dataclasses.dataclass(frozen=True)
class _Named:
    """A part under the names that its terms have in the whole objective.

    Attributes:
      part: one network's share.
      names: term of the part -> its name in the objective.
    """

    part: Part
    names: Mapping[str, str]

    @property
    def weights(self) -> dict[str, float]:
        """Weights by the names in the objective."""
        return {self.names[term]: weight for term, weight in self.part.weights.items()}

    def __call__(self, variables: Any, images: Array, targets: Array) -> Terms:
        values = self.part.terms(variables, images, targets)
        return {self.names[term]: value for term, value in values.items()}


def _named(part: Part, qualified: bool) -> _Named:
    names = {term: f"{term}[{part.name}]" if qualified else term for term in part.weights}
    return _Named(part, names)


@dataclasses.dataclass(frozen=True)
class _Group:
    """The parts that one device computes."""

    parts: Sequence[_Named]

    @property
    def weights(self) -> dict[str, float]:
        return {name: w for part in self.parts for name, w in part.weights.items()}

    def variables(self) -> tuple[Any, ...]:
        return tuple(named.part.variables for named in self.parts)

    def evaluate(self, variables: Any, images: Array, targets: Array) -> tuple[Array, Terms]:
        values: Terms = {}
        for part, own in zip(self.parts, variables, strict=True):
            values |= part(own, images, targets)
        return weigh(values, self.weights), values

    def gradient(
        self, variables: Any, images: Array, targets: Array, at_once: int | None
    ) -> tuple[Terms, Array]:
        """Compute the terms, and the gradient of their weighted sum.

        Args:
          variables: one tree a part.
          images: (B, H, W, C).
          targets: (B,) class indices.
          at_once: how many networks at a time; all if None.
        """
        values: Terms = {}
        gradient = jnp.zeros_like(images)
        turn = at_once or len(self.parts)
        for start in range(0, len(self.parts), turn):
            some = _Group(self.parts[start : start + turn])
            own = variables[start : start + turn]
            (_, terms), more = jax.value_and_grad(some.evaluate, argnums=1, has_aux=True)(
                own, images, targets
            )
            values |= terms
            gradient = gradient + more
            # The next turn waits for this one, so that their activations never meet in memory.
            # Arithmetic, since XLA drops optimisation barriers on CPU.
            images = images + 0 * jnp.nan_to_num(gradient)
        return {name: values[name] for name in self.weights}, gradient  # JAX sorts keys


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@jax.custom_jvp
def _attach(images: Array, value: Array, gradient: Array) -> Array:
    """`value`, whose gradient with respect to the images is already known."""
    return value


@_attach.defjvp
def _attach_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    _, value, gradient = primals
    return value, jnp.vdot(gradient, tangents[0])


def _on_devices(
    groups: Sequence[_Group], names: Sequence[str], placement: Placement, at_once: int | None
) -> tuple[Evaluate, Any]:
    """Let each device take its own branch of one program, on its own variables.

    Terms come in the order of `names`, whichever device computes them.
    """
    weights = {name: w for group in groups for name, w in group.weights.items()}
    packed, unpack = zip(*(_pack(group.variables()) for group in groups), strict=True)

    def branch(group: _Group, unpack: Callable) -> Callable:
        def compute(row: Any, images: Array, targets: Array) -> tuple[Array, Array]:
            values, gradient = group.gradient(unpack(row), images, targets, at_once)
            nothing = jnp.zeros((), jnp.float32)
            return jnp.stack([values.get(name, nothing) for name in names]), gradient

        return compute

    branches = [branch(*pair) for pair in zip(groups, unpack, strict=True)]

    def device(rows: Any, images: Array, targets: Array) -> tuple[Array, Array]:
        row = jax.tree.map(lambda leaf: leaf[0], rows)
        mine = lax.axis_index(NETWORKS)
        return lax.psum(lax.switch(mine, branches, row, images, targets), NETWORKS)

    one, every = PartitionSpec(NETWORKS), PartitionSpec()
    everywhere = jax.shard_map(
        device,
        mesh=placement.mesh,
        in_specs=(one, every, every),
        out_specs=every,
        check_vma=False,
    )

    def evaluate(rows: Any, images: Array, targets: Array) -> tuple[Array, Terms]:
        vector, gradient = everywhere(rows, lax.stop_gradient(images), targets)
        values = dict(zip(names, vector, strict=True))
        return _attach(images, weigh(values, weights), gradient), values

    return evaluate, parallel.put(placement.mesh, one, _rows(packed))


def _pack(tree: Any) -> tuple[dict[str, np.ndarray], Callable[[Mapping[str, Array]], Any]]:
    """Pack a tree into one flat array a dtype; also return the way back, from longer ones too."""
    leaves, structure = jax.tree.flatten(tree)
    leaves = [np.asarray(leaf) for leaf in leaves]
    flat: dict[str, list[np.ndarray]] = {}
    places = []
    for leaf in leaves:
        before = flat.setdefault(str(leaf.dtype), [])
        places.append((str(leaf.dtype), sum(map(len, before)), leaf.shape))
        before.append(leaf.ravel())

    def unpack(row: Mapping[str, Array]) -> Any:
        parts = [row[k][start : start + math.prod(s)].reshape(s) for k, start, s in places]
        return jax.tree.unflatten(structure, parts)

    return {kind: np.concatenate(parts) for kind, parts in flat.items()}, unpack


def _rows(packed: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stack one row a device, each filled up with zeros to the longest."""
    rows = {}
    for kind in dict.fromkeys(kind for arrays in packed for kind in arrays):
        found = [arrays.get(kind, np.zeros(0, kind)) for arrays in packed]
        length = max(map(len, found))
        rows[kind] = np.stack([np.pad(array, (0, length - len(array))) for array in found])
    return rows
