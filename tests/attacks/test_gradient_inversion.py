"""Gradient matching as torch's double backward computes it; groups, noise, what is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_evidence import double, ported, torch_network

import tiny
from jinv import models, optimise
from jinv.attacks import gradient_inversion
from jinv.attacks.gradient_inversion import PRESETS, Attack, Config, Execution
from jinv.federated import defences, evidence, labels
from jinv.federated.defences import Defence
from jinv.federated.evidence import Evidence, Local
from jinv.image import denormalise, normalise
from jinv.net import Net
from jinv.objective import ensemble, priors
from jinv.objective.terms import Member

KEY = jax.random.key(3)
PLAIN: dict[str, Any] = {
    "steps": 1,
    "warmup": 1,
    "seeds": 1,
    "noise": 0.0,
    "clip": False,
    "gradient": 1.0,
}


def first_step(attack: Attack, images: Any) -> tuple[optimise.State, optimise.Info]:
    phase = attack.phases[0]
    return jax.jit(phase.step)(KEY, phase.enter(jnp.asarray(images), 0), attack.data)


def torch_distance(found: list[Any], wanted: list[Any], kind: str) -> Any:
    import torch

    pairs = list(zip(found, wanted, strict=True))
    if kind == "l2":
        return sum((a - b).norm() for a, b in pairs)
    if kind == "squared_l2":
        return sum((a - b).square().sum() for a, b in pairs)
    ours = torch.cat([a.flatten() for a, _ in pairs])
    theirs = torch.cat([b.flatten() for _, b in pairs])
    return 1 - ours @ theirs / (ours.norm() * theirs.norm())


@pytest.mark.parametrize(
    ("name", "training", "distance"),
    [
        ("resnet18", False, "l2"),
        pytest.param("resnet18", True, "cosine", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", False, "squared_l2", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", True, "l2", marks=pytest.mark.slow),
    ],
)
def test_loss_and_image_gradient_equal_torch(name: str, training: bool, distance: str) -> None:
    """In double precision: the gradient's distance, differentiated again with respect to images."""
    torch = pytest.importorskip("torch")
    network = torch_network(name, 5).train(training)
    if name == "mobilenet_v2":
        state = torch_weights_of_the_package(network)
        network.load_state_dict(state)
    rng = np.random.default_rng(0)
    secret, images = rng.normal(size=(2, 2, 32, 40, 3))
    classes = [3, 1]

    with jax.enable_x64(True):
        net = ported(name, network, 5)
        net = dataclasses.replace(net, variables=double(net))
        held, _ = evidence.simulate(net, jnp.asarray(secret), classes, training=training)
        config = Config(distance=distance, tv_l2=2e-3, l2=1e-2, **PLAIN)  # type: ignore[arg-type]
        attack = gradient_inversion.build(config, net, held, classes, size=(32, 40))
        state, info = first_step(attack, images[None])
        ours = np.asarray(optax.tree.get(state.optimizer, "mu"))[0] / 0.1

    def gradients(x: Any, graph: bool) -> list[Any]:
        loss = torch.nn.functional.cross_entropy(network(x), torch.tensor(classes))
        return list(torch.autograd.grad(loss, list(network.parameters()), create_graph=graph))

    wanted = [g.detach() for g in gradients(nchw(secret), False)]
    x = nchw(images).requires_grad_()
    matching = torch_distance(gradients(x, True), wanted, distance)
    variation = sum(
        d.norm()
        for d in (
            x[..., :-1] - x[..., 1:],
            x[:, :, :-1] - x[:, :, 1:],
            x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
            x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
        )
    )
    loss = matching + 2e-3 * variation + 1e-2 * x.flatten(1).norm(dim=1).mean()
    loss.backward()
    theirs = x.grad.numpy().transpose(0, 2, 3, 1)
    assert float(info.terms["gradient"]) == pytest.approx(matching.item(), rel=1e-6)
    assert float(info.loss) == pytest.approx(loss.item(), rel=1e-6)
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def nchw(images: np.ndarray) -> Any:
    import torch

    return torch.tensor(images.transpose(0, 3, 1, 2).copy())


