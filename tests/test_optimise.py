"""The loop: what a step does, and that nothing about *how* it runs changes what it finds.

Most tests script the losses: one-pixel images count the steps that have changed them, and the
loss is looked up in a table by that count. So images say which step they belong to.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import textwrap
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array, lax

from jinv import optimise
from jinv.optimise import Chunk, EarlyStop, NonFiniteError, Phase, State

LOOPS = pytest.mark.parametrize("loop", ["python", "scan"])
KEY = jax.random.key(7)
NAN, INF = float("nan"), float("inf")


# --- helpers -------------------------------------------------------------------------------------


def scripted(
    losses: Sequence[float],
    *,
    early_stop: EarlyStop | None = None,
    terms: Callable[[Array], dict[str, Array]] | None = None,
    steps: int | None = None,
) -> Phase:
    """A phase whose loss before the t-th of its updates is `losses[t]`."""
    table = jnp.asarray(losses, jnp.float32)

    def loss(key: Array, images: Array, data: Any) -> tuple[Array, dict[str, Array]]:
        count = lax.stop_gradient(images).ravel()[0].astype(jnp.int32)
        value = table[count]
        # Gradient -1 whatever the value: one more for every update.
        pull = images.sum() / images.size - lax.stop_gradient(images.sum() / images.size)
        named = {"only": value} if terms is None else terms(count)
        return value - pull, named

    optimizer = optax.sgd(1.0)

    def enter(images: Array, step: Any) -> State:
        return optimise.init(jnp.zeros_like(images), optimizer, step)

    step = optimise.make_step(loss, optimizer, early_stop=early_stop)
    return Phase("scripted", len(losses) if steps is None else steps, enter, step)


def noisy(steps: int, *, lr: float = 0.1, size: int = 3, name: str = "noisy") -> Phase:
    """Adam on a quadratic bowl whose centre is drawn anew in every step."""
    optimizer = optax.adam(lr)

    def loss(key: Array, images: Array, data: Array) -> tuple[Array, dict[str, Array]]:
        centre = data + jax.random.normal(key, images.shape)
        terms = {"bowl": jnp.square(images - centre).mean(), "size": jnp.abs(images).mean()}
        return terms["bowl"] + 0.1 * terms["size"], terms

    def enter(images: Array, step: Any) -> State:
        return optimise.init(images[:, :size, :size], optimizer, step)

    return Phase(name, steps, enter, optimise.make_step(loss, optimizer))


PIXEL = (1, 1, 1, 1)


def start() -> Array:
    """Fresh each time: `run` may use the images' memory."""
    return jax.random.normal(jax.random.key(1), (2, 3, 3, 1))


