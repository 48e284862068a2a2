"""DeepInversion against an independent one in torch; what its options do; what it refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

import tiny
from jinv import image, models, optimise
from jinv.attacks import begin, deepinversion, gradient_inversion
from jinv.attacks.deepinversion import Attack, Config, Crop, Phase
from jinv.image import Preprocessing
from jinv.net import Moments, Net
from jinv.objective import priors
from jinv.objective.ensemble import Execution
from jinv.objective.terms import Member, Weights

KEY = jax.random.key(11)
TARGETS = (0, 3, 6)
# Leaves the gradient itself in the optimizer's state, see `loss_and_gradient`.
READABLE: dict[str, Any] = {
    "optimizer": "sgd",
    "optimizer_args": {"momentum": 0.9},
    "schedule": "constant",
    "warmup": 0,
    "clip": False,
}


# --- helpers -------------------------------------------------------------------------------------


def attack_of(config: Config, *members: Member | Net, **settings: Any) -> Attack:
    """Built for `TARGETS`; a bare network counts with the default weights."""
    settings.setdefault("targets", TARGETS)
    chosen = [m if isinstance(m, Member) else Member(m) for m in members or (tiny.network(),)]
    return deepinversion.build(config, chosen, **settings)


def loss_and_gradient(
    attack: Attack, images: Array, *, key: Array = KEY, phase: int = 0
) -> tuple[float, dict[str, float], np.ndarray]:
    """Of a phase's first step, for a `READABLE` config."""
    part = attack.phases[phase]
    state, info = jax.jit(part.step)(key, part.enter(images, 0), attack.data)
    gradient = np.asarray(optax.tree.get(state.optimizer, "trace"))
    terms = {name: float(value) for name, value in info.terms.items()}
    return float(info.loss), terms, gradient


augment = jax.jit(deepinversion.augment, static_argnums=(2, 3, 4))


def shift_and_flip(
    key: Array, step: int, size: tuple[int, int], jitter: int, flip: float
) -> tuple[tuple[int, int], bool]:
    """What a step draws, read off an image whose pixels say where they came from."""
    height, width = size
    numbers = np.arange(height * width).reshape(height, width)
    numbered = jnp.asarray(numbers[None, :, :, None], jnp.float32)
    key = jax.random.fold_in(key, step)
    seen = np.asarray(augment(key, numbered, 1, jitter, flip))[0, :, :, 0]
    for mirrored in (False, True):
        rolled = seen[:, ::-1] if mirrored else seen
        start = np.argwhere(rolled == 0)[0]
        if np.array_equal(rolled, np.roll(numbers, tuple(start), (0, 1))):
            centred = [(int(s) + n // 2) % n - n // 2 for s, n in zip(start, size, strict=True)]
            return (centred[0], centred[1]), mirrored
    raise AssertionError("neither a roll nor a roll and a flip")


def relative(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


# --- the same in torch ---------------------------------------------------------------------------


@dataclasses.dataclass
class Peer:
    """A torch network in double precision, its space, and how much it counts."""

    network: Any
    space: Preprocessing
    weights: Weights = dataclasses.field(default_factory=Weights)
    name: str = ""


def to_torch(x: Any, dtype: Any = None) -> Any:
    """(B, H, W, C) -> torch (B, C, H, W)."""
    import torch

    array = np.ascontiguousarray(np.asarray(x, np.float64).transpose(0, 3, 1, 2))
    return torch.tensor(array, dtype=dtype or torch.float64)


def torch_tiny(net: Net) -> Any:
    """A `Tiny` network's twin."""
    import torch
    from torch import nn

    v: Any = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf, np.float64)), net.variables)
    parts: list[nn.Module] = []
    for i, (conv, norm) in enumerate(
        (v["convs"][i], v["norms"][i]) for i in range(len(v["convs"]))
    ):
        outputs, inputs = conv["kernel"].shape[3], conv["kernel"].shape[2]
        convolution = nn.Conv2d(inputs, outputs, 3, stride=1 if i == 0 else 2, padding=1)
        convolution.weight.data = conv["kernel"].permute(3, 2, 0, 1).contiguous()
        convolution.bias.data = conv["bias"]
        batch_norm = nn.BatchNorm2d(outputs, eps=1e-5)
        batch_norm.weight.data, batch_norm.bias.data = norm["scale"], norm["bias"]
        batch_norm.running_mean, batch_norm.running_var = norm["mean"], norm["var"]
        parts += [convolution, batch_norm, nn.ReLU()]
    linear = nn.Linear(*v["head"]["kernel"].shape)
    linear.weight.data, linear.bias.data = v["head"]["kernel"].T.contiguous(), v["head"]["bias"]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear).double().eval()


def torch_convert(x: Any, source: Preprocessing, target: Preprocessing) -> Any:
    """Through pixels."""
    import torch

    def column(values: Sequence[float]) -> Any:
        return torch.tensor(values, dtype=x.dtype).view(1, -1, 1, 1)

    lo, hi = source.pixel_range
    pixels = (x * column(source.std) + column(source.mean) - lo) / (hi - lo)
    lo, hi = target.pixel_range
    return (lo + pixels * (hi - lo) - column(target.mean)) / column(target.std)


def torch_see(x: Any, space: Preprocessing, peer: Peer, first: Preprocessing) -> Any:
    """Images of `space` as a network sees that was trained on another size than the first."""
    from torch.nn import functional

    size = [round(n * peer.space.size / first.size) for n in x.shape[2:]]
    if size != list(x.shape[2:]):
        x = functional.interpolate(x, size, mode="bilinear", antialias=True)
    return torch_convert(x, space, peer.space)


def torch_batch_norm_term(network: Any, x: Any, weights: Weights) -> tuple[Any, Any]:
    """Logits and sum_l w_l (|mean - running mean| + |var - running var|), by hooks."""
    from torch import nn

    norms, found = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)], []

    def look(module: Any, inputs: Any) -> None:
        rows = inputs[0].permute(1, 0, 2, 3).flatten(1)
        mean, var = rows.mean(1), rows.var(1, correction=0)
        found.append((mean - module.running_mean).norm() + (var - module.running_var).norm())

    handles = [module.register_forward_pre_hook(look) for module in norms]
    logits = network(x)
    for handle in handles:
        handle.remove()
    assert len(found) == len(norms) > 0
    return logits, found[0] * weights.first_bn_multiplier + sum(found[1:])