def torch_weights_of_the_package(network: Any) -> dict[str, Any]:
    """Real weights but for the head, whose classes are fewer here."""
    import torch

    import weights_convert

    try:
        path = models.packaged_weights("mobilenet_v2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    real = {key: torch.tensor(value) for key, value in weights_convert.read(path).items()}
    return network.state_dict() | {k: v for k, v in real.items() if not k.startswith("classifier")}


# --- what the settings do ------------------------------------------------------------------------


def small(**settings: Any) -> tuple[Any, Any, Any]:
    """A tiny network, evidence of two images, and the secret."""
    net = tiny.network(classes=7)
    images = 0.5 * tiny.noise((2, 16, 16, 3), seed=4)
    held, secret = evidence.simulate(net, images, [2, 5], **settings)
    return net, held, secret


def run(attack: Attack) -> tuple[optimise.State, dict[str, np.ndarray]]:
    return tiny.run(attack, noise=2)


def test_the_secret_itself_has_distance_zero() -> None:
    for settings in ({}, {"training": True}, {"local": Local(0.1, ((0, 1), (1, 0)))}):
        net, held, secret = small(**settings)
        config = Config(**PLAIN | {"tv_l2": 0.0, "l2": 0.0})
        attack = gradient_inversion.build(config, net, held, [2, 5])
        _, info = first_step(attack, secret.images[None])
        other = first_step(attack, tiny.noise((1, 2, 16, 16, 3)))[1]
        assert float(info.loss) < 1e-4 * float(other.loss)


@pytest.mark.parametrize(
    "settings",
    [{}, {"training": True}, {"local": Local(0.05, ((0,), (1,), (0, 1), (1,)))}],
    ids=["gradient", "training", "local steps"],
)
def test_matching_brings_the_distance_down(settings: dict[str, Any]) -> None:
    net, held, _ = small(**settings)
    config = Config(**PLAIN | {"steps": 150, "tv_l2": 0.0, "l2": 0.0, "lr": 0.05})
    _, metrics = run(gradient_inversion.build(config, net, held, [2, 5]))
    assert metrics["gradient"][-1] < 0.5 * metrics["gradient"][0]


def test_candidates_are_independent_without_a_group() -> None:
    """Three seeds at once are three runs, each with its own best images."""
    net, held, _ = small()
    config = Config(**PLAIN | {"steps": 12, "seeds": 3, "group": 0.0, "lr": 0.05})
    attack = gradient_inversion.build(config, net, held, [2, 5])
    together, _ = run(attack)
    assert together.best_loss.shape == (3,)
    initial = np.asarray(attack.initial(jax.random.key(2)))
    for i in range(3):
        alone = gradient_inversion.build(dataclasses.replace(config, seeds=1), net, held, [2, 5])
        state = optimise.run(
            alone.phases, jax.random.key(1), jnp.asarray(initial[i : i + 1]), alone.data
        )
        np.testing.assert_allclose(together.images[i], state.images[0], atol=1e-4)
        np.testing.assert_allclose(together.best_loss[i], state.best_loss[0], rtol=1e-4)


def test_every_seed_may_have_its_own_labels() -> None:
    """Which image of a local step has which class: the right order has distance 0."""
    net, held, secret = small(local=Local(0.5, ((0,), (1,))))
    config = Config(**PLAIN | {"seeds": 2, "group": 0.0})
    attack = gradient_inversion.build(config, net, held, [[2, 5], [5, 2]])
    right, wrong = attack.distances(jnp.stack([secret.images] * 2), attack.data)
    assert right < 1e-4 * wrong


def test_a_group_draws_together_once_it_has_a_consensus() -> None:
    net, held, _ = small()
    base = PLAIN | {"steps": 60, "seeds": 4, "lr": 0.05, "gradient": 0.01}
    pulled = {"group": 1.0, "group_from": 20, "group_every": 10}
    spread = {}
    for weight, group in ((0.0, {"group": 0.0}), (1.0, pulled)):
        config = Config(**base | group)
        state, metrics = run(gradient_inversion.build(config, net, held, [2, 5], register=None))
        spread[weight] = float(np.std(np.asarray(state.images), axis=0).mean())
        if weight:
            assert metrics["group"][25] < metrics["group"][20]
    assert spread[1.0] < 0.5 * spread[0.0]


def test_a_users_own_registration_is_called() -> None:
    net, held, _ = small()
    config = Config(
        **PLAIN | {"steps": 3, "seeds": 2, "group_from": 1, "group_every": 1, "group": 1.0}
    )

    def nowhere(images: jax.Array, reference: jax.Array) -> jax.Array:
        return jnp.full_like(images, 7.0)

    state, _ = run(gradient_inversion.build(config, net, held, [2, 5], register=nowhere))
    np.testing.assert_allclose(state.memory, 7.0)


def test_noise_kicks_as_much_as_the_schedule_says() -> None:
    net, held, _ = small()
    quiet = Config(**PLAIN | {"lr": 0.1, "steps": 2, "warmup": 1})
    attacks = [
        gradient_inversion.build(dataclasses.replace(quiet, noise=a), net, held, [2, 5])
        for a in (0.0, 0.3)
    ]
    images = attacks[0].initial(KEY)
    still, moved = (np.asarray(first_step(attack, images)[0].images) for attack in attacks)
    assert np.std(moved - still) == pytest.approx(0.3 * 0.1, rel=0.05)


def test_bn_alone_needs_no_gradient() -> None:
    """The ablation: with exact statistics, and the gradient's weight 0."""
    net, held, _ = small(statistics="exact")
    config = Config(**PLAIN | {"gradient": 0.0, "steps": 100, "lr": 0.05, "batch_norm": 1.0})
    _, metrics = run(gradient_inversion.build(config, net, held, [2, 5]))
    assert "gradient" not in metrics
    assert metrics["batch_norm"][-1] < 0.2 * metrics["batch_norm"][0]


def test_layer_weighting_is_that_of_the_prior() -> None:
    net, held, _ = small(statistics="exact")
    config = Config(**PLAIN | {"gradient": 0.0, "bn_weighting": "standardised"})
    images = tiny.noise((1, 2, 16, 16, 3))
    _, info = first_step(gradient_inversion.build(config, net, held, [2, 5]), images)
    expected = priors.batch_norm(net(images[0]).moments, held.moments, weighting="standardised")
    assert float(info.terms["batch_norm"]) == pytest.approx(float(expected), rel=1e-5)


def test_an_extra_term_is_of_each_candidates_images() -> None:
    """Its value is the mean over candidates, its gradient each candidate's own."""
    net, held, _ = small()
    config = Config(**PLAIN | {"seeds": 2, "group": 0.0, "lr": 1.0, "optimizer": "sgd"})
    images = jnp.stack([jnp.full((2, 16, 16, 3), level) for level in (0.5, -2.0)])
    extra = {"bright": (10.0, lambda x: jnp.square(x.mean()))}
    plain, more = (
        gradient_inversion.build(config, net, held, [2, 5], extra_terms=terms)
        for terms in ({}, extra)
    )
    (before, without), (after, info) = first_step(plain, images), first_step(more, images)
    assert float(info.terms["bright"]) == pytest.approx((0.25 + 4) / 2, rel=1e-5)
    assert float(info.loss - without.loss) == pytest.approx(10 * (0.25 + 4) / 2, rel=1e-3)
    pushed = np.asarray(after.images - before.images)
    for found, level in zip(pushed, (0.5, -2.0), strict=True):
        np.testing.assert_allclose(found, -10 * 2 * level / found.size, atol=1e-4)
    with pytest.raises(ValueError, match="cannot be called 'group': the name is taken"):
        gradient_inversion.build(config, net, held, [2, 5], extra_terms={"group": (1.0, jnp.mean)})


def test_a_schedule_and_an_optimizer_by_name() -> None:
    """Plain gradient descent of a constant rate, against the gradient that Adam's state holds."""
    net, held, _ = small()
    images = tiny.noise((1, 2, 16, 16, 3))
    settings = PLAIN | {"tv_l2": 0.0, "l2": 0.0}
    adam, _ = first_step(gradient_inversion.build(Config(**settings), net, held, [2, 5]), images)
    gradient = np.asarray(optax.tree.get(adam, "mu")) / 0.1
    config = Config(**settings, optimizer="sgd", schedule="constant", lr=0.5)
    state, _ = first_step(gradient_inversion.build(config, net, held, [2, 5]), images)
    np.testing.assert_allclose(state.images, images - 0.5 * gradient, atol=1e-5)


# --- the same program on other evidence ----------------------------------------------------------


def test_other_evidence_runs_the_same_program() -> None:
    """As an attack built for it finds, and nothing is traced again."""
    net, held, _ = small(statistics="exact")
    other, _ = evidence.simulate(
        net, tiny.noise((2, 16, 16, 3), seed=9), [6, 0], statistics="exact"
    )
    config = Config(**PLAIN | {"steps": 3, "seeds": 2, "group_from": 1, "group_every": 1})
    attack = gradient_inversion.build(config, net, held, [2, 5])
    again = attack.with_evidence(other, [6, 0])
    assert again.phases is attack.phases
    found, metrics = run(again)
    built, expected = run(gradient_inversion.build(config, net, other, [6, 0]))
    np.testing.assert_array_equal(found.images, built.images)
    np.testing.assert_array_equal(metrics["gradient"], expected["gradient"])
    step = jax.jit(attack.phases[0].step)
    for one in (attack, again):
        step(KEY, optimise.enter(one.phases[0], one.initial(KEY), 0), one.data)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "settings",
    [{"training": True}, {"statistics": "running"}, {"local": Local(0.1, ((0, 1),))}],
    ids=lambda settings: next(iter(settings)),
)
def test_evidence_of_other_circumstances_is_refused(settings: dict[str, Any]) -> None:
    net, held, _ = small()
    attack = gradient_inversion.build(Config(**PLAIN), net, held, [2, 5])
    _, other, _ = small(**settings)
    with pytest.raises(ValueError, match="the attack fits Circumstances"):
        attack.with_evidence(other, [2, 5])


