"""Names that others give to torchvision's layers, where they follow from torchvision's by a rule.

A rule goes from the network's names to the file's, because the network is known and the file is
not: a file has a naming if it has all the names that the rule gives.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from re import Match


@dataclass(frozen=True)
class Naming:
    """Somebody's names.

    Attributes:
        origin: whose they are, for messages.
        of: gives each of a network's names the other one; empty if the network is none that has
            other names.
    """

    origin: str
    of: Callable[[Collection[str]], dict[str, str]]


def namings(names: Collection[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield whose other names there are of a network with these names, and the other ones."""
    for naming in _NAMINGS:
        others = naming.of(names)
        if others and len(set(others.values())) == len(names):
            yield naming.origin, others


def natural(parts: Collection[str | int]) -> list[tuple[float, str]]:
    """Sort key: numbers by value and before words, of which a layer's weight is the first."""
    words = [str(part) if part != "weight" else "" for part in parts]
    return [(int(word), "") if word.isdecimal() else (math.inf, word) for word in words]


Rule = tuple[str, str | Callable[[Match[str]], str]]


def _by(*rules: Rule) -> Callable[[Collection[str]], dict[str, str]]:
    """Apply the rules to every name one after the other; each must have something to change."""

    def of(names: Collection[str]) -> dict[str, str]:
        others, used = {name: name for name in names}, set()
        for name in names:
            for pattern, replacement in rules:
                others[name], found = re.subn(pattern, replacement, others[name], count=1)
                if found:
                    used.add(pattern)
        return others if len(used) == len(rules) else {}

    return of