def torch_loss(
    peers: Sequence[Peer],
    images: Any,
    config: Config,
    *,
    space: Preprocessing,
    downscale: int = 1,
    shift: tuple[int, int] = (0, 0),
    flip: bool = False,
    tv_l2: float | None = None,
    competitor: Peer | None = None,
    targets: Sequence[int] = TARGETS,
) -> tuple[Any, dict[str, Any]]:
    """The published objective of images (B, C, H, W)."""
    import torch
    from torch.nn import functional

    x = functional.avg_pool2d(images, downscale) if downscale > 1 else images
    x = torch.roll(x, shifts=shift, dims=(2, 3))
    x = torch.flip(x, dims=(3,)) if flip else x
    total, terms, first_logits = 0, {}, None
    for peer in peers:
        seen = torch_see(x, space, peer, peers[0].space)
        logits, bn = torch_batch_norm_term(peer.network, seen, peer.weights)
        first_logits = logits if first_logits is None else first_logits
        if config.label_loss == "cross_entropy":
            label = functional.cross_entropy(logits / config.temperature, torch.tensor(targets))
        else:
            label = -logits[torch.arange(len(targets)), torch.tensor(targets)].mean()
        suffix = f"[{peer.name}]" if len(peers) > 1 else ""
        terms[f"label{suffix}"], terms[f"batch_norm{suffix}"] = label, bn
        total = total + peer.weights.label * label + peer.weights.batch_norm * bn
    differences = (
        x[:, :, :, 1:] - x[:, :, :, :-1],
        x[:, :, 1:, :] - x[:, :, :-1, :],
        x[:, :, 1:, 1:] - x[:, :, :-1, :-1],
        x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
    )
    terms["tv_l2"] = sum(d.norm() for d in differences)
    if config.tv_per_image:
        terms["tv_l2"] = terms["tv_l2"] / len(x)
    terms["tv_l1"] = sum(d.abs().mean() for d in differences)
    terms["l2"] = x.flatten(1).norm(dim=1).mean()
    total = total + (config.tv_l2 if tv_l2 is None else tv_l2) * terms["tv_l2"]
    total = total + config.tv_l1 * terms["tv_l1"] + config.l2 * terms["l2"]
    if competitor is not None:
        other = competitor.network(torch_see(x, space, competitor, peers[0].space))
        t = config.adaptive_temperature
        p, q = torch.softmax(other / t, 1), torch.softmax(first_logits / t, 1)
        middle = 0.5 * (p + q)
        p, q, middle = (y.clamp(0.01, 0.99) for y in (p, q, middle))
        kl = torch.nn.KLDivLoss(reduction="batchmean")
        js = 0.5 * kl(torch.log(p), middle) + 0.5 * kl(torch.log(q), middle)
        name = f"adaptive[{peers[0].name}]" if len(peers) > 1 else "adaptive"
        terms[name] = 1 - js.clamp(0, 1)
        total = total + config.adaptive * terms[name]
    return total, terms


def torch_gradient(
    peers: Sequence[Peer], images: Array, config: Config, **settings: Any
) -> tuple[float, dict[str, float], np.ndarray]:
    x = to_torch(images).requires_grad_()
    loss, terms = torch_loss(peers, x, config, **settings)
    loss.backward()
    assert x.grad is not None
    gradient = x.grad.numpy().transpose(0, 2, 3, 1)
    return loss.item(), {name: value.item() for name, value in terms.items()}, gradient


def agree(ours: tuple[Any, ...], theirs: tuple[Any, ...], tolerance: float = 1e-4) -> None:
    """Loss, every term, gradient; every term counts."""
    assert ours[1].keys() == theirs[1].keys()
    errors = {name: abs(ours[1][name] / theirs[1][name] - 1) for name in ours[1]}
    errors |= {"loss": abs(ours[0] / theirs[0] - 1), "gradient": relative(ours[2], theirs[2])}
    assert all(abs(value) > 1e-3 for value in theirs[1].values()), theirs[1]
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, wrong


# --- loss and gradient ---------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "tv_l2": 2e-3,
    "tv_l1": 0.05,
    "l2": 3e-3,
    "adaptive": 2.0,
    **READABLE,
}
WEIGHTS = Weights(label=0.8, batch_norm=0.05, first_bn_multiplier=10)


def torch_resnet18(path: Any, classes: int = 10) -> Any:
    """torchvision's, with random weights in a file; running statistics of noise, disturbed."""
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.resnet18(num_classes=classes)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0, 0.3, generator=generator)
            norm.momentum = 1.0
        network.train()(torch.randn((4, 3, 64, 64), generator=generator))
        for norm in norms:
            random = torch.randn(norm.running_mean.shape, generator=generator)
            norm.running_mean += 0.3 * norm.running_var.sqrt() * random
            norm.running_var *= random.uniform_(0.5, 1.5, generator=generator)
        network.fc.weight *= 3
    torch.save(network.state_dict(), path)
    return network.double().eval()


def test_resnet18_loss_and_gradient_equal_torch(tmp_path: Any) -> None:
    """All terms, at half of 32 x 48 px, with a small competitor of another normalisation."""
    network = torch_resnet18(tmp_path / "resnet18.pth")
    net = models.load("resnet18", tmp_path / "resnet18.pth", classes=10)
    other = tiny.network(seed=2, space=tiny.OTHER_SPACE, classes=10)
    config = Config(phases=(Phase(1, downscale=2, jitter=0),), flip=0.0, **EVERYTHING)
    attack = attack_of(config, Member(net, WEIGHTS), size=(32, 48), competitor=other)
    images = attack.initial(KEY)
    assert images.shape == (3, 32, 48, 3)
    theirs = torch_gradient(
        [Peer(network, net.preprocessing, WEIGHTS)],
        images,
        config,
        space=net.preprocessing,
        downscale=2,
        competitor=Peer(torch_tiny(other), tiny.OTHER_SPACE),
    )
    agree(loss_and_gradient(attack, images), theirs)


@pytest.mark.gpu
def test_loss_and_gradient_equal_torch_rolled_and_flipped() -> None:
    """With what each key draws; both flips occur. Temperature, TV per image, non-square."""
    pytest.importorskip("torch")
    net = tiny.network()
    other = tiny.network(seed=2, space=tiny.OTHER_SPACE)
    config = Config(
        phases=(Phase(1, downscale=2, jitter=3, tv_l2=0.07),),
        temperature=2.0,
        tv_per_image=True,
        adaptive_temperature=4.0,
        **EVERYTHING,
    )
    attack = attack_of(config, Member(net, WEIGHTS), size=(20, 28), competitor=other)
    images = attack.initial(KEY)
    step = jax.jit(attack.phases[0].step)
    drawn = []
    for seed in range(4):
        key = jax.random.key(seed)
        shift, flip = shift_and_flip(key, 0, (10, 14), 3, 0.5)
        drawn.append((shift, flip))
        state, info = step(key, attack.phases[0].enter(images, 0), attack.data)
        ours = (
            float(info.loss),
            {name: float(value) for name, value in info.terms.items()},
            np.asarray(optax.tree.get(state.optimizer, "trace")),
        )
        theirs = torch_gradient(
            [Peer(torch_tiny(net), tiny.SPACE, WEIGHTS)],
            images,
            config,
            space=tiny.SPACE,
            downscale=2,
            shift=shift,
            flip=flip,
            tv_l2=0.07,
            competitor=Peer(torch_tiny(other), tiny.OTHER_SPACE),
        )
        agree(ours, theirs)
    assert {flip for _, flip in drawn} == {False, True}
    assert any(shift != (0, 0) for shift, _ in drawn)


def test_two_networks_add_their_losses() -> None:
    """Terms carry names; each network sees the images in its own normalisation."""
    pytest.importorskip("torch")
    weights = (WEIGHTS, Weights(label=0.3, batch_norm=0.2, first_bn_multiplier=3))
    same_size = dataclasses.replace(tiny.OTHER_SPACE, size=tiny.SPACE.size)
    nets = (
        tiny.network(seed=0, name="left"),
        tiny.network(seed=1, space=same_size, name="right", widths=(5,), classes=9),
    )
    config = Config(phases=(Phase(1, jitter=0),), flip=0.0, tv_l2=0.0, l2=0.0, **READABLE)
    members = [Member(net, w) for net, w in zip(nets, weights, strict=True)]
    shared: dict[str, Any] = {"space": tiny.SPACE, "size": (16, 20)}
    both = attack_of(config, *members, **shared)
    images = both.initial(KEY)
    loss, terms, gradient = loss_and_gradient(both, images)
    assert list(terms) == ["label[left]", "batch_norm[left]", "label[right]", "batch_norm[right]"]

    singles = [loss_and_gradient(attack_of(config, m, **shared), images) for m in members]
    np.testing.assert_allclose(loss, singles[0][0] + singles[1][0], rtol=1e-5)
    assert relative(gradient, singles[0][2] + singles[1][2]) < 1e-5
    for name, (_, single, _) in zip(("left", "right"), singles, strict=True):
        assert list(single) == ["label", "batch_norm"]
        for term, value in single.items():
            np.testing.assert_allclose(terms[f"{term}[{name}]"], value, rtol=1e-5)