def test_other_labels_must_fit_too() -> None:
    net, held, _ = small()
    attack = gradient_inversion.build(Config(**PLAIN), net, held, [2, 5])
    with pytest.raises(ValueError, match="labels are known in this attack"):
        attack.with_evidence(held, None)
    with pytest.raises(ValueError, match="2 labels from 0 to 6 are needed"):
        attack.with_evidence(held, [2, 7])
    joint = gradient_inversion.build(Config(**PLAIN), net, held, None)
    with pytest.raises(ValueError, match="labels are optimised in this attack"):
        joint.with_evidence(held, [2, 5])


def test_execution_of_one_seed_keeps_the_devices_it_can_use() -> None:
    many = Execution(devices=8, seeds_at_once=2, images_at_once=1, gradients="formed")
    assert many.for_one_seed(6) == Execution(devices=6, gradients="formed")
    assert many.for_one_seed(8).devices == 8
    assert Execution().for_one_seed(3) == Execution()


def test_layers_count_by_the_beginning_of_their_names() -> None:
    wanted = {"a": {"w": jnp.ones(4), "b": jnp.ones(1)}, "c": jnp.ones(9)}
    found = jax.tree.map(jnp.zeros_like, wanted)

    def distance(**layers: float) -> float:
        return float(gradient_inversion.gradient_distance(found, wanted, "l2", layers))

    assert distance() == pytest.approx(2 + 1 + 3)
    assert distance(a=0) == pytest.approx(3)
    assert distance(**{"a": 0, "a.b": 5}) == pytest.approx(5 + 3)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"haed": 0.0}, "no layer's name begins with 'haed'; near it: head"),
        ({"head": 1.0, "norms.2": 0.0}, "begins with 'norms.2'; near it: norms"),
        ({"hea": 0.0}, "begins with 'hea'; near it: head"),
        ({"head.": 0.0}, "begins with 'head.'; near it: head"),
        ({"module.head": 0.0}, "begins with 'module.head'"),
    ],
    ids=str,
)
def test_factors_of_no_layer_are_refused(layers: Any, message: str) -> None:
    net, held, _ = small()
    with pytest.raises(ValueError, match=message):
        gradient_inversion.build(Config(layers=layers), net, held, [2, 5])


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf"), "0", None, True])
def test_factors_that_are_no_weights_are_refused(factor: Any) -> None:
    with pytest.raises(
        ValueError, match="layers must be a mapping of names to numbers of at least 0"
    ):
        Config(layers={"fc": factor})