_DENSENET: Rule = (r"(\.denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2")
_PARALLEL: Rule = (r"^features\.", "features.module.")
_VGG: tuple[Rule, ...] = (
    (r"^classifier\.0\.", "pre_logits.fc1."),
    (r"^classifier\.3\.", "pre_logits.fc2."),
    (r"^classifier\.6\.", "head.fc."),
)
_CONVNEXT: tuple[Rule, ...] = (
    (r"^features\.0\.", "stem."),
    (r"^features\.([1357])\.", lambda found: f"stages.{int(found[1]) // 2}.blocks."),
    (r"^features\.([246])\.", lambda found: f"stages.{int(found[1]) // 2}.downsample."),
    (r"\.layer_scale$", ".gamma"),
    (r"\.block\.0\.", ".conv_dw."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."),
    (r"\.block\.5\.", ".mlp.fc2."),
    (r"^classifier\.0\.", "head.norm."),
    (r"^classifier\.2\.", "head.fc."),
)
_REGNET_PARTS = {"a": "conv1", "b": "conv2", "c": "conv3", "se": "se"}
_REGNET: tuple[Rule, ...] = (
    (r"^trunk_output\.block(\d)\.block\d-(\d+)\.", lambda m: f"s{m[1]}.b{int(m[2]) + 1}."),
    (r"\.f\.(a|b|c|se)\.", lambda m: f".{_REGNET_PARTS[m[1]]}."),
    (r"\.proj\.", ".downsample."),
    (r"^(stem|.*\.(?:conv\d|downsample))\.0\.", r"\1.conv."),
    (r"^(stem|.*\.(?:conv\d|downsample))\.1\.", r"\1.bn."),
    (r"^fc\.", "head.fc."),
)

# A stage and a block in it; mobilenets count their blocks through.
_IN_STAGES = re.compile(r"(?:features|layers)\.(\d+)\.(\d+)\.(?:block|layers)\.")
_COUNTED = re.compile(r"features\.(\d+)\.(?:block|conv)\.")
_STAGES = {17: (1, 2, 3, 4, 3, 3, 1), 15: (1, 2, 3, 4, 2, 3), 11: (1, 2, 3, 2, 3)}
_OUTSIDE = (-1, -1)
_MNASNET_STEM = "layers.0"
_MNASNET_FIRST = ("layers.3", "layers.4", "layers.6", "layers.7")  # a block without a name
_CONVOLUTIONS = {
    1: ("conv",),
    2: ("conv_exp", "conv_pwl"),
    3: ("conv_pw", "conv_dw", "conv_pwl"),
}


def _mobile(names: Collection[str]) -> dict[str, str]:
    """timm's names of EfficientNet 1 and 2, MobileNet 2 and 3, and MNASNet, built by one builder.

    A block's layers have names by what they do, which their number and their order tell.
    """
    parts = defaultdict(set)
    for name in names:
        layer, _, last = name.rpartition(".")
        parts[layer].add(last)
    blocks = _blocks(sorted(parts, key=lambda layer: natural(layer.split("."))))
    outside = blocks.pop(_OUTSIDE, [])
    rest = [layer for layer in outside if not layer.startswith("classifier.")]
    linear = [layer for layer in outside if layer.startswith("classifier.")]
    if not blocks or len(rest) != 4 or len(linear) not in (1, 2):
        return {}
    others: dict[str, str] = {}
    for (stage, i), layers in blocks.items():
        squeeze = [layer for layer in layers if layer.endswith((".fc1", ".fc2"))]
        plain = [layer for layer in layers if layer not in squeeze]
        norms = [layer for layer in plain if "running_mean" in parts[layer]]
        convolutions = [layer for layer in plain if layer not in norms]
        roles = _CONVOLUTIONS.get(len(convolutions))
        if roles is None or len(norms) != len(convolutions) or len(squeeze) not in (0, 2):
            return {}
        if len(roles) == 2 and stage == 0:
            roles = "conv_dw", "conv_pw"
        roles += tuple(f"bn{j + 1}" for j in range(len(norms)))
        roles += ("se.conv_reduce", "se.conv_expand")[: len(squeeze)]
        for layer, role in zip(convolutions + norms + squeeze, roles, strict=True):
            others[layer] = f"blocks.{stage}.{i}.{role}"
    last = f"blocks.{max(stage for stage, _ in blocks) + 1}.0"
    # The first of two linear layers is a convolution in timm, after the pooling.
    ends = ("conv_head", "bn2") if len(linear) == 1 else (f"{last}.conv", f"{last}.bn1")
    others.update(zip(rest, ("conv_stem", "bn1", *ends), strict=True))
    others.update(zip(linear, ("conv_head", "classifier")[-len(linear) :], strict=True))
    return {name: f"{others[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in names}


def _blocks(layers: Collection[str]) -> dict[tuple[int, int], list[str]]:
    """Sort layers by stage and block, both from 0, those in none under `_OUTSIDE`."""
    first = 7 if _MNASNET_STEM in layers else 1
    counted = {found[1] for layer in layers if (found := _COUNTED.match(layer))}
    stages = enumerate(_STAGES.get(len(counted), ()))
    places = dict(enumerate(((stage, i) for stage, depth in stages for i in range(depth)), 1))
    blocks: dict[tuple[int, int], list[str]] = defaultdict(list)
    for layer in layers:
        place = _OUTSIDE
        if found := _IN_STAGES.match(layer):
            place = int(found[1]) - first, int(found[2])
        elif found := _COUNTED.match(layer):
            place = places.get(int(found[1]), _OUTSIDE)
        elif first == 7 and layer in _MNASNET_FIRST:
            place = 0, 0
        blocks[place].append(layer)
    return blocks


_NAMINGS = (
    # Module names had dots before torch 0.4; the published files still have these names.
    Naming("an older torchvision's", _by(_DENSENET)),
    # PyTorch's ImageNet example wraps the features of AlexNet and VGG alone.
    Naming("DataParallel's", _by(_PARALLEL)),
    Naming("timm's", _by(*_VGG)),
    Naming("timm's", _by(*_CONVNEXT)),
    Naming("timm's", _by(*_REGNET)),
    Naming("timm's", _mobile),
)