def copied(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


class Log:
    """A callback that keeps everything: copies of states, metrics of all steps."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []

    def __call__(self, chunk: Chunk) -> None:
        self.chunks.append(dataclasses.replace(chunk, state=copied(chunk.state)))

    def metric(self, name: str = "loss", phase: int | None = None) -> np.ndarray:
        chunks = [c for c in self.chunks if phase is None or c.phase == phase]
        return np.concatenate([c.metrics[name] for c in chunks])


def at_every_program(patch: pytest.MonkeyPatch, note: Callable[[], object]) -> None:
    """Let `note` be called whenever a program is handed to the device."""
    compile_step = optimise.compile_step

    def compiling(*args: Any) -> Callable:
        compiled = compile_step(*args)

        def call(*args: Any) -> Any:
            note()
            return compiled(*args)

        return call

    patch.setattr(optimise, "compile_step", compiling)


def assert_same(ours: Any, theirs: Any, tolerance: float = 0) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def run(
    *phases: Phase, images: Array | None = None, data: Any = 0.5, **settings: Any
) -> tuple[State, Log]:
    log = Log()
    images = start() if images is None else images
    data = jax.tree.map(jnp.asarray, data)
    return optimise.run(phases, KEY, images, data, callback=log, **settings), log


def play(losses: Sequence[float], **settings: Any) -> tuple[State, Log]:
    script = {k: settings.pop(k) for k in ("early_stop", "terms", "steps") if k in settings}
    return run(scripted(losses, **script), images=jnp.zeros(PIXEL), **settings)


def pixel(images: Array) -> float:
    assert images.shape == PIXEL
    return float(images.ravel()[0])


# --- one step ------------------------------------------------------------------------------------


def test_step_is_gradient_update_and_projection() -> None:
    """Info tells the loss before the update; the update goes through `project`."""
    optimizer = optax.sgd(0.5)

    def loss(key: Array, images: Array, data: Array) -> tuple[Array, dict[str, Array]]:
        terms = {"square": jnp.square(images - data).sum()}
        return 2 * terms["square"], terms

    step = optimise.make_step(loss, optimizer, project=lambda x: jnp.clip(x, -1, 1))
    images = jnp.asarray([0.1, 0.4, -0.2, 3.0]).reshape(1, 2, 2, 1)
    state, info = step(KEY, optimise.init(images, optimizer, step=5), jnp.asarray(0.3))
    expected = 2 * sum((x - 0.3) ** 2 for x in (0.1, 0.4, -0.2, 3.0))
    np.testing.assert_allclose(info.loss, expected, rtol=1e-6)
    np.testing.assert_allclose(info.terms["square"], expected / 2, rtol=1e-6)
    # x - 0.5 * 2 * 2 (x - 0.3), clipped
    np.testing.assert_allclose(state.images.ravel(), [0.5, 0.2, 0.8, -1.0], atol=1e-6)
    assert int(state.step) == 6
    assert_same(state.best_images, images)
    np.testing.assert_array_equal(state.best_loss, info.loss)
    assert not info.stopped


def test_step_draws_from_the_key_and_its_own_number_alone() -> None:
    """The documented `fold_in(key, step)`: what others need to repeat a step."""
    seen = []

    def loss(key: Array, images: Array, data: Any) -> tuple[Array, dict[str, Array]]:
        seen.append(jax.random.key_data(key))
        return images.sum(), {}

    step = optimise.make_step(loss, optax.sgd(0.1))
    state = optimise.init(jnp.zeros(PIXEL), optax.sgd(0.1), step=41)
    state, _ = step(KEY, state, None)
    step(KEY, state, None)
    for number, used in zip((41, 42), seen, strict=True):
        expected = jax.random.key_data(jax.random.fold_in(KEY, number))
        np.testing.assert_array_equal(used, expected)


def test_optimizer_is_told_the_loss() -> None:
    told = []

    def update(updates: Any, state: Any, params: Any = None, *, value: Array) -> tuple[Any, Any]:
        told.append((float(value), float(params.ravel()[0])))
        return updates, state

    listener = optax.GradientTransformationExtraArgs(lambda p: (), update)
    step = optimise.make_step(lambda key, x, data: (3 * x.sum(), {}), listener)
    step(KEY, optimise.init(jnp.full(PIXEL, 2.0), listener), None)
    assert told == [(6.0, 2.0)]


@LOOPS
def test_best_images_are_those_that_had_the_lowest_loss(loop: str) -> None:
    """Not the ones the update after it made, nor the last."""
    losses = [5, 3, 4, 1, 2, 1, 6]
    state, log = play(losses, loop=loop, chunk=3)
    assert pixel(state.best_images) == 3
    assert float(state.best_loss) == 1
    assert pixel(state.images) == 7
    assert int(state.step) == 7
    np.testing.assert_array_equal(log.metric(), losses)
    # As known after every chunk.
    assert [pixel(c.state.best_images) for c in log.chunks] == [1, 3, 3]


# --- the loop does not matter --------------------------------------------------------------------


def two_phases() -> tuple[Phase, Phase]:
    return noisy(10, size=2, name="first"), noisy(6, lr=0.3, name="second")


def widened(phase: Phase, size: int = 3) -> Phase:
    """Enlarges what the phase before has left."""

    def enter(images: Array, step: Any) -> State:
        return phase.enter(jax.image.resize(images, (2, size, size, 1), "nearest"), step)

    return dataclasses.replace(phase, enter=enter)


@pytest.fixture(scope="module")
def reference() -> tuple[State, Log]:
    """Two phases of 10 and 6 steps, in one chunk each."""
    first, second = two_phases()
    return run(first, widened(second), loop="python", chunk=100)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("loop", "chunk"), [("python", 1), ("python", 4), ("scan", 4), ("scan", 1), ("scan", 100)]
)
def test_loop_and_chunk_do_not_change_the_result(
    loop: str, chunk: int, reference: tuple[State, Log]
) -> None:
    """Also where the last chunk is shorter: 10 = 4 + 4 + 2, 6 = 4 + 2, in scans of two."""
    first, second = two_phases()
    state, log = run(first, widened(second), loop=loop, chunk=chunk)
    assert_same(state, reference[0], 0 if loop == "python" else 1e-6)
    for name in ("loss", "bowl", "size"):
        np.testing.assert_allclose(log.metric(name), reference[1].metric(name), rtol=1e-6)
        assert log.metric(name).shape == (16,)
    if chunk == 4:
        told = [(c.phase, c.start, len(c.metrics["loss"])) for c in log.chunks]
        assert told == [(0, 0, 4), (0, 4, 4), (0, 8, 2), (1, 10, 4), (1, 14, 2)]
    assert int(state.step) == 16
    assert not any(c.stopped for c in log.chunks)


def test_auto_is_python_on_cpu_and_scan_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told apart by when `should_stop` is asked: between steps, or between programs of two."""
    for backend, expected in (("cpu", 2), ("gpu", 4)):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        asked = []

        def stop(asked: list[int] = asked) -> bool:
            asked.append(1)
            return len(asked) >= 2

        state, _ = run(noisy(8), chunk=2, should_stop=stop)
        assert int(state.step) == expected


def test_phase_starts_from_the_best_images_of_the_one_before() -> None:
    first = scripted([3, 1, 2, 2])
    entered = []

    def enter(images: Array, step: Any) -> State:
        if not isinstance(images, jax.core.Tracer):
            entered.append((pixel(images), int(step)))
        return second.enter(images, step)

    second = scripted([7, 8, 6])
    state, log = run(
        first, dataclasses.replace(second, enter=enter), images=jnp.zeros(PIXEL), chunk=3
    )
    assert entered == [(1.0, 4)]
    # And the second phase knows nothing of the first one's losses.
    assert float(state.best_loss) == 6
    assert int(state.step) == 7
    np.testing.assert_array_equal(log.metric(), [3, 1, 2, 2, 7, 8, 6])


@pytest.mark.gpu
@LOOPS
@pytest.mark.parametrize("cut", [1, 3, 4], ids=["first phase", "second phase", "phase's end"])
def test_resumed_run_equals_uninterrupted_run(loop: str, cut: int) -> None:
    """Bit by bit. Chunks: 4, 4, 2 of the first phase, 4, 2 of the second."""
    cut = {1: 1, 3: 3, 4: 2}[cut]
    first, second = two_phases()
    whole, log = run(first, widened(second), loop=loop, chunk=4)
    saved = log.chunks[cut]
    unused = jnp.full((2, 3, 3, 1), NAN)
    resumed, rest = run(
        first,
        widened(second),
        loop=loop,
        chunk=4,
        images=unused,
        resume=(saved.phase, copied(saved.state)),
    )
    assert_same(resumed, whole)
    told = [(c.phase, c.start) for c in rest.chunks]
    assert told == [(c.phase, c.start) for c in log.chunks[cut + 1 :]]
    later = np.concatenate([c.metrics["loss"] for c in log.chunks[cut + 1 :]])
    np.testing.assert_array_equal(rest.metric(), later)


def test_resuming_a_finished_run_returns_its_state() -> None:
    first, second = two_phases()
    whole, log = run(first, widened(second), chunk=50)
    again, rest = run(first, widened(second), resume=(1, copied(log.chunks[-1].state)))
    assert_same(again, whole)
    assert not rest.chunks


@LOOPS
def test_same_key_same_images_other_key_other_images(loop: str) -> None:
    def images(seed: int) -> Array:
        data = jnp.asarray(0.5)
        return optimise.run((noisy(5),), jax.random.key(seed), start(), data, loop=loop).images

    np.testing.assert_array_equal(images(3), images(3))
    assert float(jnp.abs(images(3) - images(4)).max()) > 1e-3


# --- programs and memory -------------------------------------------------------------------------


@LOOPS
def test_every_phase_compiles_once(loop: str) -> None:
    """However many steps and chunks, also with a shorter last one."""

    def traces(steps: tuple[int, int], chunk: int) -> tuple[list[int], int]:
        counts, compilations = [0, 0], [0]

        def counting(index: int) -> Phase:
            phase = noisy(steps[index])

            def step(key: Array, state: State, data: Any) -> Any:
                counts[index] += 1
                return phase.step(key, state, data)

            return dataclasses.replace(phase, step=step)

        def count(event: str, seconds: float, **_: Any) -> None:
            compilations[0] += event == "/jax/core/compile/backend_compile_duration"

        phases = (counting(0), counting(1))
        jax.monitoring.register_event_duration_secs_listener(count)
        try:
            run(*phases, loop=loop, chunk=chunk)
        finally:
            jax.monitoring.unregister_event_duration_listener(count)
        return counts, compilations[0]

    traces((1, 1), 3)  # small programs of JAX's own
    few, compiled_few = traces((3, 3), 3)
    many, compiled_many = traces((31, 20), 3)
    assert few == many
    assert few[0] == few[1] == {"python": 1, "scan": few[0]}[loop]
    assert few[0] <= 4
    assert compiled_few == compiled_many == 2


def stepping(phase: Phase) -> tuple[Phase, list[int]]:
    """The phase, and how often its step is traced."""
    traced = [0]

    def step(key: Array, state: State, data: Any) -> Any:
        traced[0] += 1
        return phase.step(key, state, data)

    return dataclasses.replace(phase, step=step), traced


@LOOPS
def test_a_second_run_of_one_attack_compiles_nothing(loop: str) -> None:
    """With another key, other images and other data of the same shapes."""
    phase, traced = stepping(noisy(7))
    again = jax.random.key(8), jax.random.normal(jax.random.key(2), (2, 3, 3, 1)), jnp.asarray(0.2)
    settings: dict[str, Any] = {"loop": loop, "chunk": 3}

    run(phase, **settings)
    first = traced[0]
    clock = optimise.Clock()
    found = optimise.run((phase,), *copied(again), clock=clock, **settings)
    assert traced[0] == first
    assert clock.compiling == 0
    assert clock.steps == 7
    fresh = optimise.run((noisy(7),), *copied(again), **settings)
    assert_same(found, fresh)

    # Arguments that are not alike have programs of their own.
    wide = optimise.run((phase,), again[0], copied(again[1]), jnp.full((3, 3, 1), 0.2), **settings)
    assert traced[0] > first
    assert_same(wide, fresh)


@LOOPS
def test_other_arithmetic_has_its_own_program(loop: str) -> None:
    phase, traced = stepping(noisy(2))
    run(phase, loop=loop)
    first = traced[0]
    with jax.default_matmul_precision("bfloat16"):
        run(phase, loop=loop)
    assert traced[0] > first


@LOOPS
def test_programs_die_with_their_step(loop: str) -> None:
    phase = noisy(4)
    before = len(optimise._PROGRAMS)
    run(phase, loop=loop)
    assert len(optimise._PROGRAMS) == before + 1
    (program,) = optimise._PROGRAMS[phase.step].values()
    step, compiled = weakref.ref(phase.step), weakref.ref(program)
    del phase, program
    gc.collect()
    assert step() is None
    assert compiled() is None
    assert len(optimise._PROGRAMS) <= before


@LOOPS
def test_infos_are_fetched_once_a_chunk(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    fetch = jax.device_get

    def counting(tree: Any) -> Any:
        fetched.append(1)
        return fetch(tree)

    monkeypatch.setattr(jax, "device_get", counting)
    run(noisy(11), loop=loop, chunk=4)
    assert len(fetched) == 3


@LOOPS
def test_state_is_donated(loop: str) -> None:
    """Each program writes into the memory of the one before."""
    phase = noisy(4)
    first = run(phase, loop=loop, chunk=2)[1].chunks[0].state
    run(phase, loop=loop, chunk=2, resume=(0, first))
    large = first.images, first.best_images, first.optimizer
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(large))


@LOOPS
def test_states_of_chunks_may_be_kept(loop: str) -> None:
    states: list[State] = []
    log = run(noisy(6), loop=loop, chunk=2)[1]
    optimise.run(
        *((noisy(6),), KEY, start(), jnp.asarray(0.5)),
        loop=loop,
        chunk=2,
        callback=lambda chunk: states.append(chunk.state),
    )
    assert [int(state.step) for state in states] == [2, 4, 6]
    for state, chunk in zip(states, log.chunks, strict=True):
        assert_same(state, chunk.state)


@LOOPS
def test_states_are_given_where_they_are_wanted(loop: str) -> None:
    """And at every end: of the run, by an early stop, by a loss that is not finite."""
    told: list[Chunk] = []

    def told_of(phase: Phase, **settings: Any) -> list[int]:
        told.clear()
        settings = {"chunk": 2, "loop": loop, "wanted": lambda done: done == 4} | settings
        optimise.run((phase,), KEY, jnp.zeros(PIXEL), None, callback=told.append, **settings)
        return [int(chunk.state.step) for chunk in told if chunk.state is not None]

    assert told_of(scripted([5, 4, 3, 2, 1, 0, 0, 0])) == [4, 8]
    assert len(told) == 4
    assert told_of(scripted(SLOW, early_stop=EarlyStop(4)), wanted=lambda done: False) == [8]
    assert pixel(told[-1].state.best_images) == np.argmin(SLOW[:8])
    with pytest.raises(NonFiniteError):
        told_of(scripted([3, 2, NAN, 1, 1, 1]), wanted=lambda done: False)
    assert not told[-1].finite
    assert np.isfinite(told[-1].state.best_loss)


@LOOPS
def test_the_device_is_at_work_during_callbacks(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next program is handed over before a callback, and waited for after it."""
    order: list[str] = []
    at_every_program(monkeypatch, lambda: order.append("step"))
    optimise.run(
        *((noisy(6),), KEY, start(), jnp.asarray(0.5)),
        loop=loop,
        chunk=2,
        callback=lambda chunk: order.append("tell"),
    )
    programs = {"python": ["step", "step"], "scan": ["step"]}[loop]
    first, *rest = programs
    assert order == [*programs, *2 * [first, "tell", *rest], "tell"]


@LOOPS
@pytest.mark.parametrize(
    ("chunk", "marks", "ends"),
    [
        (None, (4, 6), [4, 6, 8, 12, 16, 18, 20, 22]),
        (5, (), [5, 10, 12, 17, 22]),
        (5, (10,), [5, 10, 12, 17, 20, 22]),
    ],
)
def test_chunks_end_at_marks(
    loop: str, chunk: int | None, marks: tuple[int, ...], ends: list[int]
) -> None:
    """Counted over both phases of 12 and 10 steps, wherever the run was resumed."""
    phases = noisy(12), noisy(10)
    settings: dict[str, Any] = {"loop": loop, "chunk": chunk, "marks": marks}
    whole, log = run(*phases, **settings)
    assert [c.start + len(c.metrics["loss"]) for c in log.chunks] == ends
    saved = log.chunks[0]
    resumed, rest = run(*phases, **settings, resume=(0, copied(saved.state)))
    assert_same(resumed, whole)
    found = [c.start + len(c.metrics["loss"]) for c in rest.chunks]
    assert [end for end in found if any(end % mark == 0 for mark in marks)] == [
        end for end in ends[1:] if any(end % mark == 0 for mark in marks)
    ]


def test_looks_are_a_second_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first: it shows that the run is alive."""
    now = [100.0]
    phase, ends = noisy(12), []
    compile_step = optimise.compile_step

    def compiling(*args: Any) -> Callable:
        compiled = compile_step(*args)

        def call(*args: Any) -> Any:
            now[0] += 0.3
            return compiled(*args)

        now[0] += 20
        return call

    monkeypatch.setattr(optimise, "compile_step", compiling)
    monkeypatch.setattr(optimise.time, "perf_counter", lambda: now[0])
    optimise.run(
        *((phase,), KEY, start(), jnp.asarray(0.5)),
        loop="python",
        callback=lambda chunk: ends.append(chunk.start + len(chunk.metrics["loss"])),
    )
    assert ends == [1, 5, 9, 12]


def test_steps_under_callbacks_count_as_stepping() -> None:
    """A callback that the device waits for does not."""
    clock = optimise.Clock()
    run_clocked = functools.partial(
        optimise.run, (noisy(4),), KEY, data=jnp.asarray(0.5), chunk=2, loop="python"
    )
    began = time.perf_counter()
    run_clocked(start(), clock=clock, callback=lambda chunk: time.sleep(0.2))
    spent = time.perf_counter() - began
    assert spent > 0.4
    assert clock.stepping + clock.compiling < spent - 0.35


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(0.1),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.adamw(0.1),
        optax.rmsprop(0.1),
        optax.lion(0.1),
    ],
    ids=["adam", "sgd", "adamw", "rmsprop", "lion"],
)
def test_optimizers_run_with_donation(optimizer: optax.GradientTransformation) -> None:
    step = optimise.make_step(lambda key, x, data: (jnp.square(x).sum(), {}), optimizer)
    phase = Phase("any", 6, lambda x, t: optimise.init(x, optimizer, t), step)
    state, log = run(phase, chunk=4)
    assert log.metric()[-1] < log.metric()[0]
    assert np.isfinite(state.images).all()