def test_factors_go_by_torchs_names_in_the_zoo() -> None:
    tree = models.template("resnet18")
    names = {"fc": 3.0, "layer4": 2.0, "layer4.0.conv1": 0.0, "layer1.1.bn2.bias": 5.0}
    found = dict(
        zip(
            (
                jax.tree_util.keystr(p, simple=True, separator=".")
                for p, _ in jax.tree_util.tree_leaves_with_path(tree)
            ),
            gradient_inversion._factors(tree, names),
            strict=True,
        )
    )
    assert found["fc.weight"] == found["fc.bias"] == 3
    assert found["layer4.0.conv2.weight"] == found["layer4.1.bn1.bias"] == 2
    assert found["layer4.0.conv1.weight"] == 0
    assert found["layer1.1.bn2.bias"] == 5
    assert found["layer1.1.bn2.weight"] == found["conv1.weight"] == 1


def part_of(held: Evidence, *layers: str) -> Evidence:
    return dataclasses.replace(held, values={name: held.values[name] for name in layers})


@pytest.mark.parametrize("local", [None, Local(0.3, ((0, 1), (1,)))], ids=["gradient", "update"])
def test_the_attack_compares_the_layers_that_were_sent_alone(local: Local | None) -> None:
    """By hand; local steps leave the others as they are."""
    net, held, secret = small()
    held = part_of(dataclasses.replace(held, local=local), "head")
    sent = evidence.observed(
        net,
        net.variables,
        jnp.asarray(secret.images),
        jax.nn.one_hot(jnp.asarray([2, 5]), 7),
        local=local,
        trained=held.values,
    )
    held = dataclasses.replace(held, values=jax.device_get(sent))
    attack = gradient_inversion.build(Config(**PLAIN), net, held, [2, 5])
    assert float(attack.distances(secret.images[None], attack.data)[0]) < 1e-4
    images = np.asarray(tiny.noise((2, 16, 16, 3), seed=9))

    def logits(head: Any, images: Any) -> Any:
        return net.apply(net.variables, images).features @ head["kernel"] + head["bias"]

    def gradient(head: Any, chosen: Any) -> Any:
        def loss(head: Any) -> Any:
            log_p = jax.nn.log_softmax(logits(head, images[jnp.asarray(chosen)]))
            return -log_p[jnp.arange(len(chosen)), jnp.asarray([2, 5])[jnp.asarray(chosen)]].mean()

        return jax.grad(loss)(head)

    head = {key: jnp.asarray(value) for key, value in net.variables["head"].items()}
    if local is None:
        mine = gradient(head, [0, 1])
    else:
        after = head
        for batch in local.batches:
            after = jax.tree.map(lambda p, g: p - local.lr * g, after, gradient(after, list(batch)))
        mine = jax.tree.map(jnp.subtract, after, head)
    wanted = held.values["head"]
    expected = sum(np.linalg.norm(mine[key] - wanted[key]) for key in ("kernel", "bias"))
    found = attack.distances(images[None], attack.data)[0]
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    _, metrics = run(attack)
    assert np.isfinite(metrics["gradient"]).all()


