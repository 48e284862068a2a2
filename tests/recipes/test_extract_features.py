"""Deep features: against the network itself, in folders, and through their command."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import test_pretrain
import yaml
from PIL import Image

import tiny
from jinv import data, image, models, optimise, parallel
from jinv.data import Dataset
from jinv.image import Preprocessing
from jinv.net import Net
from jinv.recipes import extract_features
from jinv.runs import command_line, signals
from jinv.shadow import features
from jinv.shadow.features import Features

SUMMARY_KEYS = {
    *("network", "data", "classes", "preprocessing", "device", "features", "image", "images"),
    *("fingerprint", "seconds", "seconds_per_step", "compile_seconds", "versions"),
}
MESH = parallel.mesh(parallel.BATCH, jax.devices()[:1])


def dataset(count: int = 11, size: int = 16, channels: int = 3) -> Dataset:
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, size, size, channels), np.uint8)
    return Dataset(images, rng.integers(0, 3, count, np.int32), ("a", "b", "c"))


def extract(net: Net, data: Dataset, **how: Any) -> Features:
    return features.extract(net, data, **{"batch": 4, "mesh": MESH, **how})


@pytest.fixture(scope="module")
def net() -> Net:
    return tiny.network(classes=3)


# --- what a network says -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "batches"), [("lenet", (4, 3, 16)), ("resnet18_cifar_slim", (3,))]
)
def test_features_are_the_networks_own(name: str, batches: tuple[int, ...]) -> None:
    """Whatever the batch: it divides the images, leaves some over, is larger than all of them."""
    own = models.load(name, None)
    space = own.preprocessing
    given = dataset(8, space.size, space.channels)
    expected = jax.jit(own)(image.from_bytes(given.images, space)).features
    assert expected is not None
    for batch in batches:
        found = extract(own, given, batch=batch)
        np.testing.assert_allclose(found.features, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.labels, given.labels)
        np.testing.assert_array_equal(found.images, given.images)
        assert found.features.dtype == np.float32
        assert (found.classes, found.network, len(found)) == (given.classes, name, 8)


def test_images_come_to_the_networks_size_as_pillow_brings_them(net: Net) -> None:
    """Up and down, bicubic and bilinear; Pillow computes in fixed point."""
    for size, way in ((7, "bicubic"), (32, "bicubic"), (7, "bilinear"), (32, "bilinear")):
        given = dataset(5, size)
        method = Image.Resampling[way.upper()]
        pillow = np.stack(
            [np.asarray(Image.fromarray(one).resize((16, 16), method)) for one in given.images]
        )
        found = extract(net, given, interpolation=way, images_size=16)
        assert found.images is not None
        apart = np.abs(found.images.astype(int) - pillow.astype(int))
        assert apart.max() <= 1, (size, way)
        assert apart.mean() < 0.01, (size, way)
        expected = extract(net, dataclasses.replace(given, images=found.images)).features
        np.testing.assert_allclose(found.features, expected, rtol=1e-5, atol=1e-6)


def test_gray_images_are_equal_channels(net: Net) -> None:
    gray = dataset(5, channels=1)
    rgb = dataclasses.replace(gray, images=gray.images.repeat(3, -1))
    one, three = extract(net, gray), extract(net, rgb)
    np.testing.assert_allclose(one.features, three.features, rtol=1e-5, atol=1e-6)
    assert one.images is not None
    assert one.images.shape == (5, 16, 16, 1)


def test_gray_networks_see_the_luma_of_colours() -> None:
    gray = tiny.network(space=dataclasses.replace(tiny.GRAY, size=(16, 24)))
    colour = dataset(5)
    luma = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in colour.images])
    expected = extract(gray, dataclasses.replace(colour, images=luma[..., None]))
    found = extract(gray, colour)
    # Resampled as colours, whose roundings differ.
    np.testing.assert_allclose(found.features, expected.features, atol=0.02)
    np.testing.assert_array_equal(found.images, colour.images)


def test_images_are_kept_at_the_size_that_is_asked_for(net: Net) -> None:
    given = dataset(5)
    own, other, none = (extract(net, given, images_size=size) for size in (None, 10, 0))
    np.testing.assert_array_equal(own.images, given.images)
    np.testing.assert_array_equal(extract(net, given, images_size=16).images, given.images)
    assert other.images is not None
    assert (other.images.shape, other.images.dtype) == ((5, 10, 10, 3), np.uint8)
    assert none.images is None
    for found in (other, none):
        np.testing.assert_array_equal(found.features, own.features)


def test_arithmetic_in_bfloat16_is_near(net: Net) -> None:
    whole, half = extract(net, dataset()), extract(net, dataset(), dtype="bfloat16")
    assert half.features.dtype == np.float32
    scale = np.abs(whole.features).max()
    assert 0 < np.abs(half.features - whole.features).max() < 0.03 * scale


def test_features_are_scaled(net: Net) -> None:
    whole, half = extract(net, dataset()), extract(net, dataset(), scale=0.5)
    np.testing.assert_array_equal(half.features, whole.features / 2)


def test_blocks_come_in_order_and_are_timed(net: Net) -> None:
    clock = optimise.Clock()
    found = list(features.blocks(net, dataset(11), batch=4, mesh=MESH, clock=clock))
    assert [block.start for block in found] == [0, 4, 8]
    assert [len(block.features) for block in found] == [4, 4, 3]
    assert clock.steps == 3
    assert min(clock.compiling, clock.stepping) > 0


def test_from_any_batch_on_the_rest_is_bit_equal(net: Net) -> None:
    whole = list(features.blocks(net, dataset(11), batch=4, mesh=MESH))
    rest = list(features.blocks(net, dataset(11), batch=4, mesh=MESH, start=8))
    assert len(rest) == 1
    np.testing.assert_array_equal(rest[0].features, whole[2].features)
    assert not list(features.blocks(net, dataset(11), batch=4, mesh=MESH, start=11))


def test_devices_share_a_batch(run_python: Any) -> None:
    """Four devices find what one does, to the last batch that they do not fill."""
    code = """