def test_clock_is_told_where_the_time_went() -> None:
    clock = optimise.Clock()
    run(noisy(5), noisy(3), clock=clock, chunk=4)
    assert clock.steps == 8
    assert clock.compiling > 0
    assert clock.stepping > 0


# --- ends ----------------------------------------------------------------------------------------


def blame_script(bad: float) -> Callable[[Array], dict[str, Array]]:
    """Terms in an order that is not the alphabet's; the second and third break at step 5."""

    def terms(count: Array) -> dict[str, Array]:
        broken = jnp.where(count >= 5, bad, 1.0)
        return {"zebra": count.astype(jnp.float32), "yak": broken, "ant": broken}

    return terms


@LOOPS
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("chunk", [3, 5, 10], ids=["inside", "first", "only"])
def test_non_finite_loss_names_the_term_and_the_step(loop: str, bad: float, chunk: int) -> None:
    """The callback has seen every finite step and the best images before it."""
    losses = [5, 4, 2, 3, 6, bad, bad, bad]
    log = Log()
    with pytest.raises(
        NonFiniteError, match=r"not finite at step 5; .* to blame is 'yak'"
    ) as caught:
        optimise.run(
            (scripted(losses, terms=blame_script(bad)),),
            KEY,
            jnp.zeros(PIXEL),
            None,
            callback=log,
            loop=loop,
            chunk=chunk,
        )
    assert (caught.value.term, caught.value.step) == ("yak", 5)
    np.testing.assert_array_equal(log.metric(), losses[:5])
    np.testing.assert_array_equal(log.metric("zebra"), range(5))
    best = log.chunks[-1].state
    assert pixel(best.best_images) == 2
    assert float(best.best_loss) == 2