def test_evidence_of_other_layers_or_of_nothing_is_refused() -> None:
    net, held, _ = small()
    attack = gradient_inversion.build(Config(**PLAIN), net, held, [2, 5])
    with pytest.raises(ValueError, match="compares other layers"):
        attack.with_evidence(part_of(held, "head"), [2, 5])
    with pytest.raises(ValueError, match="begins with 'convs'; near it"):
        gradient_inversion.build(Config(layers={"convs": 0.0}), net, part_of(held, "head"), [2, 5])
    nothing = dataclasses.replace(held, values=jax.tree.map(np.zeros_like, held.values))
    with pytest.raises(ValueError, match="nothing to invert"):
        gradient_inversion.build(Config(**PLAIN), net, nothing, [2, 5])
    with pytest.raises(ValueError, match="evidence has no values"):
        gradient_inversion.build(Config(**PLAIN), net, part_of(held), [2, 5])


@pytest.mark.parametrize("kind", ["l2", "squared_l2", "cosine"])
def test_the_program_grows_with_the_layers_not_with_their_square(kind: Any) -> None:
    """Sums over layers are computed once, not in every layer's gradient again."""

    def additions(layers: int) -> int:
        wanted = [jnp.full((8, 8), i + 1.0) for i in range(layers)]

        def distance(x: jax.Array) -> jax.Array:
            found = []
            for target in wanted:
                x = jnp.tanh(x @ target)
                found.append(x * x.mean())
            return gradient_inversion.gradient_distance(found, wanted, kind)

        program = jax.jit(jax.grad(distance)).lower(jnp.ones((8, 8))).compile()
        return program.as_text().count(" add(")

    assert additions(40) < 3 * additions(20)


