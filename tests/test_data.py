"""IDX and NumPy files, folders of pictures, tfds: what is read, and what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import io
import math
import os
import struct
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jinv import data, image
from jinv.data import Dataset
from jinv.image import Preprocessing

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (5, 4, 3), np.uint8)
LABELS = np.array([2, 0, 1, 2, 0], np.uint8)


def encoded(array: np.ndarray, code: int = 8) -> bytes:
    """The IDX format, http://yann.lecun.com/exdb/mnist: 0, 0, type, rank, lengths, values."""
    lengths = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes((0, 0, code, array.ndim)) + lengths + array.tobytes()


def write(
    folder: Path,
    *,
    split: str = "train",
    prefix: str = "",
    images: bytes = encoded(PICTURES),
    labels: bytes = encoded(LABELS),
    end: str = "",
) -> Path:
    """A pair of files; returns the folder."""
    for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
        path = folder / f"{prefix}{split}-{kind}-ubyte{end}"
        path.write_bytes(gzip.compress(content) if end else content)
    return folder


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(("split", "word"), [("train", "train"), ("test", "t10k")])
def test_idx_is_what_was_written(tmp_path: Path, split: data.Split, word: str, end: str) -> None:
    found = data.idx(write(tmp_path, split=word, end=end), split)
    np.testing.assert_array_equal(found.images, PICTURES[..., None])
    np.testing.assert_array_equal(found.labels, LABELS)
    assert found.images.dtype == np.uint8
    assert found.labels.dtype == np.int32
    assert found.classes == ("0", "1", "2")
    assert len(found) == 5


def test_compression_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    """Browsers unpack files without renaming them."""
    write(tmp_path, end=".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.decompress(path.read_bytes()))
    np.testing.assert_array_equal(data.idx(tmp_path, "train").images[..., 0], PICTURES)


def test_emnist_letters_begin_at_a_and_stand_upright(tmp_path: Path) -> None:
    labels = np.array([1, 26, 3, 2, 1], np.uint8)
    write(tmp_path, prefix="emnist-letters-", labels=encoded(labels), end=".gz")
    found = data.idx(tmp_path, "train", transposed=True)
    np.testing.assert_array_equal(found.images[..., 0], PICTURES.transpose(0, 2, 1))
    assert [found.classes[label] for label in found.labels] == ["A", "Z", "C", "B", "A"]
    assert found.images.flags.c_contiguous


def test_emnist_classes_are_as_many_as_published() -> None:
    """62, 47, 47, 26, 10, 10 of arXiv 1702.05373, table II; 47 = 62 less 15 look-alikes."""
    counts = [len(names) for names in data.EMNIST.values()]
    assert counts == [62, 47, 47, 26, 10, 10]
    assert data.EMNIST["emnist-balanced"][36:] == tuple("abdefghnqrt")


def test_a_folder_of_several_data_sets_is_asked_for_one(tmp_path: Path) -> None:
    write(tmp_path, prefix="emnist-digits-")
    write(tmp_path, prefix="emnist-mnist-", images=encoded(255 - PICTURES))
    with pytest.raises(ValueError, match="emnist-digits, emnist-mnist"):
        data.idx(tmp_path, "train")
    found = data.idx(tmp_path, "train", name="emnist-mnist")
    np.testing.assert_array_equal(found.images[..., 0], 255 - PICTURES)
    with pytest.raises(ValueError, match="emnist-letters-train-images"):
        data.idx(tmp_path, "train", name="emnist-letters")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.*No such file"):
        data.idx(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        data.idx(tmp_path, "train")
    (write(tmp_path) / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte"):
        data.idx(tmp_path, "train")


HUGE = struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1)
DAMAGED = {
    "empty": (b"", "header"),
    "cut header": (encoded(PICTURES)[:9], "header"),
    "of another magic": (b"\x01" + encoded(PICTURES)[1:], "01000803"),
    "of floats": (encoded(PICTURES, code=13), "00000d03"),
    "of another rank": (encoded(PICTURES[0]), "00000802"),
    "without images": (encoded(PICTURES[:0]), "0 values"),
    "cut": (encoded(PICTURES)[:-1], "60 values"),
    "too long": (encoded(PICTURES) + b"\0", "60 values"),
    "promising the moon": (HUGE + bytes(100), "promises"),
}


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_named_and_refused(tmp_path: Path, kind: str, end: str) -> None:
    content, complaint = DAMAGED[kind]
    write(tmp_path, images=content, end=end)
    with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte{end} .*{complaint}"):
        data.idx(tmp_path, "train")


@pytest.mark.parametrize("damage", ["cut", "flipped", "rubbish"])
def test_damaged_gzip_is_named_and_refused(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path, end=".gz") / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    checksum = bytes((whole[-8] ^ 1,))
    path.write_bytes(
        {
            "cut": whole[:-12],
            "flipped": whole[:-8] + checksum + whole[-7:],
            "rubbish": whole[:10] + bytes(range(255, 155, -1)),
        }[damage]
    )
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is no sound IDX file"):
        data.idx(tmp_path, "train")


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """100 MB of zeros behind a header that promises 60 bytes: only 61 are asked for."""
    write(tmp_path, images=encoded(PICTURES) + bytes(100_000_000), end=".gz")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="goes on after the 60 values"):
            data.idx(tmp_path, "train")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_promise_takes_no_memory(tmp_path: Path) -> None:
    """1000 bytes cannot unpack to 4 GB: refused before memory is taken."""
    header = struct.pack(">4B3I", 0, 0, 8, 3, 60_000, 260, 260)
    write(tmp_path, images=header + os.urandom(1000), end=".gz")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="promises"):
            data.idx(tmp_path, "train")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_images_and_labels_must_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"5 images.*4 labels"):
        data.idx(write(tmp_path, labels=encoded(LABELS[:4])), "train")
    with pytest.raises(ValueError, match=r"train-labels.*labels 0 to 2 for 2 classes"):
        data.idx(write(tmp_path), "train", classes=("a", "b"))
    with pytest.raises(ValueError, match="bytes"):
        Dataset(PICTURES[..., None] / 255, LABELS, ("a", "b", "c"))