def test_non_finite_sum_of_finite_terms_blames_the_loss() -> None:
    with pytest.raises(NonFiniteError) as caught:
        play([1, INF], terms=lambda count: {"a": count.astype(jnp.float32)})
    assert (caught.value.term, caught.value.step) == ("loss", 1)


def test_non_finite_step_is_counted_over_all_phases() -> None:
    with pytest.raises(NonFiniteError) as caught:
        run(scripted([1, 1, 1]), scripted([1, NAN]), images=jnp.zeros(PIXEL))
    assert (caught.value.term, caught.value.step) == ("only", 4)


def test_metrics_keep_the_order_of_the_objective() -> None:
    _, log = play([1, 2], terms=blame_script(1.0))
    assert list(log.chunks[0].metrics) == ["loss", "zebra", "yak", "ant"]


# Progress needs a loss below 90% of the last progress: at steps 0, 2 and 3, then never again.
SLOW = [10, 9.5, 8.9, 5, 4.9, 4.8, 4.7, 4.6, 4.5, 4.9, 4.9, 4.9]


@LOOPS
@pytest.mark.parametrize("chunk", [1, 2, 4, 7, 8, 50])
def test_early_stop_is_exact_whatever_the_chunk(loop: str, chunk: int) -> None:
    """With a patience of 4, steps 4 to 7 bring nothing and step 8 is not done."""
    state, log = play(SLOW, early_stop=EarlyStop(4), loop=loop, chunk=chunk)
    np.testing.assert_array_equal(log.metric(), np.asarray(SLOW[:8], np.float32))
    assert int(state.step) == 8
    assert pixel(state.images) == 8
    assert pixel(state.best_images) == 7
    np.testing.assert_allclose(state.best_loss, 4.6)
    assert [c.stopped for c in log.chunks][-1]
    assert not any(c.stopped for c in log.chunks[:-1])