@pytest.mark.parametrize(
    ("chosen", "settings", "message"),
    [
        ([2], {}, "2 labels from 0 to 6 are needed"),
        ([2, 7], {}, "2 labels from 0 to 6 are needed"),
        ([2, 7], {}, "label 1 is 7; tiny has classes 0 to 6"),
        ([[2, 5], [5, 2]], {}, "2 labels from 0 to 6 are needed"),
        ([[2, 5], [5, 2]], {}, r"each of the 8 seeds, not labels of shape \(2, 2\)"),
        ([2.5, 5.0], {}, r"whole numbers, not \[2.5, 5.0\]"),
        (["2", "5"], {}, "whole numbers"),
        ([], {}, r"not labels of shape \(0,\)"),
        (
            [2, 5],
            {"execution": Execution(images_at_once=3)},
            "images_at_once: 2 images cannot be taken 3 at a time evenly: possible are 1, 2",
        ),
        ([2, 5], {"execution": Execution(devices=99)}, "99 devices asked for"),
        ([2, 5], {"execution": Execution(seeds_at_once=3)}, "8 seeds cannot be taken 3 at once"),
    ],
)
def test_what_does_not_fit_is_refused(chosen: Any, settings: Any, message: str) -> None:
    net, held, _ = small()
    with pytest.raises(ValueError, match=message):
        gradient_inversion.build(Config(), net, held, chosen, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"evidence": {"params": {}}},
            r"evidence must be of .*Evidence, not .*Evidence\(val",
        ),
        ({"evidence": small()[1:]}, "evidence is a tuple: .* give the first"),
        (
            {"defence": {"clip": 1}},
            r"must be of .*Defence, not {'clip': 1}: make one with",
        ),
        ({"defence": "sign"}, "must be of .*Defence, not 'sign'"),
        ({"register": "shift"}, r"function .*, not 'shift': give .*REGISTRATIONS\['shift'\]"),
        ({"register": "rigid"}, r"REGISTRATIONS\[...\], there are none, shift, flow"),
        ({"net": Member(tiny.network())}, "net must be a jinv.Net, .*give its `net`"),
        ({"net": "lenet"}, "net must be a jinv.Net, not a str"),
        (
            {"config": {"steps": 3}},
            r"config must be of .*gradient_inversion.Config, not {'steps",
        ),
        ({"execution": ensemble.Execution()}, "must be of jinv.attacks.gradient_inversion.Exec"),
        ({"space": "gray"}, "space must be a jinv.Preprocessing, .* not 'gray'"),
        ({"extra_terms": [1.0, jnp.mean]}, r"name -> \(weight, function of images\), not \[1.0"),
        (
            {"extra_terms": {"mine": jnp.mean}},
            r"name -> \(weight, function of images\), not {",
        ),
        ({"extra_terms": {"mine": (jnp.mean, 1.0)}}, r"name -> \(weight, function of images\)"),
        ({"extra_terms": {"mine": ("1", jnp.mean)}}, r"name -> \(weight, function of images\)"),
        ({"extra_terms": {"mine": (1.0, 2.0)}}, r"name -> \(weight, function of images\)"),
        ({"extra_terms": {3: (1.0, jnp.mean)}}, r"name -> \(weight, function of images\)"),
    ],
)
def test_arguments_of_another_kind_are_refused(settings: dict[str, Any], message: str) -> None:
    net, held, _ = small()
    given: dict[str, Any] = {"config": Config(), "net": net, "evidence": held, "labels": [2, 5]}
    with pytest.raises(ValueError, match=message):
        gradient_inversion.build(**given | settings)