@pytest.mark.parametrize("execution", [Execution(), Execution(images_at_once=1)], ids=str)
def test_networks_of_several_sizes_equal_torch(execution: Execution) -> None:
    """Each sees the images resampled to its own size, as does the competitor."""
    pytest.importorskip("torch")
    weights = (WEIGHTS, Weights(label=0.3, batch_norm=0.2, first_bn_multiplier=3))
    larger = dataclasses.replace(tiny.OTHER_SPACE, size=22)
    nets = (
        tiny.network(seed=0, name="left"),
        tiny.network(seed=1, space=larger, name="right", widths=(5,), classes=9),
    )
    config = Config(phases=(Phase(1, jitter=0),), flip=0.0, **EVERYTHING)
    members = [Member(net, w) for net, w in zip(nets, weights, strict=True)]
    attack = attack_of(
        config,
        *members,
        size=(16, 20),
        competitor=tiny.network(seed=5, space=tiny.OTHER_SPACE),
        execution=execution,
    )
    images = attack.initial(KEY)
    other = tiny.network(seed=5, space=tiny.OTHER_SPACE)
    peers = [
        Peer(torch_tiny(net), net.preprocessing, w, net.name)
        for net, w in zip(nets, weights, strict=True)
    ]
    agree(
        loss_and_gradient(attack, images),
        torch_gradient(
            peers,
            images,
            config,
            space=tiny.SPACE,
            competitor=Peer(torch_tiny(other), tiny.OTHER_SPACE),
        ),
    )


def test_target_logit_loss_equals_torch() -> None:
    pytest.importorskip("torch")
    net = tiny.network()
    config = Config(
        phases=(Phase(1, jitter=0),), flip=0.0, label_loss="target_logit", tv_l1=0.1, **READABLE
    )
    attack = attack_of(config, Member(net, WEIGHTS), size=(12, 10))
    images = attack.initial(KEY)
    theirs = torch_gradient(
        [Peer(torch_tiny(net), tiny.SPACE, WEIGHTS)], images, config, space=tiny.SPACE
    )
    agree(loss_and_gradient(attack, images), theirs)