@pytest.mark.parametrize(
    ("patience", "improvement", "steps"), [(1, 0.1, 2), (2, 0.1, 6), (5, 0.1, 9), (4, 0.0, 12)]
)
def test_early_stop_counts_steps_without_enough_progress(
    patience: int, improvement: float, steps: int
) -> None:
    _, log = play(SLOW, early_stop=EarlyStop(patience, improvement))
    assert len(log.metric()) == steps
    assert log.chunks[-1].stopped == (steps < 12)


def test_early_stop_understands_negative_losses() -> None:
    """Progress is then to -1.1 of what -1 was."""
    _, log = play([-1, -1.05, -1.2, -1.25, -1.3, -1.31, -1.4], early_stop=EarlyStop(3))
    assert len(log.metric()) == 6


@LOOPS
def test_phase_after_an_early_stop_goes_on_as_numbered(loop: str) -> None:
    """Its steps are numbered, and draw, as if the phase before had run in full."""
    state, log = run(
        scripted(SLOW, early_stop=EarlyStop(4)),
        scripted([3, 2, 1]),
        images=jnp.zeros(PIXEL),
        loop=loop,
        chunk=5,
    )
    assert [c.start for c in log.chunks] == [0, 5, 12]
    assert int(state.step) == 15
    np.testing.assert_array_equal(log.metric(phase=1), [3, 2, 1])