def test_sizes_of_height_and_width() -> None:
    space = dataclasses.replace(tiny.SPACE, size=(16, 24))
    net = tiny.network(space=space)
    held, _ = evidence.simulate(net, tiny.noise((1, 16, 24, 3)), [2])
    attack = gradient_inversion.build(Config(seeds=2), net, held, [2])
    assert attack.initial(KEY).shape == (2, 1, 16, 24, 3)
    for bad in ("16", 0, (16, 24, 3), 16.0):
        with pytest.raises(ValueError, match="size must be positive whole numbers"):
            gradient_inversion.build(Config(), net, held, [2], size=bad)
    lenet = models.load("lenet", None)
    sent, _ = evidence.simulate(lenet, np.zeros((1, 28, 28, 1), np.float32), [2])
    with pytest.raises(ValueError, match=r"lenet cannot take images of 28 x 32 px"):
        gradient_inversion.build(Config(batch_norm=0), lenet, sent, [2], size=(28, 32))


def test_what_ties_nothing_to_the_evidence_is_refused() -> None:
    net, held, _ = small()
    with pytest.raises(ValueError, match="nothing ties the images to the evidence"):
        gradient_inversion.build(Config(gradient=0.0), net, held, [2, 5])
    nothing = dict.fromkeys(held.values, 0.0)
    with pytest.raises(ValueError, match="every layer's factor is 0"):
        gradient_inversion.build(Config(layers=nothing), net, held, [2, 5])
    trained, _ = evidence.simulate(net, tiny.noise((2, 16, 16, 3)), [2, 5], training=True)
    with pytest.raises(ValueError, match="images do not act on each other"):
        gradient_inversion.build(
            Config(), net, trained, [2, 5], execution=Execution(images_at_once=1)
        )


@pytest.mark.parametrize(
    "execution",
    [
        Execution(seeds_at_once=1),
        Execution(images_at_once=1),
        Execution(seeds_at_once=2, images_at_once=1),
        Execution(gradients="formed"),
    ],
    ids=lambda e: str({k: v for k, v in dataclasses.asdict(e).items() if v not in (None, "auto")}),
)
def test_execution_changes_nothing(execution: Execution) -> None:
    net, held, _ = small(statistics="exact")
    config = Config(**PLAIN | {"seeds": 2, "group": 0.0})
    first = first_step(plain := gradient_inversion.build(config, net, held, [2, 5]), start(plain))
    attack = gradient_inversion.build(config, net, held, [2, 5], execution=execution)
    state, info = first_step(attack, start(plain))
    assert float(info.loss) == pytest.approx(float(first[1].loss), rel=1e-5)
    np.testing.assert_allclose(state.images, first[0].images, atol=2e-3)


def start(attack: Attack) -> jax.Array:
    return attack.initial(KEY)


def test_candidates_whose_objective_changes_forget_their_best_images() -> None:
    """A consensus adds a term: losses from before it must not win for ever."""
    net, held, _ = small()
    config = Config(
        **PLAIN | {"steps": 12, "seeds": 2, "group": 5.0, "group_from": 6, "group_every": 100}
    )
    state, metrics = run(gradient_inversion.build(config, net, held, [2, 5], register=None))
    assert metrics["loss"][6] > metrics["loss"][5]
    assert float(state.best_loss.mean()) > metrics["loss"][5]


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"seeds": 0},
        {"distance": "taxi"},
        {"optimizer": "newton"},
        {"schedule": "plateau"},
    ],
)
def test_config_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lr": 1.0, "optimizer": "lbfgs", "noise": 0.0}, "L-BFGS searches"),
        ({"warmup": 0, "optimizer": "lbfgs", "noise": 0.0}, "L-BFGS searches"),
        ({"distance": "cosine", "gradient": 0.0}, "the gradient weighs 0"),
        ({"layers": {"fc": 0.0}, "gradient": 0.0}, "the gradient weighs 0"),
        ({"bn_weighting": "relative", "batch_norm": 0.0}, "batch_norm is 0"),
        ({"lr_floor": 0.5, "schedule": "constant"}, "schedule is 'constant'"),
        ({"first_bn_multiplier": 2.0, "batch_norm": 0.0}, "batch_norm is 0"),
        ({"group": 0.5, "seeds": 1}, "one seed has no consensus"),
        ({"group_from": 10, "seeds": 1}, "there is no consensus"),
        ({"group_every": 10, "group": 0.0}, "there is no consensus"),
    ],
)
def test_options_that_play_no_part_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}: .* plays no part: {reason}"):
        Config(**settings)