def test_labels_may_be_attributes() -> None:
    flags = np.array([[0, 1], [1, 1], [0, 0], [1, 0], [0, 1]], np.int32)
    found = Dataset(PICTURES[..., None], flags, ("glasses", "hat"))
    assert found.has_attributes
    np.testing.assert_array_equal(found.take(np.array([3, 0])).labels, flags[[3, 0]])
    assert not Dataset(PICTURES[..., None], LABELS, ("a", "b", "c")).has_attributes
    for labels, complaint in (
        (2 * flags, "0 or 1"),
        (flags - 1, "0 or 1"),
        (flags[:, :1], "1 labels an image for 2 attributes"),
        (flags[:4], r"5 images, but labels \(4, 2\)"),
        (flags[..., None], r"\(5, 2, 1\)"),
    ):
        with pytest.raises(ValueError, match=complaint):
            Dataset(PICTURES[..., None], labels, ("glasses", "hat"))
    with pytest.raises(ValueError, match="0 labels"):
        Dataset(PICTURES[..., None], flags[:, :0], ())


def test_idx_files_have_two_splits(tmp_path: Path) -> None:
    write(tmp_path, split="t10k")
    with pytest.raises(ValueError, match="train and test, not validation"):
        data.Source("idx", str(tmp_path)).load("validation", 28)


def test_fashion_mnist_is_looked_for_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, environment, system, cache = (tmp_path / name for name in ("g", "e", "s", "c"))
    monkeypatch.setattr(data, "_PLACES", (system, cache))
    monkeypatch.setenv(data.ENVIRONMENT, str(environment))
    with pytest.raises(ValueError, match="make data") as missing:
        data.fashion_mnist_folder()
    assert str(environment) in str(missing.value)
    monkeypatch.delenv(data.ENVIRONMENT)
    for place in (cache, system, environment / "fashion-mnist", given):
        place.mkdir(parents=True)
        write(place, end=".gz")
        if place.name == "fashion-mnist":
            monkeypatch.setenv(data.ENVIRONMENT, str(environment))
        chosen = data.fashion_mnist_folder(given if place == given else None)
        assert chosen == place
    assert data.fashion_mnist("train", given).classes[0] == "T-shirt/top"


def test_the_real_fashion_mnist() -> None:
    """Counts and first labels of its README; the mean that everyone quotes."""
    try:
        data.fashion_mnist_folder()
    except ValueError as error:
        pytest.skip(str(error))
    train, test = data.fashion_mnist("train"), data.fashion_mnist("test")
    assert train.images.shape == (60_000, 28, 28, 1)
    assert test.images.shape == (10_000, 28, 28, 1)
    assert [train.classes[i] for i in train.labels[:2]] == ["ankle boot", "T-shirt/top"]
    assert (np.bincount(train.labels) == 6000).all()
    assert (np.bincount(test.labels) == 1000).all()
    assert train.images.mean() / 255 == pytest.approx(0.2860, abs=5e-5)


# --- NumPy's files -------------------------------------------------------------------------------

