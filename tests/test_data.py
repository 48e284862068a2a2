"""IDX files and folders of pictures: what is read, and what is refused."""

from __future__ import annotations

import gzip
import math
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jinv import data, image
from jinv.data import Dataset

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


# --- pictures ------------------------------------------------------------------------------------


def picture(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    channels = (255 * x / (width - 1), 255 * y / (height - 1), np.full_like(x, 90.0))
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def test_pictures_are_centre_squares(tmp_path: Path) -> None:
    """The square of side int(S / (S + 32) min(w, h)), resized bicubic by Pillow itself."""
    paths = [tmp_path / "wide.png", tmp_path / "tall.png"]
    sizes = [(90, 60), (50, 80)]
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


def test_pictures_stand_upright(tmp_path: Path) -> None:
    """EXIF orientation 6: the camera was turned; rotate a quarter clockwise to see it right."""
    turned, upright = tmp_path / "turned.png", tmp_path / "upright.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(90, 60).save(turned, exif=exif)
    picture(90, 60).transpose(Image.Transpose.ROTATE_270).save(upright)
    one, two = data.image_files([turned, upright], 32)
    np.testing.assert_array_equal(one, two)


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
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(tmp_path / "deep.png")
    refused("deep.png", "8-bit")
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

    (tmp_path / "bird").mkdir()
    with pytest.raises(ValueError, match=r"bird holds no pictures"):
        data.image_folder(tmp_path, 16)
    with pytest.raises(ValueError, match="no subfolders"):
        data.image_folder(tmp_path / "dog", 16)
    with pytest.raises(ValueError, match="gone"):
        data.image_folder(tmp_path / "gone", 16)


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


def test_bytes_become_normalised_images() -> None:
    """Gray as equal channels; 0 and 255 are black and white."""
    space = image.Preprocessing(size=2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.25))
    gray = np.array([0, 51, 255, 102], np.uint8).reshape(1, 2, 2, 1)
    found = np.asarray(image.from_bytes(gray, space))
    pixels = np.repeat(gray / 255, 3, -1)
    np.testing.assert_allclose(found, (pixels - [0.1, 0.2, 0.3]) / [0.5, 0.4, 0.25], atol=1e-6)
    assert found.dtype == np.float32