@pytest.mark.gpu
def test_images_follow_torch_for_two_phases() -> None:
    """Adam, warm-up, cosine, clipping, restart from the best images: 5 + 6 steps of both."""
    torch = pytest.importorskip("torch")
    net = tiny.network()
    config = Config(
        phases=(Phase(5, downscale=2, jitter=1), Phase(6, jitter=3, tv_l2=0.01, lr=0.1)),
        lr=0.25,
        warmup=2,
        tv_l2=2e-3,
        tv_l1=0.05,
        l2=3e-3,
    )
    assert config.optimizer_args == {"b1": 0.5, "b2": 0.9, "eps": 1e-8}
    attack = attack_of(config, Member(net, WEIGHTS), size=(12, 16))
    noise, bests, seen = attack.initial(KEY), [], []
    start = np.asarray(noise)

    def callback(chunk: optimise.Chunk) -> None:
        seen.append((np.asarray(chunk.state.images), float(chunk.metrics["loss"][0])))
        bests.append(np.asarray(chunk.state.best_images))

    optimise.run(attack.phases, KEY, noise, attack.data, callback=callback, chunk=1)
    assert len(seen) == 11

    peer = Peer(torch_tiny(net), tiny.SPACE, WEIGHTS)
    lo = torch.tensor([-m / s for m, s in zip(tiny.SPACE.mean, tiny.SPACE.std, strict=True)])
    hi = torch.tensor([(1 - m) / s for m, s in zip(tiny.SPACE.mean, tiny.SPACE.std, strict=True)])
    best, step, clipped = to_torch(start), 0, 0
    for phase, pool, tv in zip(config.phases, (2, 1), (2e-3, 0.01), strict=True):
        x = best.clone().requires_grad_()
        optimizer = torch.optim.Adam([x], betas=(0.5, 0.9), eps=1e-8)
        lowest = math.inf
        for t in range(phase.steps):
            base = phase.lr or 0.25
            if t < 2:
                lr = base * (t + 1) / 2
            else:
                lr = base * 0.5 * (1 + math.cos(math.pi * (t - 2) / (phase.steps - 2)))
            optimizer.param_groups[0]["lr"] = lr
            size = (12 // pool, 16 // pool)
            shift, flip = shift_and_flip(KEY, step, size, phase.jitter, 0.5)
            optimizer.zero_grad()
            loss, _ = torch_loss(
                [peer],
                x,
                config,
                space=tiny.SPACE,
                downscale=pool,
                shift=shift,
                flip=flip,
                tv_l2=tv,
            )
            if loss.item() < lowest:
                lowest, best = loss.item(), x.detach().clone()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                x.clamp_(lo.view(1, 3, 1, 1).double(), hi.view(1, 3, 1, 1).double())
            clipped += int((x == lo.view(1, 3, 1, 1).double()).sum())
            np.testing.assert_allclose(seen[step][1], loss.item(), rtol=1e-4)
            ours = seen[step][0].transpose(0, 3, 1, 2)
            # Adam magnifies the rounding of the few pixels whose gradient is nearly 0.
            assert relative(ours, x.detach().numpy()) < 1e-4
            np.testing.assert_allclose(ours, x.detach().numpy(), atol=1e-2)
            assert relative(bests[step].transpose(0, 3, 1, 2), best.numpy()) < 1e-4
            step += 1
    assert clipped > 0
    assert relative(seen[-1][0], start) > 0.2


# --- augmentation --------------------------------------------------------------------------------


def test_augment_pools_then_rolls_and_flips() -> None:
    images = tiny.noise((2, 12, 10, 3))
    pooled = np.asarray(images, np.float64).reshape(2, 6, 2, 5, 2, 3).mean((2, 4))
    for seed in range(6):
        key = jax.random.key(seed)
        shift, flip = shift_and_flip(key, 0, (6, 5), 2, 0.5)
        expected = np.roll(pooled, shift, (1, 2))
        expected = expected[:, :, ::-1] if flip else expected
        found = augment(jax.random.fold_in(key, 0), images, 2, 2, 0.5)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_augment_draws_every_shift_and_both_flips() -> None:
    drawn = [shift_and_flip(jax.random.key(0), t, (9, 9), 2, 0.25) for t in range(150)]
    assert {shift for shift, _ in drawn} == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
    assert 15 < sum(flip for _, flip in drawn) < 60
    always = [shift_and_flip(jax.random.key(0), t, (9, 9), 0, 1.0) for t in range(5)]
    assert set(always) == {((0, 0), True)}


def test_no_augmentation_leaves_the_images_alone() -> None:
    images = tiny.noise((2, 5, 4, 3))
    np.testing.assert_array_equal(deepinversion.augment(KEY, images, 1, 0, 0.0), images)


# --- it works ------------------------------------------------------------------------------------


def smooth_pictures(count: int, size: int = 16) -> np.ndarray:
    """Blurred noise, normalised."""
    small = tiny.noise((count, 4, 4, 3), seed=8)
    return np.asarray(jax.image.resize(small, (count, size, size, 3), "cubic"))


def test_planted_statistics_are_found() -> None:
    """The network's statistics are those of one batch: the BatchNorm term falls 100-fold."""
    pictures = smooth_pictures(8)
    net = tiny.network(seed=4, widths=(6, 8, 8), seen=pictures)
    for ours, stored in zip(net(jnp.asarray(pictures)).moments, net.running_moments(), strict=True):
        np.testing.assert_allclose(ours.mean, stored.mean, atol=1e-4)
        np.testing.assert_allclose(ours.var, stored.var, rtol=1e-3)
    config = Config(
        phases=(Phase(400, jitter=0),), flip=0.0, lr=0.1, warmup=20, tv_l2=0.0, l2=0.0, clip=False
    )
    member = Member(net, Weights(label=0.0, batch_norm=1.0))
    attack = attack_of(config, member, targets=[0] * 8)
    losses: list[float] = []
    state = optimise.run(
        attack.phases,
        KEY,
        attack.initial(KEY),
        attack.data,
        chunk=50,
        callback=lambda chunk: losses.extend(chunk.metrics["batch_norm"].tolist()),
    )
    assert float(state.best_loss) < losses[0] / 100, (losses[0], losses[-1])
    _, terms, _ = loss_and_gradient(
        attack_of(dataclasses.replace(config, **READABLE), member, targets=[0] * 8),
        jnp.array(state.best_images),
    )
    np.testing.assert_allclose(terms["batch_norm"], state.best_loss, rtol=1e-3)


def test_images_come_to_show_their_classes() -> None:
    """With jitter and flips, in two resolutions, and in the range of pixels."""
    # Each class of this random network can be reached; of others some cannot.
    net = tiny.network(seed=1)
    phases = (Phase(60, downscale=2, jitter=1), Phase(60, jitter=2))
    attack = attack_of(Config(phases=phases, lr=0.2, warmup=5), net, targets=range(7))
    noise = attack.initial(KEY)
    before = net(noise).logits.argmax(-1)
    state = optimise.run(attack.phases, KEY, noise, attack.data)
    found = np.asarray(net(state.best_images).logits.argmax(-1))
    assert (np.asarray(before) == np.arange(7)).mean() < 0.5
    np.testing.assert_array_equal(found, np.arange(7))
    for pictures in (state.images, state.best_images):
        pixels = np.asarray(image.denormalise(pictures, tiny.SPACE))
        assert pixels.min() > -1e-5
        assert pixels.max() < 1 + 1e-5


def test_best_images_had_the_lowest_loss() -> None:
    """Recomputed on them, with what that step drew, it is the loss that was recorded."""
    net = tiny.network()
    config = Config(phases=(Phase(25, jitter=3),), lr=2.0, warmup=0, schedule="constant")
    attack = attack_of(config, Member(net, WEIGHTS))
    losses: list[float] = []
    state = optimise.run(
        attack.phases,
        KEY,
        attack.initial(KEY),
        attack.data,
        chunk=7,
        callback=lambda chunk: losses.extend(chunk.metrics["loss"].tolist()),
    )
    lowest = int(np.argmin(losses))
    assert 0 < lowest < 24, "a loss that falls to the end, or never, shows nothing"
    assert float(state.best_loss) == np.float32(losses[lowest])
    phase = attack.phases[0]
    again = jax.jit(phase.step)(KEY, phase.enter(state.best_images, lowest), attack.data)[1]
    np.testing.assert_allclose(again.loss, losses[lowest], rtol=1e-5)
    elsewhere = jax.jit(phase.step)(KEY, phase.enter(state.images, lowest), attack.data)[1]
    assert float(elsewhere.loss) > losses[lowest] * 1.001


# --- options -------------------------------------------------------------------------------------


def test_initial_images_are_gaussian_noise() -> None:
    config = Config(phases=(Phase(1),), init_std=0.3)
    attack = attack_of(config, targets=[0] * 40)
    images = np.asarray(attack.initial(KEY))
    assert images.shape == (40, 16, 16, 3)
    assert abs(images.std() - 0.3) < 0.01
    assert abs(images.mean()) < 0.01
    np.testing.assert_array_equal(images, attack.initial(KEY))
    assert not np.array_equal(images, attack.initial(jax.random.key(12)))


def spied(net: Net, seen: list[Any]) -> Net:
    """The network, telling of what shape and type the images are that it is shown."""

    def apply(variables: Any, images: Array) -> Any:
        seen.append((images.shape, images.dtype))
        return net.apply(variables, images)

    return dataclasses.replace(net, apply=apply)


@pytest.mark.parametrize("coarse", ["pooled", "small"])
def test_coarse_phase_optimises_all_pixels_or_few(coarse: Any) -> None:
    """Either way the networks see images of half the size; then the full size."""
    seen: list[Any] = []
    config = Config(phases=(Phase(2, downscale=2, jitter=1), Phase(2, jitter=1)), coarse=coarse)
    attack = attack_of(config, spied(tiny.network(), seen), size=(8, 12))
    noise = attack.initial(KEY)
    small = (3, 4, 6, 3)
    assert noise.shape == (small if coarse == "small" else (3, 8, 12, 3))
    states: list[optimise.State] = []
    optimise.run(
        attack.phases,
        KEY,
        noise,
        attack.data,
        chunk=2,
        callback=lambda chunk: states.append(jax.tree.map(np.asarray, chunk.state)),
    )
    assert states[0].images.shape == noise.shape
    assert states[1].images.shape == states[1].best_images.shape == (3, 8, 12, 3)
    assert {shape for shape, _ in seen} == {small, (3, 8, 12, 3)}
    assert [phase.name for phase in attack.phases] == ["4 x 6 px", "8 x 12 px"]


def test_small_phase_is_enlarged_bilinearly() -> None:
    torch = pytest.importorskip("torch")
    config = Config(phases=(Phase(2, downscale=4), Phase(2)), coarse="small")
    attack = attack_of(config, size=(16, 24))
    images = attack.initial(KEY)
    assert images.shape == (3, 4, 6, 3)
    expected = torch.nn.functional.interpolate(
        to_torch(images), size=(16, 24), mode="bilinear", align_corners=False
    )
    entered = attack.phases[1].enter(images, 2).images
    np.testing.assert_allclose(np.asarray(entered).transpose(0, 3, 1, 2), expected, atol=1e-5)


def updates(config: Config, phase: Phase, losses: Sequence[float]) -> list[float]:
    """Learning rates of plain gradient descent when the losses are these."""
    config = dataclasses.replace(config, optimizer="sgd", optimizer_args={})
    optimizer = optax.with_extra_args_support(deepinversion.make_optimizer(config, phase))
    one, zero = jnp.ones(()), jnp.zeros(())
    compiled = jax.jit(lambda state, loss: optimizer.update(one, state, zero, value=loss))
    state = optimizer.init(zero)
    found = []
    for loss in losses:
        update, state = compiled(state, float(loss))
        found.append(-float(update))
    return found


def test_cosine_schedule_warms_up_and_falls_to_nothing() -> None:
    found = updates(Config(lr=0.4, warmup=4), Phase(12), [1.0] * 12)
    expected = [0.1, 0.2, 0.3, 0.4]
    expected += [0.4 * (1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_cosine_schedule_ends_at_its_floor() -> None:
    """From lr to a quarter of it: half-way between the two in the middle."""
    found = updates(Config(lr=0.4, warmup=0, lr_floor=0.25), Phase(8), [1.0] * 8)
    expected = [0.4 * (0.25 + 0.75 * (1 + np.cos(np.pi * t / 8)) / 2) for t in range(8)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_constant_schedule_warms_up_and_stays() -> None:
    found = updates(Config(lr=0.4, warmup=2, schedule="constant"), Phase(5), [1.0] * 5)
    np.testing.assert_allclose(found, [0.2, 0.4, 0.4, 0.4, 0.4], rtol=1e-6)
    found = updates(Config(warmup=0, schedule="constant"), Phase(3, lr=0.7), [1.0] * 3)
    np.testing.assert_allclose(found, [0.7] * 3, rtol=1e-6)


def test_warmup_longer_than_the_phase_is_the_phase() -> None:
    found = updates(Config(lr=0.4, warmup=100), Phase(4), [1.0] * 4)
    np.testing.assert_allclose(found, [0.1, 0.2, 0.3, 0.4], rtol=1e-6)


def test_plateau_schedule_lowers_the_learning_rate() -> None:
    """After 10% of 30 steps without a better loss; a better one starts the count anew."""
    config = Config(
        lr=0.8, schedule="plateau", warmup=0, plateau_patience=10.0, plateau_factor=0.25
    )
    losses = [5.0, 6, 6, 4, 5, 5, 5, 5, 5, 5, 5]
    found = updates(config, Phase(30), losses)
    expected = [0.8] * 6 + [0.2] * 3 + [0.05] * 2
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_student_preset_plateaus_and_stops_early() -> None:
    """A loss that cannot fall: of 40 steps, 1 + 15% are done, and every 5% halve the rate."""
    student = deepinversion.PRESETS["student"]
    config = dataclasses.replace(
        student, phases=(Phase(40, jitter=0),), lr=1e-30, flip=0.0, clip=False
    )
    attack = attack_of(config)
    chunks: list[tuple[int, bool]] = []
    state = optimise.run(
        attack.phases,
        KEY,
        attack.initial(KEY),
        attack.data,
        chunk=4,
        callback=lambda chunk: chunks.append((len(chunk.metrics["loss"]), chunk.stopped)),
    )
    assert chunks == [(4, False), (3, True)]
    assert int(state.step) == 7
    assert float(optax.tree.get(state.optimizer, "scale")) == 0.5**3


def test_clipping_is_optional() -> None:
    images = {}
    for clip in (True, False):
        config = Config(phases=(Phase(1, jitter=0),), flip=0.0, clip=clip)
        attack = attack_of(config)
        wild = 5 * attack.initial(KEY)
        step = jax.jit(attack.phases[0].step)
        state, _ = step(KEY, attack.phases[0].enter(wild, 0), attack.data)
        images[clip] = np.asarray(state.images)
    lo = -np.asarray(tiny.SPACE.mean) / tiny.SPACE.std
    hi = (1 - np.asarray(tiny.SPACE.mean)) / tiny.SPACE.std
    assert (images[False] < lo).any()
    assert (images[False] > hi).any()
    np.testing.assert_allclose(images[True], np.clip(images[False], lo, hi), atol=1e-5)


@pytest.mark.parametrize("space", [tiny.SPACE, tiny.GRAY], ids=["rgb network", "gray network"])
def test_gray_images_are_inverted(space: Preprocessing) -> None:
    """One channel is optimised; the loss is that of the network's own channels, all equal."""
    gray = Preprocessing(size=16, mean=(0.3,), std=(0.2,))
    net = tiny.network(space=space)
    config = Config(phases=(Phase(1, jitter=0),), flip=0.0, tv_l2=0.0, l2=0.0, **READABLE)
    attack = attack_of(config, Member(net, WEIGHTS), space=gray, size=(12, 16))
    assert attack.space == gray
    images = attack.initial(KEY)
    assert images.shape == (3, 12, 16, 1)
    loss, _, gradient = loss_and_gradient(attack, images)
    pixels = images * 0.2 + 0.3
    shown = (pixels - jnp.asarray(space.mean)) / jnp.asarray(space.std)
    own = attack_of(config, Member(net, WEIGHTS), size=(12, 16))
    own_loss, _, own_gradient = loss_and_gradient(own, shown)
    np.testing.assert_allclose(loss, own_loss, rtol=1e-5)
    chained = (own_gradient * 0.2 / np.asarray(space.std)).sum(-1, keepdims=True)
    assert relative(gradient, chained) < 1e-4


def test_bfloat16_networks_give_nearly_the_same_losses() -> None:
    """Images, losses and moments stay float32."""
    net = tiny.network()
    assert all(
        leaf.dtype == jnp.float32
        for leaf in jax.tree.leaves(net(tiny.noise((2, 8, 8, 3)).astype(jnp.bfloat16)).moments)
    )
    config = Config(phases=(Phase(1, jitter=1),), tv_l1=0.1, adaptive=1.0, **READABLE)
    found = {}
    for dtype in ("float32", "bfloat16"):
        ours: list[Any] = []
        others: list[Any] = []
        attack = attack_of(
            config,
            Member(spied(net, ours), WEIGHTS),
            size=(24, 16),
            competitor=spied(tiny.network(seed=1), others),
            compute_dtype=dtype,
        )
        images = attack.initial(KEY)
        found[dtype] = loss_and_gradient(attack, images)
        assert {str(kind) for _, kind in ours} == {str(kind) for _, kind in others} == {dtype}
        part = attack.phases[0]
        state, info = jax.eval_shape(part.step, KEY, part.enter(images, 0), attack.data)
        assert state.images.dtype == state.best_images.dtype == jnp.float32
        assert {leaf.dtype for leaf in (info.loss, *info.terms.values())} == {jnp.dtype("float32")}
    assert found["float32"][0] != found["bfloat16"][0]
    np.testing.assert_allclose(found["bfloat16"][0], found["float32"][0], rtol=0.02)
    for name, value in found["float32"][1].items():
        np.testing.assert_allclose(found["bfloat16"][1][name], value, rtol=0.02, err_msg=name)
    assert relative(found["bfloat16"][2], found["float32"][2]) < 0.1


def test_size_and_space_default_to_the_first_networks() -> None:
    first, second = tiny.network(name="a"), tiny.network(space=tiny.OTHER_SPACE, name="b")
    attack = attack_of(Config(phases=(Phase(1),)), second, first)
    assert attack.space == tiny.OTHER_SPACE
    assert attack.initial(KEY).shape == (3, 12, 12, 3)
    attack = attack_of(Config(phases=(Phase(1),)), first, size=20)
    assert attack.initial(KEY).shape == (3, 20, 20, 3)
    np.testing.assert_array_equal(attack.data.targets, TARGETS)


# --- presets -------------------------------------------------------------------------------------


def test_presets_are_the_published_settings() -> None:
    presets = deepinversion.PRESETS
    fast, slow = {"b1": 0.5, "b2": 0.9, "eps": 1e-8}, {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
    told: Mapping[str, tuple] = {
        "setting0": (((2000, 2, 15), (1000, 1, 30)), fast, True, 0.25, 1e-4, 1e-5),
        "setting1": (((2000, 1, 30),), fast, True, 0.25, 1e-4, 1e-5),
        "setting2": (((20000, 1, 30),), slow, False, 0.25, 1e-4, 1e-5),
        "cifar10": (((2000, 1, 2),), slow, False, 0.05, 2.5e-5, 0.0),
        "student": (((20000, 1, 30),), fast, True, 0.2, 8e-3, 1e-5),
        "sre2l": (((4000, 1, (0, 32)),), fast, True, 0.25, 0.0, 0.0),
        "sre2l_tiny_imagenet": (((4000, 1, 4),), fast, True, 0.1, 0.0, 0.0),
        "sre2l_cifar100": (((1000, 1, (0, 4)),), fast, True, 0.25, 0.0, 0.0),
        "cda": (((4000, 1, (0, 32)),), fast, True, 0.25, 0.0, 0.0),
    }
    assert presets.keys() == told.keys()
    for name, expected in told.items():
        c = presets[name]
        phases = tuple((p.steps, p.downscale, p.jitter) for p in c.phases)
        assert (phases, c.optimizer_args, c.clip, c.lr, c.tv_l2, c.l2) == expected, name
        assert c.optimizer == "adam"
        assert c.flip == (0 if name == "sre2l_cifar100" else 0.5), name
        assert c.schedule == ("plateau" if name == "student" else "cosine"), name
        assert c.warmup == (0 if name.startswith(("student", "sre2l", "cda")) else 100), name
    student = presets["student"]
    assert student.tv_per_image
    assert (student.early_stop, student.plateau_patience) == (15, 5)
    assert (Weights().label, Weights().batch_norm, Weights().first_bn_multiplier) == (1, 0.01, 10)


@pytest.mark.parametrize("name", deepinversion.PRESETS)
def test_presets_build(name: str) -> None:
    attack = attack_of(deepinversion.PRESETS[name])
    for phase in attack.phases:
        state = jax.eval_shape(phase.enter, attack.initial(KEY), 0)
        after, _ = jax.eval_shape(phase.step, KEY, state, attack.data)
        assert jax.tree.structure(after) == jax.tree.structure(state)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phases": ()}, "phases must be a list of one or more mappings"),
        ({"temperature": 0.0}, "temperature must be a number above 0"),
        ({"adaptive_temperature": -1.0}, "adaptive_temperature must be a number above 0"),
        ({"lr_floor": 1.5}, "lr_floor must be a number of at least 0 and at most 1"),
        ({"flip": 1.5}, "flip must be a number of at least 0 and at most 1, not 1.5"),
        ({"flip": -0.1}, "flip must be a number of at least 0 and at most 1, not -0.1"),
        ({"optimizer": "adamm"}, "optimizer must be one of .* not 'adamm': did you mean adam"),
        ({"optimizer": "_src"}, "optimizer must be one of .* not '_src'"),
        ({"optimizer": "GradientTransformation"}, "optimizer must be one of"),
        ({"optimizer": "losses"}, "optimizer must be one of .* not 'losses'"),
        ({"optimizer": "chain"}, "optimizer_args: chain refuses"),
        ({"optimizer": "rprop"}, "optimizer: rprop cannot be run with a schedule"),
        ({"optimizer_args": {"b1": "0.9"}}, "optimizer: adam cannot be run .*'b1': '0.9'"),
        ({"optimizer_args": {"beta": 1}}, "optimizer_args: adam refuses its arguments: .*beta"),
        (
            {"coarse": "small", "phases": (Phase(1), Phase(1, downscale=2))},
            "coarse: 'small' leaves the images as small as their last phase",
        ),
        ({"optimizer": "lbfgs"}, "L-BFGS searches along each step"),
        ({"schedule": "linear"}, "schedule must be one of cosine, constant, plateau, not 'linear'"),
        ({"coarse": "tiny"}, "coarse.*'tiny'"),
        ({"label_loss": "hinge"}, "label_loss.*'hinge'"),
        ({"lr_floor": 0.5, "schedule": "constant"}, "lr_floor: 0.5 plays no part: schedule is"),
        ({"plateau_factor": 0.1}, "plateau_factor: 0.1 plays no part: schedule is 'cosine'"),
        ({"plateau_patience": 9.0}, "plateau_patience: 9.0 plays no part: schedule is 'cosine'"),
        ({"label_loss": "target_logit", "temperature": 2.0}, "temperature: 2.0 plays no part"),
        ({"adaptive_temperature": 2.0}, "adaptive_temperature: 2.0 plays no part: adaptive is 0"),
        ({"coarse": "small", "phases": (Phase(1),)}, "coarse: 'small' plays no part"),
        ({"tv_l2": 0.0, "tv_per_image": True}, "tv_per_image: true plays no part: tv_l2 is 0"),
    ],
)
def test_config_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"steps": 1, "downscale": 0}, "downscale must be a whole number of at least 1, not 0"),
        ({"steps": 1, "jitter": -1}, "jitter must be a whole number of at least 0 or 2 whole"),
    ],
)
def test_phases_refuse(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phase(**settings)


def test_the_published_arguments_are_those_of_optimizers_that_take_them() -> None:
    assert Config(optimizer="sgd").optimizer_args == {}
    assert Config(optimizer="adamw").optimizer_args == Config().optimizer_args
    assert Config(optimizer="sgd", optimizer_args={"momentum": 0.9}).optimizer_args["momentum"]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("adam", {"beta": 0.5}, r"adam refuses its arguments: .*beta"),
        ("adam", {"learning_rate": 0.5}, r"adam refuses its arguments: .*learning_rate"),
        ("apply_updates", {}, r"apply_updates refuses its arguments"),
        ("constant_schedule", {}, r"constant_schedule is no optimizer"),
    ],
)
def test_optimizer_arguments_are_checked(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack_of(Config(optimizer=name, optimizer_args=args))


def refused(message: str, config: Config, *members: Net, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message):
        attack_of(config, *members, **settings)


def test_build_refuses() -> None:
    one = Config(phases=(Phase(1),))
    net = tiny.network()
    with pytest.raises(ValueError, match="at least one network"):
        deepinversion.build(one, [], TARGETS)
    adaptive = dataclasses.replace(one, adaptive=0.2)
    refused("both a weight .* and a competitor", adaptive)
    refused("both a weight .* and a competitor", one, competitor=net)
    more = tiny.network(classes=9, name="nine")
    refused("nine has 9 classes, .*tiny.* 7", adaptive, net, competitor=more)
    refused("two networks in the objective are called tiny", one, net, tiny.network(seed=1))
    gray = tiny.network(space=tiny.GRAY, name="gray")
    refused("3-channel images cannot be shown", one, net, gray)
    refused("3-channel images cannot be shown", adaptive, net, competitor=gray)
    uneven = r"\Aexecution.images_at_once: 3 images cannot be taken 2 .*: possible are 1, 3\Z"
    refused(uneven, one, execution=Execution(images_at_once=2))
    attack_of(one, execution=Execution(images_at_once=4))
    uneven = "6 images cannot be taken 4 at a time evenly: possible are 1, 2, 3, 6"
    refused(uneven, one, targets=[0] * 6, execution=Execution(images_at_once=4))
    with pytest.raises(ValueError, match=r"also of one network: \[net\]"):
        begin.members(net)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Member's net must be a jinv.Net, .*give its `net`"):
        begin.members([Member(net)])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"members": [tiny.network()]}, r"members\[0\] is the Net tiny: wrap it, jinv.Member\(net"),
        ({"members": tiny.network()}, r"a list, also of one network: \[jinv.Member\(net\)\]"),
        ({"members": Member(tiny.network())}, r"a list, also of one network: \[member\]"),
        (
            {"members": ["resnet18"]},
            r"members\[0\] must be of .*Member, not 'resnet18': wrap",
        ),
        ({"members": 3}, "a list of jinv.Member, not 3"),
        ({"competitor": Member(tiny.network())}, "competitor must be a jinv.Net, .*give its `net`"),
        ({"competitor": "resnet18"}, "competitor must be a jinv.Net, not a str"),
        ({"config": "setting0"}, r"config must be of .*deepinversion.Config, not 'setting0'"),
        ({"space": "imagenet"}, "space must be a jinv.Preprocessing, .* not 'imagenet'"),
        ({"space": 16}, "space must be a jinv.Preprocessing, .* not 16"),
        ({"execution": {"devices": 1}}, r"must be of jinv.objective.ensemble.Execution, not {'dev"),
        ({"execution": gradient_inversion.Execution()}, "must be of jinv.objective.ensemble.Exec"),
        (
            {"compute_dtype": "foo"},
            "floating-point type, such as 'float32' or 'bfloat16', not",
        ),
        ({"compute_dtype": "int32"}, "floating-point type, .*, not 'int32'"),
        ({"compute_dtype": None}, "floating-point type"),
    ],
)
def test_arguments_of_another_kind_are_refused(settings: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "config": Config(phases=(Phase(1),)),
        "members": [Member(tiny.network())],
        "targets": TARGETS,
    }
    with pytest.raises(ValueError, match=message):
        deepinversion.build(**given | settings)