@LOOPS
def test_resume_after_an_early_stop(loop: str) -> None:
    phases = (scripted(SLOW, early_stop=EarlyStop(4)), scripted([3, 2, 1]))
    whole, log = run(*phases, images=jnp.zeros(PIXEL), loop=loop, chunk=5)
    saved = log.chunks[1]
    assert saved.stopped
    resumed, rest = run(*phases, loop=loop, chunk=5, resume=(0, copied(saved.state)))
    assert_same(resumed, whole)
    np.testing.assert_array_equal(rest.metric(), [3, 2, 1])


@LOOPS
@pytest.mark.parametrize("after", [1, 3, 5], ids=["first phase", "second phase", "between"])
def test_should_stop_ends_the_run_and_its_state_resumes(loop: str, after: int) -> None:
    """The last callback's state is what is returned, and continues to the same result.

    By the time of a callback the device has its next program, of one step or of a scan of two.
    """
    calls = {1: 1, 3: 4, 5: 3}[after]
    first, second = two_phases()
    whole, log = run(first, widened(second), loop=loop, chunk=4)

    seen = Log()
    stopped = optimise.run(
        (first, widened(second)),
        KEY,
        start(),
        jnp.asarray(0.5),
        callback=seen,
        loop=loop,
        chunk=4,
        should_stop=lambda: len(seen.chunks) >= calls - (loop == "python"),
    )
    last = seen.chunks[-1]
    assert_same(stopped, last.state)
    assert int(stopped.step) == len(seen.metric())
    assert int(stopped.step) <= {1: 4, 3: 14, 5: 10}[after] + 2
    resumed, rest = run(
        first, widened(second), loop=loop, chunk=4, resume=(last.phase, copied(last.state))
    )
    assert_same(resumed, whole)
    told = [chunk.metrics["loss"] for chunk in (*seen.chunks, *rest.chunks)]
    np.testing.assert_array_equal(np.concatenate(told), log.metric())