import json, sys
sys.path[:0] = ["tests", "tests/recipes"]
import jax, numpy as np
import tiny
from test_extract_features import dataset, extract
from jinv import parallel, training

one = parallel.mesh(parallel.BATCH, jax.devices()[:1])
four = training.batch_mesh(8)
net = tiny.network(classes=3)
found = [extract(net, dataset(19, 12), batch=8, mesh=mesh, images_size=9) for mesh in (one, four)]
far = float(np.abs(found[0].features - found[1].features).max())
same = bool((found[0].images == found[1].images).all())
print(json.dumps([four.size, far, same, found[1].features.shape]))
"""
    size, far, same, shape = run_python(code)
    assert size == 4
    assert far < 1e-5
    assert same
    assert shape == [19, 8]


def test_networks_and_images_that_do_not_fit(net: Net) -> None:
    with pytest.raises(ValueError, match="images of 2 channels cannot be shown to tiny"):
        extract(net, dataset(channels=2))
    gray = tiny.network(space=tiny.GRAY)
    with pytest.raises(ValueError, match=r"images of 4 channels .* which takes 1"):
        extract(gray, dataset(channels=4))
    headless = dataclasses.replace(
        net, apply=lambda variables, images: net.apply(variables, images)._replace(features=None)
    )
    with pytest.raises(ValueError, match="ends in no linear layer"):
        extract(headless, dataset())
    space = Preprocessing(size=16, mean=(0.5,) * 3, std=(1e-38,) * 3)
    with pytest.raises(ValueError, match="features of images 0 and following are not finite"):
        extract(dataclasses.replace(net, preprocessing=space), dataset())


# --- folders -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(net: Net) -> Features:
    return extract(net, dataset(), images_size=10)


def test_a_folder_gives_back_what_was_saved(tmp_path: Path, found: Features) -> None:
    found.save(tmp_path / "f")
    for verify in (True, False):
        again = features.load(tmp_path / "f", verify=verify)
        for name in ("features", "labels", "images"):
            array = getattr(again, name)
            np.testing.assert_array_equal(array, getattr(found, name))
            assert isinstance(array, np.memmap)
            assert not array.flags.writeable
        for name in ("classes", "fingerprint", "network"):
            assert getattr(again, name) == getattr(found, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f"]
    assert np.load(tmp_path / "f" / "features.npy").shape == (11, 8)
    with pytest.raises(ValueError, match="not empty"):
        found.save(tmp_path / "f")


def test_without_images(tmp_path: Path, found: Features) -> None:
    dataclasses.replace(found, images=None).save(tmp_path / "f")
    assert features.load(tmp_path / "f").images is None
    assert not (tmp_path / "f" / "images.npy").exists()


def test_attributes_are_labels_too(tmp_path: Path, found: Features) -> None:
    marks = np.random.default_rng(0).integers(0, 2, (11, 3), np.int32)
    dataclasses.replace(found, labels=marks).save(tmp_path / "f")
    np.testing.assert_array_equal(features.load(tmp_path / "f").labels, marks)


def test_the_fingerprint_tells_contents_apart(net: Net, found: Features) -> None:
    given = dataset()
    labels = given.labels.copy()
    labels[0] = (labels[0] + 1) % 3
    others = [
        extract(net, given),
        extract(net, given, images_size=10, dtype="bfloat16"),
        extract(net, dataclasses.replace(given, labels=labels), images_size=10),
        extract(net, dataclasses.replace(given, classes=("a", "b", "d")), images_size=10),
    ]
    assert len({found.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert extract(net, given, images_size=10).fingerprint == found.fingerprint


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def huge(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(11,", b"(99999999999999999999,")[: len(content)])


def objects(path: Path) -> None:
    np.save(path, np.array([{}], object), allow_pickle=True)


@pytest.mark.parametrize("name", ["features.npy", "labels.npy", "images.npy"])
@pytest.mark.parametrize("harm", [cut, longer, flipped, huge, objects, Path.unlink])
def test_damaged_files_are_named(tmp_path: Path, found: Features, name: str, harm: Any) -> None:
    found.save(tmp_path / "f")
    harm(tmp_path / "f" / name)
    with pytest.raises(ValueError, match=rf"{name} is (missing or )?damaged"):
        features.load(tmp_path / "f")
    if harm is not flipped:
        with pytest.raises(ValueError, match=rf"{name} is (missing or )?damaged"):
            features.load(tmp_path / "f", verify=False)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"a"', '"A"'), ("[\n", "[[\n"), ('"features.npy"', '"other.npy"'), ("{", "["), ("11", "12")],
)
def test_a_damaged_index_is_named(tmp_path: Path, found: Features, old: str, new: str) -> None:
    found.save(tmp_path / "f")
    index = tmp_path / "f" / "features.json"
    index.write_text(index.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=r"features\.json is missing or damaged"):
        features.load(tmp_path / "f")


def test_files_of_other_types_are_no_features(tmp_path: Path, found: Features) -> None:
    """A sound folder, fingerprint and all, with something else in it."""
    with pytest.raises(ValueError, match=r"features\.npy is float64 \(11, 8\)"):
        dataclasses.replace(found, features=found.features.astype(float))
    with pytest.raises(ValueError, match=r"labels\.npy is int32 \(10,\) for 11 images"):
        dataclasses.replace(found, labels=found.labels[:10])
    with features.Writer(tmp_path / "f", 11) as writer:
        writer.add(features.Block(0, found.features.astype(np.float16), found.labels, None))
        writer.finish(found.classes, "tiny")
    with pytest.raises(ValueError, match=r"f holds no features: features\.npy is float16"):
        features.load(tmp_path / "f")


def test_a_writer_drops_what_lies_behind_its_start(tmp_path: Path, net: Net) -> None:
    """As after a power cut: files that go on after the last checkpoint."""
    parts = list(features.blocks(net, dataset(11), batch=4, mesh=MESH))
    with features.Writer(tmp_path / "f", 11) as writer:
        writer.add(parts[0])
        writer.add(parts[2])
        writer.flush()
    assert not (tmp_path / "f").exists()
    with features.Writer(tmp_path / "f", 11, 4) as writer:
        writer.add(parts[1])
        writer.add(parts[2])
        writer.finish(("a", "b", "c"), "tiny")
    expected = extract(net, dataset(11))
    np.testing.assert_array_equal(features.load(tmp_path / "f").features, expected.features)
    assert features.load(tmp_path / "f").fingerprint == expected.fingerprint

    with features.Writer(tmp_path / "g", 11) as writer:
        writer.add(parts[0])
    for count, start in ((11, 8), (12, 4)):
        with (
            features.Writer(tmp_path / "g", count, start) as writer,
            pytest.raises(ValueError, match=r"cannot go on with .*features\.npy"),
        ):
            writer.add(parts[start // 4])


def test_a_writer_does_not_finish_what_is_not_there(tmp_path: Path, net: Net) -> None:
    parts = list(features.blocks(net, dataset(11), batch=4, mesh=MESH))
    with features.Writer(tmp_path / "f", 11) as writer:
        writer.add(parts[0])
        with pytest.raises(ValueError, match=r"features\.npy is missing or damaged: .*file size"):
            writer.finish(("a", "b", "c"), "tiny")
    (tmp_path / "f.partial" / "features.npy").unlink()
    with (
        features.Writer(tmp_path / "f", 11, 11) as writer,
        pytest.raises(ValueError, match=r"features\.npy is missing"),
    ):
        writer.finish(("a", "b", "c"), "tiny")
    assert not (tmp_path / "f").exists()


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    test_pretrain.write_idx(folder, "train", 50)
    test_pretrain.write_idx(folder, "t10k", 20)
    return write(folder, {})


def test_what_lies_where_features_are_written_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.partial holds other files"):
        features.Writer(tmp_path / "out", 3)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def write(folder: Path, change: dict[str, Any]) -> Path:
    """A recipe of seven and three batches, on the images in this folder."""
    tree: dict[str, Any] = {
        "network": {"model": "lenet", "weights": "random"},
        "data": {"format": "idx", "folder": str(folder)},
        "images_size": 12,
        "batch": 8,
    }
    path = folder / f"recipe{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(tree | change))
    return path


def run(*args: Any) -> int:
    return command_line.main(extract_features.COMMAND, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run("--config", recipe, "--out", out) == 0
    return out


def contents(out: Path) -> dict[str, bytes]:
    """All files but the summary, which tells times."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "summary.json"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_writes_what_it_promises(finished: Path, recipe: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    own = models.load("lenet", None)
    for split, count in (("train", 50), ("test", 20)):
        written = features.load(finished / split)
        images = data.idx(recipe.parent, split).images  # type: ignore[arg-type]
        expected = extract(own, Dataset(images, written.labels, written.classes), images_size=12)
        np.testing.assert_allclose(written.features, expected.features, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(written.images, expected.images)
        assert (len(written), written.classes, written.network) == (count, ("0", "1", "2"), "lenet")
        assert summary["fingerprint"][split] == written.fingerprint
        assert summary["images"][split] == count
    assert [summary["features"], summary["image"]] == [588, [12, 12, 1]]
    assert set(contents(finished)) == {
        *("config.yaml", "metrics.csv"),
        *(f"{s}/{f}" for s in ("train", "test") for f in (*features.ARRAYS, features.INDEX)),
    }


def test_a_finished_run_is_not_replaced_silently(
    finished: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert run("--config", recipe, "--out", out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("--config", recipe, "--out", out, "--resume") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run("--config", recipe, "--out", out, "--overwrite", "--images-size", 0) == 0
    assert features.load(out / "train").images is None
    assert run("--config", recipe, "--out", out, "--overwrite") == 0
    assert contents(out) == contents(finished)


@pytest.mark.parametrize("asked", [1, 7, 8, 9])
def test_stopped_and_resumed_equals_uninterrupted(
    tmp_path: Path, recipe: Path, finished: Path, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the first split, at the end of it, in the second; the very same files."""
    out, answers = tmp_path / "out", []

    def heard(self: signals.Signals) -> bool:
        answers.append(True)
        return len(answers) >= asked

    with monkeypatch.context() as patch:
        patch.setattr(signals.Signals, "__call__", heard)
        assert run("--config", recipe, "--out", out) == 143
    assert not (out / "summary.json").exists()
    assert (out / "train").exists() == (asked >= 7)
    assert run("--config", recipe, "--out", out) == 2
    assert run("--config", recipe, "--out", out, "--resume", "--batch", 4) == 2
    assert run("--config", recipe, "--out", out, "--resume") == 0
    assert contents(out) == contents(finished)


@pytest.mark.parametrize("blocks", [1, 3, 9])
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, recipe: Path, finished: Path, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word, after some batches that no checkpoint knows."""
    out, added = tmp_path / "out", []
    add = features.Writer.add

    def killed(self: features.Writer, block: features.Block) -> None:
        add(self, block)
        self.flush()
        added.append(block)
        if len(added) == blocks:
            raise SystemExit(9)

    saved = 0.0 if blocks != 3 else 1e9
    with monkeypatch.context() as patch:
        patch.setattr(extract_features, "CHECKPOINT_SECONDS", saved)
        patch.setattr(features.Writer, "add", killed)
        with pytest.raises(SystemExit):
            run("--config", recipe, "--out", out)
    assert run("--config", recipe, "--out", out, "--resume") == 0
    assert contents(out) == contents(finished)


def test_killed_before_a_folder_gets_its_name(
    tmp_path: Path, recipe: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def killed(self: features.Writer, *args: Any) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(features.Writer, "finish", killed)
        with pytest.raises(SystemExit):
            run("--config", recipe, "--out", out)
    assert not (out / "train").exists()
    assert run("--config", recipe, "--out", out, "--resume") == 0
    assert contents(out) == contents(finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": {"model": "lennet"}}, "lennet"),
        ({"network": {"model": "lenet"}}, "lenet"),
        ({"netwerk": {}}, "netwerk"),
        ({"data": {"format": "idx", "folder": "/nowhere"}}, "/nowhere"),
        ({"batch": 0}, "batch"),
        ({"images_size": -1}, "images_size"),
        ({"dtype": "float16"}, "dtype"),
        ({"size": 8}, "size belongs to data of the formats 'images'"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    tmp_path: Path,
    recipe: Path,
    change: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert run("--config", write(recipe.parent, change), "--out", out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()