def test_targets_are_checked() -> None:
    one = Config(phases=(Phase(1),))
    refused("from 0 to 7, but tiny has classes 0 to 6", one, targets=[0, 7])
    refused("from -1 to 3, but tiny has classes 0 to 6", one, targets=[3, -1])
    few = tiny.network(classes=4, name="few")
    refused("from 0 to 6, but few has classes 0 to 3", one, tiny.network(), few)
    for bad in ([], [[1, 2]], [1.0, 2.0], [True, False], 3):
        refused("non-empty list of class numbers", one, targets=bad)
    assert attack_of(one, targets=np.asarray([6, 0])).data.targets.dtype == jnp.int32


def test_size_must_be_divisible() -> None:
    config = Config(phases=(Phase(1, downscale=4), Phase(1)))
    refused("18 x 16 images cannot be downscaled by 4", config, size=(18, 16))
    refused("16 x 18 images cannot be downscaled by 4", config, size=(16, 18))
    attack_of(config, size=(20, 16))


def test_sizes_of_height_and_width() -> None:
    """The first network's is the images'; another sees each axis resampled by its own ratio."""
    wide = tiny.network(space=dataclasses.replace(tiny.SPACE, size=(16, 24)), name="wide")
    seen = []

    def apply(variables: Any, images: Array) -> Any:
        seen.append(images.shape)
        return wide.apply(variables, images)

    tall = dataclasses.replace(tiny.OTHER_SPACE, size=(24, 12))
    other = dataclasses.replace(wide, name="tall", apply=apply, preprocessing=tall)
    config = Config(phases=(Phase(1, downscale=2), Phase(1)))
    attack = attack_of(config, wide, other)
    assert attack.initial(KEY).shape == (len(TARGETS), 16, 24, 3)
    assert {shape[1:] for shape in seen} == {(12, 6, 3), (24, 12, 3)}
    assert attack_of(config, wide, size=[8, 20]).initial(KEY).shape[1:] == (8, 20, 3)
    for bad in ("16", 0, (16, 24, 3), 16.0, True):
        refused("size must be positive whole numbers", config, size=bad)


