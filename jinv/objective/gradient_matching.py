"""How far a batch's gradient is from a given one, without forming it where it is large.

A layer y = A W, with rows A (N, k) and the loss's gradient D (N, O) with respect to y, has the
weight gradient g = A'D. Wherever N is small against k and O,

    ||g||^2 = sum (A A') * (D D'),        <g, g*> = sum D * (A g*)

need neither g (k, O) nor its gradient, and with g* for a weight many candidates share one pass.
Convolutions are such layers of their patches. Exact in exact arithmetic; in float32 the difference
||g||^2 - 2 <g, g*> + ||g*||^2 loses its digits once g and g* agree to about 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core

from jinv import checks
from jinv.checks import Word
from jinv.objective import priors

Form = Literal["auto", "formed"]

# Below this many entries a gradient is formed: it costs nothing, and keeps every digit.
SMALL = 2**16


class Match(NamedTuple):
    """Compares one parameter's gradient g with the given g*.

    Attributes:
      own: ||g||^2.
      product: <g, g*>.
      wanted: ||g*||^2.
      difference: ||g - g*||^2.
    """

    own: Array
    product: Array
    wanted: Array
    difference: Array


Distance = Callable[[Sequence[float], Sequence[Match]], Array]
"""(factor of every parameter, its match) -> D(g, g*), a differentiable scalar."""


def l2(factors: Sequence[float], matches: Sequence[Match]) -> Array:
    """D = sum_l f_l ||g_l - g*_l||_2."""
    return _total(factors, [priors.root(m.difference) for m in matches])


def squared_l2(factors: Sequence[float], matches: Sequence[Match]) -> Array:
    """D = sum_l f_l ||g_l - g*_l||_2^2."""
    return _total(factors, [m.difference for m in matches])


def cosine(factors: Sequence[float], matches: Sequence[Match]) -> Array:
    """D = 1 - <g, g*> / (||g|| ||g*||), in the inner product sum_l f_l <g_l, g*_l>."""
    own = _total(factors, [m.own for m in matches])
    wanted = _total(factors, [m.wanted for m in matches])
    lengths = jnp.sqrt(own) * jnp.sqrt(wanted)
    return 1 - _total(factors, [m.product for m in matches]) / jnp.maximum(lengths, 1e-30)


DISTANCES: dict[str, Distance] = {"l2": l2, "squared_l2": squared_l2, "cosine": cosine}
DistanceName = Annotated[str, Word(lambda: DISTANCES)]


def register_distance(name: str, distance: Distance) -> None:
    """Make a distance of gradients of your own a word of the attacks' configs.

    Raises:
      ValueError: the name is taken.
    """
    checks.free("distance", name, DISTANCES)
    DISTANCES[name] = distance


def distance(kind: str, factors: Sequence[float], matches: Sequence[Match | None]) -> Array:
    """Compute D(g, g*) over the parameters that count.

    Args:
      kind: one of `DISTANCES`.
      factors: of every parameter; one of factor 0 does not count.
      matches: of every parameter; one without a match does not count.

    Raises:
      ValueError: no distance has this name.
    """
    checks.one_of("distance", kind, DISTANCES)
    pairs = [(f, m) for f, m in zip(factors, matches, strict=True) if f and m is not None]
    return DISTANCES[kind]([f for f, _ in pairs], [m for _, m in pairs])


def _total(factors: Sequence[float], values: Sequence[Array]) -> Array:
    return _sum(jnp.stack([f * value for f, value in zip(factors, values, strict=True)]))


@jax.custom_jvp
def _sum(values: Array) -> Array:
    """Sum one number a layer.

    XLA would turn a plain sum into a chain of additions, and repeat that for every pixel whose
    gradient it scales: MobileNetV2's cosine distance took 8 times as long. Sorting stops it.
    """
    return jnp.sort(values).sum()


_sum.defjvp(lambda values, tangents: (_sum(*values), jnp.sum(*tangents)))


def forms(n: int, k: int, o: int) -> bool:
    """Say whether "auto" forms a gradient (k, o) of n rows: it is small, or cheaper than (n, n)."""
    return k * o <= SMALL or n * (k + o) > k * o


def between(found: Array, wanted: Array) -> Match:
    """Compare two arrays of the same shape."""
    return Match(
        jnp.square(found).sum(),
        (found * wanted).sum(),
        jnp.square(wanted).sum(),
        jnp.square(found - wanted).sum(),
    )


def compare(
    loss: Callable[[Any, Any], tuple[Array, Any]],
    parameters: Any,
    wanted: Any,
    inputs: Any,
    *,
    form: Form = "auto",
    chosen: Sequence[bool] | None = None,
) -> tuple[list[Match | None], Any]:
    """Compare every parameter's gradient with the given one, and return the loss's other outputs.

    There is one `Match` for every leaf of the parameters; all are differentiable in the inputs.

    Args:
      loss: pure (parameters, inputs) -> (scalar, others), where weights meet what comes of the
        inputs in matrix products and convolutions; parameters that it uses otherwise get their
        ordinary gradient.
      parameters: tree of arrays.
      wanted: tree of the same structure, g*.
      inputs: tree of arrays, such as images.
      form: "auto" avoids forming large gradients where that is cheaper, "formed" forms all.
      chosen: which leaves; the others are None.
    """
    leaves, structure = jax.tree.flatten(parameters)
    targets = jax.tree.leaves(wanted)
    chosen = [True] * len(leaves) if chosen is None else chosen

    def flat_loss(leaves: Sequence[Array], inputs: Any) -> tuple[Array, Any]:
        return loss(jax.tree.unflatten(structure, leaves), inputs)

    program, shape = jax.make_jaxpr(flat_loss, return_shape=True)(leaves, inputs)
    flat_inputs = jax.tree.leaves(inputs)
    sites = _sites(program, leaves, flat_inputs)
    ordinary = {i: leaf for i, leaf in enumerate(leaves) if i not in sites and chosen[i]}
    zeros = {i: jnp.zeros(s.shape, s.dtype) for i, s in sites.items() if chosen[i]}

    def perturbed(zeros: dict, ordinary: dict) -> tuple[Array, tuple[dict[int, Any], Any]]:
        run = _Run(len(leaves), zeros)
        mixed = [ordinary.get(i, leaf) for i, leaf in enumerate(leaves)]
        value, *others = run(program, [*mixed, *flat_inputs])
        seen = {i: run.sites[i].inputs for i in zeros}
        return value, (seen, jax.tree.unflatten(jax.tree.structure(shape[1]), others))

    gradients, (seen, others) = jax.grad(perturbed, (0, 1), has_aux=True)(zeros, ordinary)
    cotangents, gradient = gradients
    found: list[Match | None] = [None] * len(leaves)
    for i, g in gradient.items():
        found[i] = between(g, targets[i])
    for i, d in cotangents.items():
        found[i] = _match(sites[i], seen[i], d, targets[i], form)
    return found, others


class _Layer(NamedTuple):
    """A product y = A W of images' values and a weight, as a matrix product.

    Attributes:
      product: (A, W) -> y, as the network computes it.
      rows: A -> (N, k).
      matrix: W -> (k, O), linear.
      outputs: y -> (N, O).
    """

    product: Callable[[Array, Array], Array]
    rows: Callable[[Array], Array]
    matrix: Callable[[Array], Array]
    outputs: Callable[[Array], Array]


class _Site(NamedTuple):
    """Where a parameter meets the images.

    Attributes:
      layer: in what product.
      prepare: the parameter -> W, linear.
      inputs: A, in the run at hand.
      shape, dtype: of y.
    """

    layer: _Layer
    prepare: Callable[[Array], Array]
    inputs: Any
    shape: tuple[int, ...]
    dtype: Any


def _match(site: _Site, inputs: Array, cotangent: Array, wanted: Array, form: Form) -> Match:
    layer = site.layer
    weight = site.prepare(wanted)
    a, d, target = layer.rows(inputs), layer.outputs(cotangent), layer.matrix(weight)
    if form == "formed" or forms(len(d), *target.shape):
        return between(a.T @ d, target)
    own = ((a @ a.T) * (d @ d.T)).sum()
    product = (cotangent * layer.product(inputs, weight)).sum()
    there = jnp.square(target).sum()
    raw = own - 2 * product + there
    # No less than what rounding leaves of nothing; the gradient stays the formula's.
    least = jnp.finfo(raw.dtype).eps * there
    difference = raw + jax.lax.stop_gradient(jnp.maximum(raw, least) - raw)
    return Match(own, product, there, difference)


def _sites(
    program: core.ClosedJaxpr, leaves: Sequence[Array], inputs: Sequence[Array]
) -> dict[int, _Site]:
    """The parameters that meet the inputs in one product each."""
    run = _Run(len(leaves), {})
    jax.eval_shape(lambda *args: run(program, list(args)), *leaves, *inputs)
    return {i: site for i, site in run.sites.items() if run.uses[i] == 1}


class _Origin(NamedTuple):
    """A value that is a parameter in another shape or type."""

    parameter: int
    prepare: Callable[[Array], Array]


class _Run:
    """Evaluates a program and watches where its first inputs, the parameters, are used.

    Attributes:
      sites: parameter -> its product, as far as it has one.
      uses: how often each parameter is used in any way.
    """

    def __init__(self, parameters: int, added: dict[int, Array]) -> None:
        self.parameters = parameters
        self.added = added
        self.sites: dict[int, _Site] = {}
        self.uses = [0] * parameters

    def __call__(self, program: core.ClosedJaxpr, values: list[Any]) -> list[Any]:
        origins = [
            _Origin(i, lambda w: w) if i < self.parameters else None for i in range(len(values))
        ]
        return self._evaluate(program, values, origins)

    def _evaluate(
        self, program: core.ClosedJaxpr, values: Sequence[Any], origins: Sequence[_Origin | None]
    ) -> list[Any]:
        jaxpr = program.jaxpr
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
        known.update(zip(jaxpr.invars, values, strict=True))
        origin: dict[Any, _Origin | None] = dict(zip(jaxpr.invars, origins, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            sources = [
                None if isinstance(atom, core.Literal) else origin.get(atom) for atom in eqn.invars
            ]
            name = eqn.primitive.name
            if name in ("jit", "pjit"):
                outputs = self._evaluate(eqn.params["jaxpr"], inputs, sources)
            else:
                bind = _function(eqn, jaxpr)
                outputs = bind(*inputs)
                if not eqn.primitive.multiple_results:
                    outputs = [outputs]
                if any(sources):
                    outputs = self._used(eqn, bind, inputs, sources, outputs, origin)
            known.update(zip(eqn.outvars, outputs, strict=True))
        for atom in jaxpr.outvars:
            kept = None if isinstance(atom, core.Literal) else origin.get(atom)
            if kept is not None:
                self.uses[kept.parameter] += 2  # out of sight: what becomes of it is not followed
        return [read(atom) for atom in jaxpr.outvars]

    def _used(
        self,
        eqn: Any,
        bind: Callable,
        inputs: list[Any],
        sources: list[_Origin | None],
        outputs: list[Any],
        origin: dict[Any, _Origin | None],
    ) -> list[Any]:
        if eqn.primitive.name in _RESHAPING and len(inputs) == 1:
            before = sources[0]
            assert before is not None
            origin[eqn.outvars[0]] = _Origin(before.parameter, lambda w: bind(before.prepare(w)))
            return outputs
        for source in sources:
            if source is not None:
                self.uses[source.parameter] += 1
        layer = _LAYERS.get(eqn.primitive.name, lambda *_: None)(eqn, bind, inputs)
        if layer is None or sources[0] is not None or sources[1] is None:
            return outputs
        i, y = sources[1].parameter, outputs[0]
        self.sites[i] = _Site(layer, sources[1].prepare, inputs[0], y.shape, y.dtype)
        return [y + self.added[i] if i in self.added else y]


def _function(eqn: core.JaxprEqn, program: core.Jaxpr) -> Callable[..., Any]:
    """One equation of a program as a function; several outputs come as a list."""
    free = list({atom: None for atom in eqn.invars if isinstance(atom, core.Var)})
    alone = program.replace(constvars=(), invars=free, outvars=eqn.outvars, eqns=[eqn])
    run = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))

    def call(*inputs: Any) -> Any:
        pairs = zip(eqn.invars, inputs, strict=True)
        known = {atom: value for atom, value in pairs if isinstance(atom, core.Var)}
        outputs = run(*(known[atom] for atom in free))
        return outputs if eqn.primitive.multiple_results else outputs[0]

    return call


_RESHAPING = ("reshape", "transpose", "squeeze", "convert_element_type", "expand_dims", "copy")


def _dot(eqn: Any, bind: Callable, inputs: list[Any]) -> _Layer | None:
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    if batch or len(left) != 1 or inputs[1].ndim != 2:
        return None
    (axis,), (row,) = left, right

    def rows(a: Array) -> Array:
        return jnp.moveaxis(a, axis, -1).reshape(-1, a.shape[axis])

    def matrix(w: Array) -> Array:
        return w if row == 0 else w.T

    def outputs(y: Array) -> Array:
        return y.reshape(-1, y.shape[-1])

    return _Layer(bind, rows, matrix, outputs)


def _convolution(eqn: Any, bind: Callable, inputs: list[Any]) -> _Layer | None:
    p = eqn.params
    numbers = p["dimension_numbers"]
    if (
        inputs[0].ndim != 4
        or p["feature_group_count"] != 1
        or p["batch_group_count"] != 1
        or any(d != 1 for d in p["lhs_dilation"])
        or any(n < 0 for pad in p["padding"] for n in pad)
    ):
        return None
    kernel = [inputs[1].shape[i] for i in numbers.rhs_spec[2:]]
    strides, pads, dilation = p["window_strides"], p["padding"], p["rhs_dilation"]

    def nhwc(x: Array, spec: Sequence[int]) -> Array:
        return jnp.transpose(x, (spec[0], *spec[2:], spec[1]))

    def rows(a: Array) -> Array:
        a = jnp.pad(nhwc(a, numbers.lhs_spec), ((0, 0), *pads, (0, 0)))
        counts = [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(a.shape[1:3], kernel, strides, dilation, strict=True)
        ]
        windows = []
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                spans = [
                    slice(t * d, t * d + (n - 1) * s + 1, s)
                    for t, d, n, s in zip((i, j), dilation, counts, strides, strict=True)
                ]
                windows.append(a[:, spans[0], spans[1]])
        return jnp.concatenate(windows, -1).reshape(-1, len(windows) * a.shape[-1])

    def matrix(w: Array) -> Array:
        out, into, *space = numbers.rhs_spec
        return jnp.transpose(w, (*space, into, out)).reshape(-1, w.shape[out])

    def outputs(y: Array) -> Array:
        return nhwc(y, numbers.out_spec).reshape(-1, y.shape[numbers.out_spec[1]])

    return _Layer(bind, rows, matrix, outputs)


_LAYERS = {"dot_general": _dot, "conv_general_dilated": _convolution}