def test_should_stop_is_obeyed_within_a_step_by_the_python_loop() -> None:
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= 3

    state, log = run(noisy(50), loop="python", chunk=50, should_stop=stop)
    assert int(state.step) == 3
    assert len(log.metric()) == 3
    assert len(log.chunks) == 1


def test_several_processes_are_asked_to_stop_between_chunks_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They all have to answer alike, so that every question is a message to all."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= 2

    state, log = run(noisy(50), loop="python", chunk=5, should_stop=stop)
    assert len(asked) == 2
    assert int(state.step) == len(log.metric()) == 10


def test_the_python_loop_is_at_most_one_step_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """When step t + 1 has been handed over, step t is waited for."""
    order: list[str] = []
    wait = jax.block_until_ready

    def waiting(tree: Any) -> Any:
        order.append("wait")
        return wait(tree)

    monkeypatch.setattr(jax, "block_until_ready", waiting)
    at_every_program(monkeypatch, lambda: order.append("step"))
    run(noisy(4), loop="python", chunk=4)
    assert order == ["step", "step", "wait", "step", "wait", "step", "wait"]


@LOOPS
@pytest.mark.parametrize("early", [False, True], ids=["last step", "early stop"])
def test_should_stop_at_a_phases_end_starts_no_other_phase(loop: str, early: bool) -> None:
    """Its program would have to be compiled first: minutes."""
    entered = []

    def enter(images: Array, step: Any) -> State:
        if not isinstance(images, jax.core.Tracer):
            entered.append(1)
        return second.enter(images, step)

    second = scripted([3, 2, 1])
    first = scripted(SLOW[:8] if not early else SLOW, early_stop=EarlyStop(4) if early else None)
    log = Log()
    phases = (first, dataclasses.replace(second, enter=enter))
    state = optimise.run(
        phases,
        KEY,
        jnp.zeros(PIXEL),
        None,
        callback=log,
        chunk=100,
        loop=loop,
        should_stop=lambda: bool(log.chunks),
    )
    assert not entered
    assert int(state.step) == 8
    resumed, rest = run(*phases, loop=loop, resume=(0, copied(state)))
    assert entered == [1]
    assert rest.metric().tolist() == [3, 2, 1]
    assert float(resumed.best_loss) == 1


@LOOPS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_images_of_numpy_are_run_like_jaxs(loop: Any, dtype: Any) -> None:
    """From the beginning, and of a state that was brought to the host; neither is written to."""
    phase, given = scripted([3, 2, 1, 0]), np.zeros((1, 1, 1, 1), dtype)
    expected = optimise.run((phase,), KEY, jnp.asarray(given), None, loop=loop)
    found = optimise.run((phase,), KEY, given, None, loop=loop)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not given.any()
    states: list[State] = []
    optimise.run(
        (phase,),
        KEY,
        given,
        None,
        loop=loop,
        chunk=2,
        callback=lambda chunk: states.append(jax.device_get(chunk.state)),
    )
    resumed = optimise.run((phase,), KEY, given, None, loop=loop, resume=(0, states[0]))
    jax.tree.map(np.testing.assert_array_equal, resumed, expected)
    assert int(states[0].step) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loop": "foo"}, "loop must be one of auto, scan, python, not 'foo'"),
        ({"loop": None}, "loop must be one of auto, scan, python, not None"),
        ({"phases": scripted([1])}, "a list of optimise.Phase, such as attack.phases, not Phase"),
        ({"phases": ["one"]}, "a list of optimise.Phase"),
        ({"images": np.zeros((1, 4, 4, 3), np.uint8)}, "floating-point numbers, not uint8"),
        ({"images": jnp.zeros((1, 4, 4, 3), int)}, "floating-point numbers, not int32"),
        ({"images": None}, "floating-point numbers, not nothing"),
    ],
)
def test_what_cannot_be_run_is_refused(settings: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "phases": (scripted([1]),),
        "images": jnp.zeros((1, 1, 1, 1)),
        "key": KEY,
        "data": None,
    }
    with pytest.raises(ValueError, match=message):
        optimise.run(**given | settings)