def test_networks_of_a_fixed_size_say_so() -> None:
    net = models.load("lenet", None)
    refused(r"lenet cannot take 32 x 20 px images", Config(phases=(Phase(1),)), net, size=(32, 20))


# --- terms of one's own -------------------------------------------------------------------------


def brightness(images: jax.Array) -> jax.Array:
    return jnp.square(images.mean())


def test_an_extra_term_is_weighed_and_seen_like_the_others() -> None:
    """On the pooled images, with its gradient; written out with its formula."""
    config = Config(
        phases=(Phase(1, downscale=2, jitter=0),), flip=0.0, tv_l2=0.0, l2=0.0, **READABLE
    )
    extra = {"brightness": (3.0, brightness), "idle": (0.0, brightness)}
    attack = attack_of(config, extra_terms=extra)
    images = attack.initial(KEY)
    loss, terms, gradient = loss_and_gradient(attack_of(config), images)
    found, named, more = loss_and_gradient(attack, images)
    mean = float(np.asarray(images, np.float64).mean())
    assert list(named) == [*terms, "brightness"]
    assert named["brightness"] == pytest.approx(mean**2, rel=1e-3)
    assert found - loss == pytest.approx(3 * mean**2, rel=1e-3, abs=1e-5)
    np.testing.assert_allclose(more - gradient, 3 * 2 * mean / images.size, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "weight", "term", "message"),
    [
        ("tv_l2", 1.0, brightness, "cannot be called 'tv_l2': the name is taken"),
        ("label", 1.0, brightness, "cannot be called 'label': the name is taken"),
        ("label[tiny]", 1.0, brightness, "name is taken"),
        ("own", float("nan"), brightness, "weight of the extra term own must be finite, not nan"),
        ("own", 1.0, lambda x: x.mean((1, 2, 3)), "own must return one real number, not .*3"),
        ("own", 1.0, lambda x: 3, "own must return one real number"),
        ("own", 1.0, lambda x: x @ jnp.ones(99), r"own cannot be computed of images \(3, 16, 16"),
    ],
)
def test_extra_terms_are_checked(name: str, weight: float, term: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack_of(Config(phases=(Phase(1),)), extra_terms={name: (weight, term)})


# --- other targets, the same program ------------------------------------------------------------


def test_other_targets_run_the_same_program() -> None:
    """As an attack built for them finds, and nothing is traced again."""
    config = Config(phases=(Phase(2, jitter=1),), warmup=1)
    attack = attack_of(config, targets=[0, 3, 6])
    other = attack.with_targets([5, 1, 1])
    assert other.phases is attack.phases
    built, _ = tiny.run(attack_of(config, targets=[5, 1, 1]))
    found, _ = tiny.run(other)
    np.testing.assert_array_equal(found.images, built.images)
    step = jax.jit(attack.phases[0].step)
    for one in (attack, other):
        step(KEY, optimise.enter(one.phases[0], one.initial(KEY), 0), one.data)
    assert step._cache_size() == 1
    with pytest.raises(ValueError, match="the attack is of 3 images; 2 targets given"):
        attack.with_targets([5, 1])
    with pytest.raises(ValueError, match="from 1 to 7, but tiny has classes 0 to 6"):
        attack.with_targets([5, 1, 7])


# --- what condensation asks for -------------------------------------------------------------------


def loss_of(config: Config, images: Array, step: int = 0, **settings: Any) -> float:
    attack = attack_of(config, **settings)
    state = attack.phases[0].enter(images, step)
    _, info = jax.jit(attack.phases[0].step)(KEY, state, attack.data)
    return float(info.loss)


@pytest.mark.parametrize("per_image", [False, True])
def test_a_step_sees_a_part_of_the_images(per_image: bool) -> None:
    """The loss is that of the images cut by hand, each by its box or all by one."""
    crop = Crop(scale=(0.2, 0.5), per_image=per_image)
    plain = Config(phases=(Phase(1, jitter=0),), flip=0.0, tv_l2=0.0, l2=0.0, **READABLE)
    images = attack_of(plain).initial(KEY)
    key = jax.random.fold_in(KEY, 0)
    parts = deepinversion.augment(key, images, 1, 0, 0.0, crop)
    draws = jax.random.split(jax.random.fold_in(key, 2), 3 if per_image else 1)
    boxes = [image.random_box(draw, (16, 16), crop.scale) for draw in draws]
    for i, part in enumerate(parts):
        box = boxes[i % len(boxes)]
        assert 0.15 * 256 < box[2] * box[3] < 0.55 * 256
        alone = image.resized_crop(images[i : i + 1], box)[0]
        np.testing.assert_allclose(part, alone, atol=1e-6)
    cropped = loss_of(dataclasses.replace(plain, crop=crop), images)
    np.testing.assert_allclose(cropped, loss_of(plain, jnp.asarray(parts)), rtol=1e-5)


def test_crops_grow_harder() -> None:
    """The least share is all of the image first, and `scale[0]` at the end of the phase."""
    crop = Crop(scale=(0.1, 1.0), ratio=(1.0, 1.0), easy_to_hard=True)
    plain = Config(phases=(Phase(3, jitter=0), Phase(4, jitter=0)), flip=0.0, **READABLE)
    config = dataclasses.replace(plain, crop=crop)
    images = attack_of(plain).initial(KEY)
    assert loss_of(config, images) == pytest.approx(loss_of(plain, images), rel=1e-6)

    def seen(progress: float) -> Array:
        return deepinversion.augment(KEY, images, 1, 0, 0.0, crop, progress)

    np.testing.assert_allclose(seen(0.0), images, atol=1e-6)
    fixed = dataclasses.replace(crop, scale=(0.55, 1.0), easy_to_hard=False)
    half = deepinversion.augment(KEY, images, 1, 0, 0.0, fixed)
    np.testing.assert_allclose(seen(0.5), half, atol=1e-6)

    state, _ = tiny.run(attack_of(config))
    assert float(state.memory) == pytest.approx(3 / 4)


def test_the_last_images_are_kept() -> None:
    config = Config(phases=(Phase(6, jitter=1),), warmup=0, lr=3.0)
    best, _ = tiny.run(attack_of(config))
    last, _ = tiny.run(attack_of(dataclasses.replace(config, keep="last")))
    np.testing.assert_array_equal(last.images, best.images)
    np.testing.assert_array_equal(last.best_images, last.images)
    assert not np.array_equal(best.best_images, best.images)


def test_statistics_of_a_class_take_the_place_of_running_ones() -> None:
    net = tiny.network()
    config = Config(phases=(Phase(1, jitter=0),), flip=0.0, **READABLE)
    rng = np.random.default_rng(0)
    tables = tuple(
        Moments(*(jnp.asarray(rng.uniform(0.5, 2, (7, len(m.mean))), jnp.float32) for _ in "mv"))
        for m in net.running_moments()
    )
    attack = attack_of(config, Member(net, WEIGHTS, tables), targets=[4, 4, 4])
    images = attack.initial(KEY)
    moments = net.apply(net.variables, images).moments
    for aimed, target in ((attack, 4), (attack.with_targets([2, 2, 2]), 2)):
        row = jax.tree.map(lambda table, target=target: table[target], tables)
        wanted = priors.batch_norm(moments, row, first_multiplier=10)
        _, terms, _ = loss_and_gradient(aimed, images)
        np.testing.assert_allclose(terms["batch_norm"], wanted, rtol=1e-5)
    with pytest.raises(ValueError, match="give one class to all images of a batch"):
        attack.with_targets([4, 4, 2])
    with pytest.raises(ValueError, match="class_moments of tiny need the shapes"):
        Member(net, WEIGHTS, tables[:1])


def test_a_competitor_may_change_without_compiling_again() -> None:
    config = Config(phases=(Phase(2, jitter=1),), warmup=1, adaptive=2.0)
    first, second = tiny.network(seed=2, name="rival"), tiny.network(seed=3, name="rival")
    attack = attack_of(config, competitor=first)
    other = attack.with_competitor(second.variables)
    assert other.phases is attack.phases
    found, _ = tiny.run(other)
    built, _ = tiny.run(attack_of(config, competitor=second))
    np.testing.assert_array_equal(found.images, built.images)
    with pytest.raises(ValueError, match="without a competitor"):
        attack_of(Config(phases=(Phase(1),))).with_competitor(second.variables)


def test_presets_of_condensation() -> None:
    """What they ask for besides; the rate has no warm-up."""
    presets = deepinversion.PRESETS
    published, small = presets["sre2l"], presets["sre2l_cifar100"]
    assert published.crop == Crop((0.08, 1.0), (3 / 4, 4 / 3))
    assert presets["cda"].crop == Crop(easy_to_hard=True)
    assert small.crop is None
    assert (published.keep, small.keep) == ("last", "last")
    rate = optimise.warm_cosine(published.lr, published.warmup, 4000, published.lr_floor)
    np.testing.assert_allclose([float(rate(0)), float(rate(2000))], [0.25, 0.125])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Crop(scale=(0.5, 0.1)), "scale must be the least and the greatest"),
        (lambda: Crop(ratio=(2.0, 1.0)), "ratio must be the least and the greatest"),
        (lambda: Phase(1, jitter=(3, 1)), "jitter must be the least and the largest shift"),
    ],
)
def test_crops_and_shifts_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- classes -------------------------------------------------------------------------------------