COLOUR = RNG.integers(0, 256, (5, 4, 3, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("images", [COLOUR, np.asfortranarray(COLOUR), PICTURES])
def test_arrays_are_what_was_written(tmp_path: Path, save: Any, images: np.ndarray) -> None:
    path = tmp_path / "train.npz"
    save(path, images=images, labels=LABELS.astype(">i8"), classes=["cat", "dog", "größer"])
    found = data.arrays(path)
    np.testing.assert_array_equal(found.images, images.reshape(5, 4, 3, -1))
    np.testing.assert_array_equal(found.labels, LABELS)
    assert found.labels.dtype == np.int32
    assert found.images.flags.c_contiguous
    assert found.classes == ("cat", "dog", "größer")


def test_arrays_of_attributes_and_without_names(tmp_path: Path) -> None:
    path = tmp_path / "train.npz"
    flags = RNG.integers(0, 2, (5, 3)) > 0
    np.savez(path, images=COLOUR, labels=flags)
    found = data.arrays(path)
    np.testing.assert_array_equal(found.labels, flags)
    assert (found.labels.dtype, found.classes) == (np.int32, ("0", "1", "2"))
    np.savez(path, images=COLOUR, labels=flags[:, :1], classes=["hat"])
    assert data.arrays(path).has_attributes
    np.savez(path, images=COLOUR, labels=np.eye(2, dtype=int)[LABELS % 2], classes=["on", "off"])
    assert data.arrays(path).has_attributes
    np.savez(path, images=COLOUR, labels=LABELS)
    assert data.arrays(path).classes == ("0", "1", "2")


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_header(descr: str, shape: Any, version: tuple[int, int] = (1, 0)) -> bytes:
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text


HOSTILE_ARRAYS: dict[str, tuple[dict[str, bytes], str]] = {
    "no images": ({"images": b""}, "no array called images"),
    "objects": ({"labels": npy(np.array([{}] * 5))}, "labels cannot be object"),
    "other names": ({"images": b"", "x": npy(COLOUR)}, "no array called images, but labels, x"),
    "floats": (
        {"images": npy(COLOUR / 255)},
        r"images cannot be float64 .*numbers from 0 to 1 .*np\.rint\(255",
    ),
    "wide": ({"images": npy(COLOUR.astype(np.uint16))}, r"must be bytes.*astype\(np\.uint8\)"),
    "integers": ({"images": npy(COLOUR.astype(int))}, r"cannot be int64.*astype\(np\.uint8\)"),
    "bits": ({"images": npy(COLOUR > 9)}, r"cannot be bool.*np\.uint8\(255 \* images\)"),
    "rank": (
        {"images": npy(COLOUR[0, 0])},
        r"images cannot be uint8 \(3, 3\): save images\.reshape",
    ),
    "of many sizes": ({"images": npy(np.array([{}] * 5))}, r"object .*np\.stack\(images\)"),
    "channels first": (
        {"images": npy(np.zeros((5, 3, 16, 24), np.uint8))},
        r"\(5, 3, 16, 24\) look as if channels came first.*transpose\(0, 2, 3, 1\)",
    ),
    "gray channels first": ({"images": npy(np.zeros((5, 1, 9, 9), np.uint8))}, "channels came"),
    "counted last": (
        {"images": npy(np.zeros((9, 8, 3, 5), np.uint8))},
        r"images were counted last: save images\.transpose\(3, 0, 1, 2\)",
    ),
    "one-hot labels": ({"labels": npy(np.eye(3, dtype=int)[LABELS])}, r"labels\.argmax\(1\)"),
    "two one-hot": ({"labels": npy(np.eye(2, dtype=int)[LABELS % 2])}, r"labels\.argmax\(1\)"),
    "one-hot truths": ({"labels": npy(np.eye(3)[LABELS] > 0)}, r"labels\.argmax\(1\)"),
    "labels in a column": ({"labels": npy(LABELS[:, None])}, r"save labels\[:, 0\]"),
    "binary labels in a column": ({"labels": npy(LABELS[:, None] % 2)}, r"save labels\[:, 0\]"),
    "labels of floats": ({"labels": npy(LABELS / 1)}, r"float64 .*labels\.astype\(np\.int64\)"),
    "labels of text": ({"labels": npy(LABELS.astype(str))}, "save numbers from 0 on"),
    "names of objects": (
        {"classes": npy(np.array(["a", "b", "c"], object))},
        r"classes cannot be object .*np\.array\(\[str\(name\)",
    ),
    "cut": ({"images": npy(COLOUR)[:-1]}, "ends before the images"),
    "long": ({"images": npy(COLOUR) + b"0"}, "goes on after the images"),
    "the moon": ({"images": npy_header("|u1", (2**20,) * 4)}, "promises"),
    "negative": ({"images": npy_header("|u1", (-5, -4, 3, 3))}, "promises"),
    "overflow": ({"images": npy_header("|u1", (0, 2**62, 2**62))}, "promises"),
    "long header": ({"images": npy_header("|u1", (5, 4, 3), version=(2, 0))}, "no version"),
    "no header": ({"images": b"rubbish"}, "magic|EOF"),
    "code": ({"images": npy_header("|u1", "__import__('os')")}, "images|shape"),
    "names of no length": ({"classes": npy_header("<U0", (2**40,))}, "classes cannot be"),
    "names of bytes": ({"classes": npy(np.array([b"a", b"b", b"c"]))}, r"np\.char\.decode\(c"),
    "names with lines": ({"classes": npy(np.array(["a", "b\nc", "d"]))}, "printable"),
    "too few names": ({"classes": npy(np.array(["a", "b"]))}, "0 to 2 for 2 classes"),
    "label of billions": ({"labels": npy(np.full(5, 2**31 - 1))}, "2147483647 need names"),
    "negative labels": ({"labels": npy(np.full(5, -1))}, "labels -1 to -1"),
    "wrapping labels": (
        {"labels": npy(np.full(5, 2**32)), "classes": npy(np.array(["a"]))},
        "number no classes",
    ),
    "fewer labels": ({"labels": npy(LABELS[:4])}, "5 images"),
}


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("kind", HOSTILE_ARRAYS)
def test_hostile_arrays_are_named_and_refused(tmp_path: Path, kind: str, deflated: bool) -> None:
    change, complaint = HOSTILE_ARRAYS[kind]
    members = {"images": npy(COLOUR), "labels": npy(LABELS)} | change
    path = tmp_path / "train.npz"
    method = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            if content:
                archive.writestr(f"{name}.npy", content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"train\.npz holds no data set: .*({complaint})"):
            data.arrays(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("damage", ["cut", "flipped", "rubbish", "gone"])
def test_damaged_archives_are_named_and_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "test.npz"
    np.savez(path, images=COLOUR, labels=LABELS)
    whole = path.read_bytes()
    place = whole.index(COLOUR.tobytes())
    changed = whole[:place] + bytes((whole[place] ^ 1,)) + whole[place + 1 :]
    path.write_bytes({"cut": whole[:-30], "flipped": changed}.get(damage, b"rubbish"))
    if damage == "gone":
        path.unlink()
    with pytest.raises(ValueError, match=r"test\.npz holds no data set"):
        data.arrays(path)


def test_archives_do_not_unpack_without_end(tmp_path: Path) -> None:
    """100 MB of zeros behind a header that promises 180 bytes; a method NumPy does not use."""
    path = tmp_path / "train.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.npy", npy(LABELS))
        archive.writestr("images.npy", npy(COLOUR) + bytes(100_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="goes on after"):
            data.arrays(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("labels.npy", npy(LABELS))
    with pytest.raises(ValueError, match="labels is compressed as NumPy does not"):
        data.arrays(path)


# --- TensorFlow Datasets -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tfds() -> ModuleType:
    return pytest.importorskip("tensorflow_datasets")


def png(pixels: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.seek(0)
    return file


FACES = [RNG.integers(0, 256, (40 + i, 30, 3), np.uint8) for i in range(5)]


@pytest.fixture(scope="session")
def prepared(tfds: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets as array_record: gray squares of 8 px, colour of several sizes."""

    class JinvDigits(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            label = tfds.features.ClassLabel(names=["zero", "one"])
            pictures = tfds.features.Image(shape=(8, 8, 1))
            features = tfds.features.FeaturesDict({"image": pictures, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples(6), "test": self._generate_examples(4)}

        def _generate_examples(self, count: int) -> Any:
            for i in range(count):
                pixels = np.full((8, 8), 10 * i, np.uint8)
                yield i, {"image": png(pixels), "label": i % 2}

    class JinvFaces(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict(
                {
                    "picture": tfds.features.Image(shape=(None, None, 3)),
                    "attributes": {"Smiling": np.bool_, "Bald": np.bool_},
                    "identity": {"Identity_No": np.int64},
                    "person": tfds.features.Text(),
                    "box": tfds.features.Tensor(shape=(4,), dtype=np.int64),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples(), "validation": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for i, pixels in enumerate(FACES):
                yield (
                    i,
                    {
                        "picture": png(pixels),
                        "attributes": {"Smiling": i > 2, "Bald": i == 0},
                        "identity": {"Identity_No": (7, 30, 7, 200, 30)[i]},
                        "person": ("Zoë", "Ada", "Zoë", "Bo", "Ada")[i],
                        "box": np.arange(4),
                    },
                )

    folder = tmp_path_factory.mktemp("tfds")
    for builder in (JinvDigits, JinvFaces):
        made = builder(data_dir=str(folder), file_format="array_record")
        made.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return folder


def ordered(found: Dataset) -> Dataset:
    """By brightness: tfds shuffles what it prepares."""
    return found.take(np.argsort(found.images.mean((1, 2, 3)), kind="stable"))


def test_tfds_reads_what_was_prepared(prepared: Path) -> None:
    source = data.Source("tfds", str(prepared), "jinv_digits")
    found = ordered(source.load("train", 8))
    expected = np.broadcast_to(10 * np.arange(6)[:, None, None, None], (6, 8, 8, 1))
    np.testing.assert_array_equal(found.images, expected)
    np.testing.assert_array_equal(found.labels, [0, 1, 0, 1, 0, 1])
    assert found.classes == ("zero", "one")
    assert (found.images.dtype, found.labels.dtype) == (np.uint8, np.int32)
    assert len(source.load("test", 8)) == 4
    assert source.load("test", 12).images.shape == (4, 12, 12, 1)
    some = data.Source(
        "tfds", str(prepared), "jinv_digits", splits={"test": "train[:2]", "train": "train[2:]"}
    )
    assert (len(some.load("train", 8)), len(some.load("test", 8))) == (4, 2)


def test_tfds_comes_to_size_as_other_pictures(prepared: Path, tmp_path: Path) -> None:
    source = data.Source("tfds", str(prepared), "jinv_faces", image="picture", label="person")
    for i, pixels in enumerate(FACES):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    files = sorted(tmp_path.iterdir())
    for size in (16, (16, 12), (40, 30)):
        found = ordered(source.load("validation", size))
        expected = data.image_files(files, size)
        order = np.argsort(expected.mean((1, 2, 3)), kind="stable")
        np.testing.assert_array_equal(found.images, expected[order])
    np.testing.assert_array_equal(expected[0], FACES[0])  # of 40 x 30 px already
    assert source.load("train", (16, 24)).images.shape == (5, 16, 24, 3)


def test_tfds_labels_of_every_kind(prepared: Path) -> None:
    def load(label: str) -> Dataset:
        source = data.Source("tfds", str(prepared), "jinv_faces", image="picture", label=label)
        return source.load("train", 16)

    attributes, numbers, texts = (load(key) for key in ("attributes", "identity", "person"))
    assert (attributes.classes, attributes.labels.dtype) == (("Bald", "Smiling"), np.int32)
    np.testing.assert_array_equal(attributes.labels.sum(0), [1, 2])
    assert numbers.classes == ("7", "30", "200")
    assert texts.classes == ("Ada", "Bo", "Zoë")
    # The same order of examples each time: 7 is Zoë, 30 Ada, 200 Bo.
    np.testing.assert_array_equal(np.array([2, 0, 1])[numbers.labels], texts.labels)
    smiling = attributes.labels[:, 1] == 1
    assert sorted(texts.labels[smiling]) == [0, 1]


def test_tfds_mistakes_are_named(prepared: Path) -> None:
    def refused(complaint: str, split: data.Split = "train", **change: Any) -> None:
        settings = {"name": "jinv_digits", "folder": str(prepared), **change}
        with pytest.raises(ValueError, match=complaint):
            data.Source("tfds", **settings).load(split, 8)

    refused("jinv_digits, split validation", split="validation")
    refused("no feature 'labels'; there are: .*label", label="labels")
    refused("no feature 'picture'", image="picture")
    refused("'label' of jinv_digits is no image", image="label", label="image")
    refused("is no image", name="jinv_faces", image="attributes", label="person")
    refused("one value", name="jinv_faces", image="picture", label="box")
    refused("nonesuch.*not found", name="nonesuch")


def test_tfds_never_downloads(tfds: ModuleType, tmp_path: Path) -> None:
    """Unprepared data is refused at once, with the way to prepare it."""
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"cifar10 is not prepared in .*array_record.*prepare"):
        data.Source("tfds", str(tmp_path), "cifar10").load("train", 32)
    assert time.monotonic() - began < 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [("cifar10", (4, 32, 32, 3), 10), ("mnist", (4, 32, 32, 1), 10), ("celeb_a", None, 40)],
)
def test_tfds_of_the_catalogue(
    name: str, shape: tuple[int, ...] | None, classes: int, tfds: ModuleType
) -> None:
    label = "label" if shape else "attributes"
    with tfds.testing.mock_data(num_examples=4):
        found = data.Source("tfds", name=name, label=label).load("train", 32)
    assert found.images.shape == (shape or (4, 32, 32, 3))
    assert len(found.classes) == classes
    assert found.has_attributes == (shape is None)


def test_tfds_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'jinv\[tfds\]'"):
        data.Source("tfds", name="cifar10").load("train", 32)


# --- pictures ------------------------------------------------------------------------------------


def picture(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    channels = (255 * x / (width - 1), 255 * y / (height - 1), np.full_like(x, 90.0))
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def test_pictures_are_centre_squares(tmp_path: Path) -> None:
    """The square of side int(S / (S + 32) min(w, h)), resized bicubic by Pillow itself."""
    paths = [tmp_path / "wide.png", tmp_path / "tall.png"]
    sizes = [(90, 60), (70, 80)]
    for path, size in zip(paths, sizes, strict=True):
        picture(*size).save(path)
    found = data.image_files(paths, 24)
    assert found.shape == (2, 24, 24, 3)
    assert found.dtype == np.uint8
    for one, (width, height) in zip(found, sizes, strict=True):
        side = int(24 / 56 * min(width, height))
        left, top = math.ceil((width - side) / 2), math.ceil((height - side) / 2)
        square = picture(width, height).crop((left, top, left + side, top + side))
        expected = square.resize((24, 24), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(one, np.asarray(expected))


@pytest.mark.parametrize("size", [28, 32, 64, 224, (16, 24)])
def test_pictures_of_the_size_come_back_bit_for_bit(tmp_path: Path, size: Any) -> None:
    """In every reader of files; the tests of tfds do the same."""
    pixels = RNG.integers(0, 256, (*image.sides(size), 3), np.uint8)
    (tmp_path / "a").mkdir()
    for suffix in ("png", "bmp", "ppm", "tif"):
        Image.fromarray(pixels).save(tmp_path / "a" / f"0.{suffix}")
    for found in (
        data.image_files(sorted((tmp_path / "a").iterdir()), size),
        data.image_folder(tmp_path, size).images,
    ):
        np.testing.assert_array_equal(found, np.broadcast_to(pixels, (4, *pixels.shape)))
    found = data.image_files(str(tmp_path / "a" / "0.png"), size)  # one path is a list of one
    np.testing.assert_array_equal(found[0], pixels)


def sixteen_bits(folder: Path, values: np.ndarray) -> dict[str, Path]:
    """A gray picture of 16 bits in every format that has them, TIFF's white-is-zero among them."""
    paths = {kind: folder / f"deep_{kind}" for kind in ("png", "tif", "pgm", "zero.tif")}
    Image.fromarray(values).save(paths["png"], "PNG")
    Image.fromarray(values.astype(">u2")).save(paths["tif"], "TIFF")
    Image.fromarray(65535 - values).save(paths["zero.tif"], "TIFF", tiffinfo={262: 0})
    header = f"P5\n{values.shape[1]} {values.shape[0]}\n65535\n".encode()
    paths["pgm"].write_bytes(header + values.astype(">u2").tobytes())
    return paths


def test_pictures_are_read_as_a_networks_preprocessing_says(tmp_path: Path) -> None:
    """Its size, resizing and interpolation; bytes are RGB whatever the network takes."""
    picture(90, 60).save(tmp_path / "a.png")
    space = Preprocessing(24, 0.5, 0.5, resize=30, interpolation="bilinear")
    found = data.image_files([tmp_path / "a.png"], space)
    colours = dataclasses.replace(space, mean=(0.5,) * 3, std=(0.5,) * 3)
    expected = image.to_bytes(image.centre_crop(picture(90, 60), colours))
    np.testing.assert_array_equal(found[0], expected)
    assert not np.array_equal(found, data.image_files([tmp_path / "a.png"], 24))


def test_picture_files_of_folders(tmp_path: Path) -> None:
    """Sorted, a folder's own before those below; what is hidden or no picture is left alone."""
    for name in ("b/2.JPG", "b/1.png", "a.png", ".hidden/x.png", "b/deep/er/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(9, 9).save(tmp_path / name, "PNG")
    (tmp_path / "readme.md").write_text("not a picture")
    names = ["a.png", "b/1.png", "b/2.JPG", "b/deep/er/3.png"]
    files = [tmp_path / name for name in names]
    assert data.picture_files([tmp_path]) == files
    given = [tmp_path / "gone.png", tmp_path / "b", tmp_path / "a.png"]
    assert data.picture_files(given) == [given[0], *files[1:], files[0]]
    assert data.picture_files(["package:skimage/data/chelsea.png"])[0].is_file()
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    assert len(data.picture_files([tmp_path])) == 7
    picture(9, 9).save(tmp_path / "b" / "called.txt", "PNG")
    with pytest.raises(ValueError, match=r"called.txt is a picture, but is not called one"):
        data.picture_files([tmp_path])


def test_pictures_of_every_kind(tmp_path: Path) -> None:
    """Of 8 px, wanted at 8: what is read is known pixel by pixel."""
    rgb = RNG.integers(0, 256, (8, 8, 3), np.uint8)

    def read(path: Path) -> np.ndarray:
        return data.image_files([path], 8)[0].astype(int)

    values = RNG.integers(0, 65536, (8, 8)).astype(np.uint16)
    for path in sixteen_bits(tmp_path, values).values():
        np.testing.assert_array_equal(read(path)[..., 1], np.rint(values / 257))
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "ink.tif")
    np.testing.assert_array_equal(read(tmp_path / "ink.tif"), rgb)
    # Adobe's inverted inks, which Pillow writes too; JPEG rounds.
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "ink.jpg", quality=100)
    np.testing.assert_allclose(read(tmp_path / "ink.jpg"), rgb, atol=3)
    few = Image.fromarray(rgb).quantize(8)
    few.save(tmp_path / "palette.gif", transparency=5)
    seen = np.asarray(few.convert("RGB")).copy()
    seen[np.asarray(few) == 5] = 255
    np.testing.assert_array_equal(read(tmp_path / "palette.gif"), seen)
    bits = rgb[..., 0] > 99
    Image.fromarray(bits).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read(tmp_path / "bits.png")[..., 2], 255 * bits)
    frames = [Image.new("RGB", (8, 8), (value,) * 3) for value in (10, 200)]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        how: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        path = tmp_path / f"moving.{kind}"
        frames[0].save(path, kind, save_all=True, append_images=frames[1:], **how)
        assert (read(path) == 10).all()
    Image.fromarray(rgb).save(tmp_path / "wrong.jpg", "PNG")  # told by content, not by name
    np.testing.assert_array_equal(read(tmp_path / "wrong.jpg"), rgb)


def test_pictures_stand_upright(tmp_path: Path) -> None:
    """EXIF orientation 6: the camera was turned; rotate a quarter clockwise to see it right."""
    turned, upright = tmp_path / "turned.png", tmp_path / "upright.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(90, 60).save(turned, exif=exif)
    picture(90, 60).transpose(Image.Transpose.ROTATE_270).save(upright)
    one, two = data.image_files([turned, upright], 32)
    np.testing.assert_array_equal(one, two)
    one, two = data.image_files([turned, upright], (90, 60))
    np.testing.assert_array_equal(one, two)
    for suffix in ("tif", "webp", "jpg"):
        picture(90, 60).save(tmp_path / f"turned.{suffix}", exif=exif, quality=100)
        one = data.image_files([tmp_path / f"turned.{suffix}"], (90, 60))[0]
        assert np.abs(one.astype(int) - two).mean() < 2


def test_bad_pictures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, complaint: str) -> None:
        with pytest.raises(ValueError, match=rf"cannot read the picture .*{name}: .*{complaint}"):
            data.image_files([tmp_path / name], 32)

    refused("gone.png", "No such file")
    (tmp_path / "text.png").write_text("no picture")
    refused("text.png", "cannot identify")
    picture(90, 60).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    refused("cut.png", "")
    Image.fromarray(np.full((40, 40), 40_000, np.int32)).save(tmp_path / "deep.tif")
    refused("deep.tif", "save it as 8-bit")
    Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(tmp_path / "float.tif")
    refused("float.tif", "save it as 8-bit")
    (tmp_path / "empty.jpg").write_bytes(b"")
    refused("empty.jpg", "it is empty")
    for suffix in ("jpg", "gif", "tif", "webp", "pgm"):
        Image.fromarray(RNG.integers(0, 256, (64, 64), np.uint8)).save(tmp_path / f"a.{suffix}")
        whole_file = (tmp_path / f"a.{suffix}").read_bytes()
        (tmp_path / f"a.{suffix}").write_bytes(whole_file[: len(whole_file) // 2])
        refused(f"a.{suffix}", "")
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n")
    refused("program.eps", "cannot identify")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused("good.png", "5400 pixels")
    with pytest.raises(ValueError, match="no picture files"):
        data.image_files([], 32)


def test_a_folder_of_classes(tmp_path: Path) -> None:
    for name, count in (("dog", 2), ("cat", 1), (".hidden", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            picture(40 + i, 40).save(tmp_path / name / f"{i}.JPG", "JPEG")
    (tmp_path / "dog" / "notes.txt").write_text("not a picture")
    (tmp_path / "readme.md").write_text("nor this")
    found = data.image_folder(tmp_path, 16)
    assert found.classes == ("cat", "dog")
    np.testing.assert_array_equal(found.labels, [0, 1, 1])
    paths = [tmp_path / "cat/0.JPG", tmp_path / "dog/0.JPG", tmp_path / "dog/1.JPG"]
    np.testing.assert_array_equal(found.images, data.image_files(paths, 16))
    listed = data.labelled_files(tmp_path)
    assert (listed.files, listed.classes) == (paths, found.classes)
    np.testing.assert_array_equal(listed.labels, found.labels)

    with pytest.raises(ValueError, match="gone"):
        data.image_folder(tmp_path / "gone", 16)


def classes_of(folder: Path, *names: str) -> Path:
    """A folder of classes with a picture in each."""
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("L", (16, 16), 70).save(folder / name / "0.png")
    return folder


def test_what_systems_leave_in_folders_is_left_alone(tmp_path: Path) -> None:
    classes_of(tmp_path, "a", "b", ".ipynb_checkpoints")
    (tmp_path / "__MACOSX" / "a").mkdir(parents=True)
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "labels.csv", ".hidden.jpg"):
        (tmp_path / "a" / name).write_bytes(b"\0\5\x16\7")
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "a" / "@eaDir").mkdir()
    (tmp_path / "a" / "empty").mkdir()
    found = data.image_folder(tmp_path, 16)
    assert found.classes == ("a", "b")
    assert found.images.shape == (2, 16, 16, 3)


@pytest.mark.parametrize("name", ["1.pgm", "1.PNM", "1.TIF", "1.JPEG", "1.pbm", "1.jfif", "1.apng"])
def test_pictures_of_every_suffix_are_read(tmp_path: Path, name: str) -> None:
    classes_of(tmp_path, "a", "b")
    kind = data._FORMATS[Path(name).suffix.lower()]
    Image.new("1" if name.endswith("pbm") else "L", (16, 16), 255).save(tmp_path / "a" / name, kind)
    found = data.image_folder(tmp_path, 16)
    np.testing.assert_array_equal(found.labels, [0, 0, 1])
    assert (found.images[1] == 255).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/1.heic", r"a/1\.heic is of a format that is not read"),
        ("a/1.AVIF", r"a/1\.AVIF is of a format that is not read"),
        ("b/1.svg", r"b/1\.svg is of a format that is not read"),
        ("a/scan", r"a/scan is a picture, but is not called one"),
        ("a/0.png.bak", r"0\.png\.bak is a picture, but is not called one"),
        ("top.png", r"top\.png belongs to no class.* a, b; move it"),
        ("a/deeper/1.png", r"a/deeper is a folder inside of the class a: pictures are wanted as"),
        ("c/readme.txt", r"c holds no pictures \(\.jpg.*one of a class; remove it"),
        ("a/text.png", r"cannot read the picture .*text\.png: cannot identify it as any of BMP"),
    ],
)
def test_pictures_are_read_or_named(tmp_path: Path, name: str, message: str) -> None:
    classes_of(tmp_path, "a", "b")
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = not name.endswith(("txt", "text.png", "svg", "heic"))
    path.write_bytes((tmp_path / "a" / "0.png").read_bytes() if kept else b"text")
    with pytest.raises(ValueError, match=message):
        data.image_folder(tmp_path, 16)


def test_a_folder_without_classes(tmp_path: Path) -> None:
    classes_of(tmp_path, ".net")
    with pytest.raises(ValueError, match=r"no subfolders, but for \.net: hidden ones"):
        data.image_folder(tmp_path, 16)
    with pytest.raises(ValueError, match="holds no subfolders: one with pictures"):
        data.image_folder(tmp_path / ".net", 16)
    classes_of(tmp_path, "val/a", "train/a")
    with pytest.raises(
        ValueError, match=r"no folder test .* but train, val; `splits: {test: NAME}"
    ):
        data.Source("images", str(tmp_path)).load("test", 16)
    source = data.Source("images", str(tmp_path), splits={"test": "val"})
    assert source.load("test", 16).classes == ("a",)


def test_paths_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    classes_of(tmp_path / "pictures", "test/a", "train/a")
    assert data.image_files(["~/pictures/test/a/0.png"], 16).shape == (1, 16, 16, 3)
    assert len(data.image_folder("~/pictures/test", 16)) == 1
    assert len(data.Source("images", "~/pictures").load("test", 16)) == 1
    np.savez(tmp_path / "test.npz", images=COLOUR, labels=LABELS)
    assert len(data.arrays("~/test.npz")) == 5
    assert len(data.Source("arrays", "~").load("test", 16)) == 5
    write(tmp_path)
    assert len(data.idx("~", "train")) == 5
    assert data.fashion_mnist_folder("~") == tmp_path
    monkeypatch.setenv(data.ENVIRONMENT, "~")
    assert data.fashion_mnist_folder() == tmp_path
    (tmp_path / "names.txt").write_text("a\nb\n")
    assert data.class_names(2, "~/names.txt") == ["a", "b"]
    with pytest.raises(ValueError, match=rf"{tmp_path}/gone\.png: .*No such file"):
        data.image_files(["~/gone.png"], 16)
    with pytest.raises(ValueError, match="~nobody_of_this_name"):
        data.image_files(["~nobody_of_this_name/a.png"], 16)


def test_sources(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            picture(50, 50).save(tmp_path / split / name / "0.png")
    found = data.Source("images", str(tmp_path)).load("test", 20)
    assert found.images.shape == (2, 20, 20, 3)
    write(tmp_path, prefix="emnist-digits-")
    source = data.Source("idx", str(tmp_path), "emnist-digits", transposed=True)
    assert source.load("train", 99).images.shape == (5, 3, 4, 1)
    with pytest.raises(ValueError, match="needs its folder"):
        data.Source("idx")
    with pytest.raises(ValueError, match="transposed"):
        data.Source(transposed=True)
    (tmp_path / "test").rename(tmp_path / "val")
    renamed = data.Source("images", str(tmp_path), splits={"test": "val"})
    np.testing.assert_array_equal(renamed.load("test", 20).images, found.images)
    np.savez(tmp_path / "test.npz", images=COLOUR, labels=LABELS)
    assert len(data.Source("arrays", str(tmp_path)).load("test", 99)) == 5
    with pytest.raises(ValueError, match="size must be positive whole numbers"):
        renamed.check_size(0)
    for mistake, complaint in (
        ({"format": "arrays"}, "needs its folder"),
        ({"format": "tfds"}, "needs its name"),
        ({"format": "images", "folder": "x", "name": "y"}, "name belongs"),
        ({"format": "arrays", "folder": "x", "label": "y"}, "image and label"),
        ({"format": "idx", "folder": "x", "splits": {"test": "val"}}, "splits belongs"),
        (
            {"format": "arrays", "folder": "x", "splits": {"val": "test"}},
            "a key of splits must be one of train, .* not 'val'",
        ),
    ):
        with pytest.raises(ValueError, match=complaint):
            data.Source(**mistake)


def test_bytes_become_normalised_images() -> None:
    """Gray as equal channels; 0 and 255 are black and white."""
    space = image.Preprocessing(size=2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.25))
    gray = np.array([0, 51, 255, 102], np.uint8).reshape(1, 2, 2, 1)
    found = np.asarray(image.from_bytes(gray, space))
    pixels = np.repeat(gray / 255, 3, -1)
    np.testing.assert_allclose(found, (pixels - [0.1, 0.2, 0.3]) / [0.5, 0.4, 0.25], atol=1e-6)
    assert found.dtype == np.float32


# --- names of classes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "classes", "names", "expected", "how"),
    [
        (("b", "c"), 3, ("a", "b", "c"), [1, 2], "name"),
        (("T-shirt_top", "Ankle Boot"), 10, data.FASHION_MNIST, [0, 9], "name"),
        (("a", "A"), 62, data.EMNIST["emnist-byclass"], [36, 10], "name"),
        # A network that was trained on folders called like numbers: they are sorted as texts.
        (("2", "10"), 3, ("1", "10", "2"), [2, 1], "name"),
        (("003", "1"), 4, None, [3, 1], "number"),
        (("003", "class 1", "class_002"), 4, ("a", "b", "c", "d"), [3, 1, 2], "number"),
        (("ape", "bee", "cat"), 3, None, [0, 1, 2], "order"),
    ],
)
def test_classes_are_found_in_a_network(
    found: tuple[str, ...], classes: int, names: Any, expected: list[int], how: str
) -> None:
    indices, said = data.class_indices(found, classes, names)
    assert (indices.tolist(), said) == (expected, how)


@pytest.mark.parametrize(
    ("found", "classes", "names", "message"),
    [
        (
            ("b", "catt"),
            3,
            ("a", "b", "cat"),
            r"no class of net is called 'catt' \(is it 'cat'\?\)",
        ),
        (("1", "cat"), 3, ("a", "b", "cat"), "no class of net is called '1'"),
        (("1", "2", "3"), 3, None, "a class '3', but the classes of net are numbered from 0 to 2"),
        (("1", "4"), 3, ("a", "b", "c"), "a class '4', but"),
        (("ape", "bee"), 3, None, "2 classes ape, bee cannot be found among the 3 of net"),
        (("crane",), 3, ("crane", "b", "crane"), "classes 0 and 2 of net are called 'crane'"),
        (("a b", "a_b"), 2, ("a b", "c"), "'a b' and 'a_b' are both the class 0 of net"),
        (("3", "003"), 4, None, "'3' and '003' are both the class 3 of net"),
        (("?",), 2, ("!", "a"), r"no class of net is called '\?'"),
    ],
)
def test_classes_are_not_guessed(
    found: tuple[str, ...], classes: int, names: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        data.class_indices(found, classes, names, "net")


@pytest.mark.parametrize(
    "content",
    [
        b"cat\ndog",
        b"cat\ndog\n",
        b"\xef\xbb\xbfcat\ndog\n",
        b"\xef\xbb\xbfcat\r\ndog\r\n\r\n",
        b"cat\rdog\r",
        b" cat \n\tdog\n\n \n",
    ],
)
def test_names_of_classes(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    assert data.class_names(2, file) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat\ndog\n".encode("utf-16"), "looks like UTF-16: save it as UTF-8"),
        ("cat\ndog\n".encode("utf-16-be"), "looks like UTF-16"),
        ("Bär\nKuh\n".encode("latin-1"), "is not UTF-8"),
        (b"cat\n\ndog\n", "line 2 must be a printable name, not ''"),
        (b"cat\n\x1b[31mdog\n", "line 2 must be"),
        (b"a\nb\nc\n", "names 3 classes; the network has 2: set `classes: 3` beside"),
        (b"", "names 0 classes; .*or give a file of 2 names"),
    ],
)
def test_names_that_cannot_be_read_are_told(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"names\.txt.*{message}"):
        data.class_names(2, file)
    with pytest.raises(ValueError, match=r"cannot read class names from .*directory"):
        data.class_names(2, tmp_path)