def test_execution_takes_only_its_words() -> None:
    with pytest.raises(ValueError, match="gradients must be one of auto, formed, not 'never'"):
        Execution(gradients="never")  # type: ignore[arg-type]


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_every_config_has_its_ablation(config: Config) -> None:
    alone = config.without_gradient()
    assert (alone.gradient, alone.seeds, alone.group, alone.optimizer) == (0, 1, 0, "adam")
    assert (alone.steps, alone.tv_l2, alone.batch_norm) == (
        config.steps,
        config.tv_l2,
        config.batch_norm,
    )


# --- what comes back -----------------------------------------------------------------------------


def drawing() -> tuple[Net, jax.Array, np.ndarray]:
    """An untrained LeNet, a drawing of 28 px normalised for it, and its pixels."""
    net = models.load("lenet", None)
    y, x = np.mgrid[:28, :28]
    pixels = np.where((abs(x - 14) < 6) & (abs(y - 12) < 9), 0.8, 0.0)
    pixels = (pixels + 0.2 * (np.hypot(x - 14, y - 20) < 5))[None, :, :, None]
    return net, normalise(jnp.asarray(pixels, jnp.float32), net.preprocessing), pixels


def test_an_image_comes_back_from_its_gradient() -> None:
    """With its label, to 30 dB: a drawing of 28 px."""
    net, secret, pixels = drawing()
    held, _ = evidence.simulate(net, secret, [4])
    found = labels.as_list(labels.restore(labels.head_of(net, held)))
    assert found == [4]
    config = Config(**PLAIN | {"steps": 1200, "warmup": 20, "tv_l2": 0.0, "l2": 0.0, "clip": True})
    state, _ = run(gradient_inversion.build(config, net, held, found))
    error = np.asarray(denormalise(state.best_images[0], net.preprocessing)) - pixels
    assert -10 * np.log10(np.mean(error**2)) > 30


def test_labels_come_back_with_the_image() -> None:
    """DLG: L-BFGS over images and labels, every restart for itself; the nearest one is right."""
    net, secret, pixels = drawing()
    held, _ = evidence.simulate(net, secret, [4])
    config = dataclasses.replace(PRESETS["dlg"], steps=100, seeds=2)
    attack = gradient_inversion.build(config, net, held, None)
    state, _ = run(attack)
    found = state.best_images
    nearest = int(np.argmin(attack.distances(found, attack.data)))
    assert int(found.labels[nearest, 0].argmax()) == 4
    error = np.asarray(denormalise(found.images[nearest], net.preprocessing)) - pixels
    assert -10 * np.log10(np.mean(error**2)) > 10


def test_a_known_defence_is_taken_into_account() -> None:
    """Clipped and pruned: the secret itself has distance 0 for who knows."""
    net, secret, _ = drawing()
    held, _ = evidence.simulate(net, secret, [4])
    defence = Defence(clip=0.5, keep=0.3)
    sent = defences.apply(defence, KEY, held)
    losses = []
    for known in (None, defence):
        config = Config(**PLAIN | {"tv_l2": 0.0, "l2": 0.0})
        attack = gradient_inversion.build(config, net, sent, [4], defence=known)
        losses.append(float(attack.distances(secret[None], attack.data)[0]))
    assert losses[1] < 1e-3 * losses[0]


SHARDED = """
import json, sys
sys.path.insert(0, "tests")
import jax, numpy as np, tiny
from jinv import optimise
from jinv.federated import evidence
from jinv.attacks import gradient_inversion as gi
net = tiny.network()
held, _ = evidence.simulate(net, 0.5 * tiny.noise((2, 16, 16, 3), seed=4), [2, 5])
config = gi.Config(steps=4, warmup=1, seeds=2, group_from=1, group_every=2, noise=0.1)
found = {}
for devices in (1, 2, 4):
    attack = gi.build(config, net, held, [2, 5], execution=gi.Execution(devices=devices))
    state = optimise.run(
        attack.phases, jax.random.key(0), attack.initial(jax.random.key(1)), attack.data
    )
    assert len(state.images.sharding.device_set) == devices
    found[devices] = np.asarray(state.images)
print(json.dumps([float(abs(found[1] - found[n]).max()) for n in (2, 4)]))
"""


def test_seeds_and_images_over_devices_change_nothing(run_python: Any) -> None:
    """2 seeds on 2 devices; 2 seeds of 2 images on 4."""
    assert max(run_python(SHARDED)) < 1e-3