def test_nothing_to_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="no phases"):
        run()
    with pytest.raises(ValueError, match="at least one step, not 0"):
        run(noisy(3), chunk=0)


# --- several devices -----------------------------------------------------------------------------

SHARDED = """
import json, sys
sys.path.insert(0, "tests")
import jax, jax.numpy as jnp, numpy as np, optax
import tiny
from jinv import optimise, parallel
from jinv.attacks import deepinversion
from jinv.objective import ensemble
from jinv.objective.terms import Member, Weights

net = tiny.network()
config = deepinversion.Config(
    phases=(deepinversion.Phase(4, downscale=2, jitter=2), deepinversion.Phase(6, jitter=3)),
    coarse="small", warmup=2, lr=0.1, adaptive=0.5, tv_l1=0.01,
)
members = [Member(net, Weights(batch_norm=0.1))]
other = tiny.network(seed=1)
targets = [0, 1, 2, 3, 4, 5, 6, 0]

def result(devices, loop):
    execution = ensemble.Execution(devices=devices)
    attack = deepinversion.build(config, members, targets, competitor=other, execution=execution)
    losses = []
    state = optimise.run(
        attack.phases, jax.random.key(1), attack.initial(jax.random.key(0)), attack.data,
        loop=loop, chunk=4,
        callback=lambda chunk: losses.extend(chunk.metrics["loss"].tolist()),
    )
    return state, losses

alone, losses = result(1, "python")
out = {"devices": jax.device_count(), "alone": len(alone.images.sharding.device_set)}
for loop in ("python", "scan"):
    state, found = result(4, loop)
    out[loop] = {
        "images": float(jnp.abs(np.asarray(state.images) - np.asarray(alone.images)).max()),
        "best": float(jnp.abs(np.asarray(state.best_images) - np.asarray(alone.best_images)).max()),
        "losses": float(np.max(np.abs(np.subtract(found, losses) / losses))),
        "steps": len(found),
        "moved": float(jnp.abs(np.asarray(state.images)).max()),
        "shards": [list(shard.data.shape) for shard in state.images.addressable_shards],
        "rows": sorted(shard.index[0].start or 0 for shard in state.images.addressable_shards),
        "best shards": [list(shard.data.shape) for shard in state.best_images.addressable_shards],
    }

# A step whose images XLA would rather leave in copies on every device.
def gather(images):
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.lax.with_sharding_constraint(images, everywhere)

mesh, sgd = parallel.mesh(parallel.BATCH, jax.devices()), optax.sgd(0.1)
step = optimise.make_step(lambda key, x, data: (jnp.square(x).sum(), {}), sgd, project=gather)
phase = optimise.Phase("gather", 4, lambda images, t: optimise.init(images, sgd, t), step)
images = parallel.put(mesh, jax.sharding.PartitionSpec("batch"), jnp.ones((8, 2, 2, 1)))
state = optimise.run((phase,), jax.random.key(0), images, None, chunk=2)
out["gathered"] = [list(shard.data.shape) for shard in state.images.addressable_shards]
out["value"] = state.images.ravel()[0].item()
print(json.dumps(out))
"""


def test_four_devices_find_the_images_of_one(run_python: Callable[..., Any]) -> None:
    """DeepInversion in two resolutions: losses are of the global batch, images stay spread."""
    found = run_python(textwrap.dedent(SHARDED), devices=4)
    assert found["devices"] == 4
    assert found["alone"] == 1
    for loop in ("python", "scan"):
        part = found[loop]
        assert part["steps"] == 10
        assert part["losses"] < 1e-4, part
        assert part["images"] < 1e-3, part
        assert part["best"] < 1e-3, part
        assert part["moved"] > 1
        assert part["shards"] == part["best shards"] == [[2, 16, 16, 3]] * 4
        assert part["rows"] == [0, 2, 4, 6]
    assert found["gathered"] == [[2, 2, 2, 1]] * 4
    np.testing.assert_allclose(found["value"], 0.8**4, rtol=1e-5)