# The authors' list, as `methods.md` of this project has it.
FAMOUS = (
    "1 933 946 980 25 63 92 94 107 985 151 154 207 250 270 277 283 292 294 309 311 325 340 360 "
    "386 402 403 409 530 440 468 417 590 670 817 762 920 949 963 967 574 487"
)


def test_hand_picked_classes_are_the_authors_in_turn() -> None:
    famous = [int(c) for c in FAMOUS.split()]
    assert len(famous) == len(set(famous)) == 42
    found = deepinversion.choose_targets("hand-picked", 84, 1000, KEY)
    assert found == famous * 2
    assert deepinversion.choose_targets("hand-picked", 44, 1000, KEY) == famous + famous[:2]


def test_random_classes_are_those_of_the_key() -> None:
    def choose(seed: int, count: int = 300) -> list[int]:
        return deepinversion.choose_targets("random", count, 5, jax.random.key(seed))

    assert choose(0) == choose(0)
    assert choose(0) != choose(1)
    counts = np.bincount(choose(0), minlength=5)
    assert len(counts) == 5
    assert counts.min() > 30
    assert all(type(c) is int for c in choose(0, 3))


def test_given_classes_come_in_turn() -> None:
    assert deepinversion.choose_targets([4, 2, 9], 7, 10, KEY) == [4, 2, 9, 4, 2, 9, 4]
    assert deepinversion.choose_targets((4, 2, 9), 2, 10, KEY) == [4, 2]


def test_choice_of_classes_is_checked() -> None:
    with pytest.raises(ValueError, match="at least one image is needed, not 0"):
        deepinversion.choose_targets("random", 0, 10, KEY)
    with pytest.raises(ValueError, match="ImageNet's 1000; this network has 10"):
        deepinversion.choose_targets("hand-picked", 4, 10, KEY)
    for bad in ("famous", [], ()):
        with pytest.raises(ValueError, match="'hand-picked', 'random' or a list"):
            deepinversion.choose_targets(bad, 4, 10, KEY)  # type: ignore[arg-type]
