"""The page, its pictures and its curves: whole, self-contained, escaped, and true to the pixels."""

from __future__ import annotations

import base64
import html.parser
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jinv.reports import curves
from jinv.reports import page as pages
from jinv.reports.page import Figure, Picture, Pictures, Section, Table, Text, Verdict

VOID = {"meta", "link", "img", "br", "hr"}
EVIL = "<script>alert('x')</script> & \"quoted\""


class Page(html.parser.HTMLParser):
    """Reads a page and checks that every element closes in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self):
        return " ".join("".join(self.data).split())


def pixels(seed, shape=(32, 32, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def embedded(image):
    kind, _, data = image["src"].partition(";base64,")
    assert kind in ("data:image/png", "data:image/svg+xml")
    return base64.b64decode(data, validate=True)


def read(data):
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "page.html"


def write(path, *bodies, **kwargs):
    sections = [Section(f"part {i}", body, "intro") for i, body in enumerate(bodies)]
    pages.write_html(path, "title", sections, **kwargs)
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def everything():
    verdicts = (
        Verdict("resnet50", "tench", 0, 0.987, True),
        Verdict("vgg11_bn", "goldfish", 1, 0.5, False),
        Verdict("mobilenet_v2", "hen", 8, 0.25),
    )
    svg = curves.plot({"total": [3.0, 2.0, 1.0]}, [0, 10, 20])
    return (
        Pictures([Picture(pixels(0), "tench", "images/0.png", verdicts)]),
        Pictures([Picture(pixels(1, (224, 224, 3)), "plain")]),
        Figure(svg, "falling loss"),
        Table(("network", "top-1"), [("resnet50", 0.75), ("vgg11", 1)]),
        Text("seed: 0\n"),
    )


def test_the_page_is_well_formed_and_says_what_it_is(path):
    page, text = write(path, *everything(), lead="what this is")
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert [m["content"] for m in page.all("meta") if m.get("name") == "viewport"]
    assert page.all("title")
    assert "what this is" in page.text
    anchors = {a["href"] for a in page.all("nav") + page.all("a") if a.get("href", "")[:1] == "#"}
    assert anchors == {f"#{s['id']}" for s in page.all("section")}


def test_the_page_needs_nothing_outside_itself(path):
    page, text = write(path, *everything())
    assert not page.all("script")
    assert not page.all("iframe")
    for outside in ("http:", "https:", "@import", "url(", "src=//"):
        assert outside not in text
    for tag, attrs in page.elements:
        if tag == "link" or "src" in attrs:
            assert (attrs.get("src") or attrs["href"]).startswith("data:")


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (224, 224, 3), (5, 9, 1), (7, 3, 3)])
def test_embedded_pictures_are_the_pixels_given(path, shape):
    given = [pixels(seed, shape) for seed in range(3)]
    page, _ = write(path, Pictures([Picture(p, f"class {i}") for i, p in enumerate(given)]))
    images = page.all("img")
    assert [image["alt"] for image in images] == ["class 0", "class 1", "class 2"]
    for image, want in zip(images, given, strict=True):
        np.testing.assert_array_equal(read(embedded(image)).reshape(shape), want)
        assert (int(image["height"]), int(image["width"])) == shape[:2]


def test_every_image_has_an_alt(path):
    page, _ = write(path, *everything(), Pictures([Picture(pixels(0), "")]))
    assert len(page.all("img")) == 4
    assert all(image["alt"] for image in page.all("img"))


def test_only_small_pictures_are_pixelated(path):
    page, _ = write(
        path, Pictures([Picture(pixels(0), "a"), Picture(pixels(0, (224, 224, 3)), "b")])
    )
    assert [image.get("class") for image in page.all("img")] == ["small", None]


def test_verdicts_carry_marks_words_and_counts(path):
    page, text = write(path, *everything())
    assert "✓ resnet50 tench 98.7%" in page.text.replace("✓resnet50", "✓ resnet50")
    assert text.count('aria-label="agrees">✓<') == 1
    assert text.count('aria-label="disagrees">✗<') == 1
    assert "vgg11_bn goldfish 50.0%" in page.text
    assert "resnet50 1/1, vgg11_bn 0/1" in page.text
    assert "mobilenet_v2 0/" not in page.text


def test_no_counts_without_targets(path):
    picture = Picture(pixels(0), "a", verdicts=(Verdict("resnet50", "tench", 0, 0.5),))
    page, _ = write(path, Pictures([picture]))
    assert "gives the class" not in page.text


def test_agreement_may_be_a_numpy_bool(path):
    verdict = Verdict("n", "c", np.int64(3), np.float32(0.5), np.bool_(True))  # type: ignore[arg-type]
    page, _ = write(path, Pictures([Picture(pixels(0), "c", verdicts=(verdict,))]))
    assert "✓" in page.text


def test_texts_of_strangers_stay_text(path):
    picture = Picture(pixels(0), EVIL, EVIL, (Verdict(EVIL, EVIL, 0, 0.5, True),))
    bodies = (
        Pictures([picture]),
        Table((EVIL, EVIL), [(EVIL, EVIL)]),
        Text(EVIL),
        Figure(curves.plot({EVIL: [1.0]}, [0], title=EVIL), EVIL),
    )
    pages.write_html(path, EVIL, [Section(EVIL, body, EVIL) for body in bodies], lead=EVIL)
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    page = Page(text)
    assert page.all("img")[0]["alt"] == EVIL
    assert page.text.count("<script>alert('x')</script>") >= 10


@pytest.mark.parametrize("file", ["javascript:alert(1)", "http://x.example/a.png", "a b&'\".png"])
def test_a_file_name_is_only_ever_a_path(path, file):
    page, _ = write(path, Pictures([Picture(pixels(0), "a", file)]))
    (link,) = page.all("a")
    assert ":" not in link["href"]
    assert " " not in link["href"]


def test_preformatted_text_is_kept_to_the_letter(path):
    config = "\nmodel: resnet50\n  - {a: 1}  # é\n"
    page, _ = write(path, Text(config))
    assert "\n" + config in page.data


def test_undecodable_names_do_not_lose_the_page(path):
    page, _ = write(path, Pictures([Picture(pixels(0), "bad \udcff", "bad\udcff.png")]))
    assert "bad ?" in page.text


def test_number_columns_are_set_as_numbers(path):
    table = Table(("name", "top-1", "mixed"), [("a", 0.123456, 1), ("b", np.float32(2), "-")])
    page, _ = write(path, table)
    assert [attrs.get("class") for attrs in page.all("td")] == ["number", None] * 2
    assert "0.1235" in page.text
    assert [attrs["scope"] for attrs in page.all("th")] == ["col"] * 3 + ["row"] * 2


def test_a_ragged_table_is_an_error():
    with pytest.raises(ValueError, match="2 columns"):
        Table(("a", "b"), [("only one",)])


def test_empty_sections_make_a_page(path):
    page, _ = write(path, Pictures([]), Table(("a",), []), Text(""))
    assert len(page.all("section")) == 3


def test_84_pictures_of_noise_stay_below_20_mb(path):
    picture = Picture(pixels(0, (224, 224, 3)), "noise")  # nothing compresses worse
    write_one = path.with_name("one.html")
    pages.write_html(write_one, "one", [Section("one", Pictures([picture]))])
    assert 84 * write_one.stat().st_size < 20e6


@pytest.mark.parametrize("shape", [(8, 6, 3), (8, 6, 1)])
def test_write_png_is_lossless(tmp_path, shape):
    pages.write_png(tmp_path / "a.png", pixels(0, shape))
    np.testing.assert_array_equal(
        read((tmp_path / "a.png").read_bytes()).reshape(shape), pixels(0, shape)
    )


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4, 3), np.float32), pixels(0, (4, 4)), pixels(0, (4, 4, 4))]
)
def test_pixels_of_another_kind_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="uint8"):
        pages.write_png(tmp_path / "a.png", wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, failing):
    target = tmp_path / "a.png"
    pages.write_png(target, pixels(0))
    old = target.read_bytes()

    def full(self, data):
        if failing == "write_bytes":
            with self.open("wb") as file:
                file.write(data[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, failing, full)
    for write_it in (
        lambda: pages.write_png(target, pixels(1)),
        lambda: pages.write_html(target, "t", []),
    ):
        with pytest.raises(OSError, match="disk full"):
            write_it()
    assert target.read_bytes() == old
    assert list(tmp_path.iterdir()) == [target]


def test_a_picture_that_cannot_be_shown_leaves_the_old_page(path):
    write(path, Text("old"))
    with pytest.raises(ValueError, match="uint8"):
        write(path, Pictures([Picture(np.zeros((4, 4, 3)), "float")]))
    assert "old" in path.read_text()


def test_a_figure_is_svg_or_png(path):
    pages.write_png(path.with_name("a.png"), pixels(0))
    page, _ = write(path, Figure(path.with_name("a.png").read_bytes(), "dots"))
    np.testing.assert_array_equal(read(embedded(page.all("img")[0])), pixels(0))
    with pytest.raises(ValueError, match="SVG or PNG"):
        write(path, Figure(b"GIF89a", "no"))


def test_the_ending_names_published_weights(path):
    summary = {"seconds": 1.0, "seconds_per_step": 0.1, "compile_seconds": 0.5}
    some = {"resnet50": "IMAGENET1K_V2", "mine": None}
    for weights, told in ((some, True), ({"mine": None}, False), ({}, False)):
        ending = pages.ending(summary, {"device": "cpu"}, "seed: 0", weights)
        pages.write_html(path, "title", ending)
        text = Page(path.read_text(encoding="utf-8")).text
        assert ("Published weights" in text) == told
        assert ("resnet50" in text and "IMAGENET1K_V2" in text) == told
        assert "mine" not in text
