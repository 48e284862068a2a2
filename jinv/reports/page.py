"""The page a person looks at: pictures with other networks' verdicts, figures, tables.

Everything here takes NumPy arrays and plain Python values, and gives bytes, text or a file that is
either complete or absent. The page is one file: no script, no font and no address outside it.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import hashlib
import html
import io
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from jinv.files import write_atomic
from jinv.reports.curves import CURVE, DARK, FONTS, INK, MUTED, RULE

# Bodies of sections and what they hold ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one network says of one picture.

    Attributes:
      network: its name.
      label: name of the class it gives.
      index: index of that class.
      probability: of that class.
      agrees: whether `index` is the picture's target; None if it has no target.
    """

    network: str
    label: str
    index: int
    probability: float
    agrees: bool | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image, uint8 (H, W, C) with C = 1 or 3, and what is said of it.

    Attributes:
      pixels: shown as they are; enlarged without smoothing when smaller than 128 px.
      caption: the class it was made for, say.
      file: its name relative to the page, if it was also saved; the caption links to it.
      verdicts: one line each under the picture.
    """

    pixels: np.ndarray
    caption: str
    file: str = ""
    verdicts: tuple[Verdict, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A grid of pictures, and how often each network agreed."""

    pictures: Sequence[Picture]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a header; the first column names the row, numbers are set to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"{len(self.header)} columns, but this row has {len(row)}: {row}")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing as SVG or PNG bytes; `alt` says in words what it shows."""

    data: bytes
    alt: str


@dataclasses.dataclass(frozen=True)
class Text:
    """Preformatted text, such as a YAML config."""

    text: str


Body = Pictures | Table | Figure | Text


@dataclasses.dataclass(frozen=True)
class Section:
    """A titled part of the page; `intro` is plain text above its body."""

    title: str
    body: Body
    intro: str = ""


@dataclasses.dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
      title: its heading.
      sections: its parts.
      lead: what it shows, in a sentence under the heading.
    """

    title: str
    sections: Sequence[Section]
    lead: str = ""

    def write(self, path: str | os.PathLike[str], ending: Sequence[Section] = ()) -> None:
        """Write the page, and sections that close it, as one HTML file, see `write_html`."""
        write_html(path, self.title, [*self.sections, *ending], lead=self.lead)


def ending(
    summary: Mapping[str, Any],
    machine: Mapping[str, str],
    config: str,
    weights: Mapping[str, str | None] = MappingProxyType({}),
    **more: str,
) -> list[Section]:
    """Return the sections that close the page of a run: weights, hardware and time, the config.

    Args:
      summary: of the run, with the keys of every summary.
      machine: what it ran on.
      config: as YAML.
      weights: network -> torchvision's name of its weights, None for others.
      **more: further rows of the table of hardware and time.
    """
    published = [(name, member) for name, member in weights.items() if member]
    sections = []
    if published:
        table = Table(("network", "torchvision's"), published)
        sections.append(Section("Published weights", table))
    timing = {
        "seconds": f"{summary['seconds']:.1f}",
        "seconds a step": f"{summary['seconds_per_step']:.4f}",
        "seconds compiling": f"{summary['compile_seconds']:.1f}",
        **more,
    }
    table = Table(("", "value"), tuple((dict(machine) | timing).items()))
    return [*sections, Section("Hardware and time", table), Section("Config", Text(config))]


def cell(values: Sequence[float | None]) -> str:
    """Return "0.75", or "0.75 ± 0.05" for several trials; "" where there is nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{np.mean(known):.3g}"
    return mean if len(known) == 1 else f"{mean} ± {np.std(known, ddof=1):.2g}"


# Files --------------------------------------------------------------------------------------------


def png(pixels: np.ndarray) -> bytes:
    """Return uint8 pixels (H, W, 1 or 3) as a PNG file's bytes; ValueError for any others."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(f"want uint8 (H, W, 1 or 3), not {pixels.dtype} {pixels.shape}")
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    # `optimize` is zlib's level 9: 224 px of pure noise stay near 150 kB, the raw size.
    picture.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def write_png(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
    """Write uint8 pixels (H, W, 1 or 3) as a PNG file, whole or not at all."""
    write_atomic(path, png(pixels))


def write_pngs(folder: Path, pictures: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Write pictures into a folder; return their sha256 by name.

    Args:
      folder: where the names begin.
      pictures: file name, such as "images/000.png" -> uint8 pixels (H, W, 1 or 3).
    """
    digests = {}
    for name, pixels in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        encoded = png(pixels)
        write_atomic(folder / name, encoded)
        digests[name] = hashlib.sha256(encoded).hexdigest()
    return digests


def read_png(path: str | os.PathLike[str]) -> np.ndarray:
    """The bytes (H, W, 1 or 3) that `write_png` wrote."""
    with Image.open(path, formats=("PNG",)) as picture:
        pixels = np.asarray(picture)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


# The page -----------------------------------------------------------------------------------------

_CSS = f"""
:root {{ color-scheme: light dark; --page: #fcfcfb; --card: #f3f3f1; --ink: {INK};
  --muted: {MUTED}; --rule: {RULE}; --faint: #b4b8be; --link: {CURVE};
  --yes: #24734a; --no: #a8401f; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #16181c; --card: #1f2227;
  --ink: {DARK[INK]}; --muted: {DARK[MUTED]}; --rule: {DARK[RULE]}; --faint: #5a606a;
  --link: {DARK[CURVE]}; --yes: #7cc79a; --no: #ee9a78; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 69rem; padding: 3.5rem 1.5rem 5rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 {FONTS}; overflow-wrap: break-word; }}
h1, h2 {{ font-family: Charter, 'Iowan Old Style', 'Source Serif 4', Georgia, serif;
  font-weight: 600; line-height: 1.2; text-wrap: balance; margin: 0; }}
h1 {{ font-size: clamp(1.8rem, 1.4rem + 1.8vw, 2.5rem); letter-spacing: -.01em; }}
h2 {{ font-size: 1.4rem; }}
p {{ max-width: 42rem; margin: .5rem 0 0; white-space: pre-line; }}
.lead {{ font-size: 1.125rem; color: var(--muted); }}
a {{ color: inherit; text-decoration-color: var(--faint); text-underline-offset: .2em; }}
a:hover {{ color: var(--link); text-decoration-color: currentColor; }}
:focus-visible {{ outline: 2px solid var(--link); outline-offset: 3px; }}
nav {{ display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-top: 1.25rem;
  font-size: .9rem; color: var(--muted); }}
section {{ margin-top: 2.75rem; padding-top: 1.5rem; border-top: 1px solid var(--rule); }}
.note {{ font-size: .875rem; color: var(--muted); }}
.note span {{ display: inline-block; overflow-wrap: anywhere; }}
.note b {{ color: var(--ink); }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr));
  gap: 2rem 1.25rem; margin-top: 1.5rem; }}
figure {{ margin: 0; min-width: 0; }}
.grid img {{ display: block; width: 100%; height: auto; border-radius: 3px; }}
.small {{ image-rendering: pixelated; }}
figcaption {{ margin-top: .5rem; font-weight: 600; font-size: .95rem; line-height: 1.3; }}
.verdicts {{ list-style: none; margin: .35rem 0 0; padding: 0; font-size: .8125rem;
  line-height: 1.4; }}
.verdicts li {{ display: grid; grid-template-columns: 1.15em minmax(0, 1fr) auto;
  column-gap: .3em; }}
.verdicts li.agrees > span {{ overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }}
.network, .chance {{ color: var(--muted); }}
.chance, .number {{ font-variant-numeric: tabular-nums; }}
.yes {{ color: var(--yes); }} .no {{ color: var(--no); }}
.scroll {{ overflow-x: auto; margin-top: 1.25rem; }}
.scroll img {{ display: block; max-width: max(100%, 56rem); }}
table {{ border-collapse: collapse; font-size: .925rem; }}
th, td {{ padding: .4rem 1.75rem .4rem 0; text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--rule); font-weight: 400; }}
tr > :last-child {{ padding-right: 0; }}
thead th {{ color: var(--muted); font-size: .85rem; }}
.number {{ text-align: right; }}
pre {{ margin: 1.25rem 0 0; padding: 1rem 1.25rem; overflow-x: auto; background: var(--card);
  border-radius: 6px; font: .8125rem/1.6 ui-monospace, 'SF Mono', Menlo, Consolas, monospace; }}
@media (max-width: 32rem) {{ body {{ padding: 2rem 1rem 3rem; }}
  .grid {{ grid-template-columns: 1fr 1fr; gap: 1.75rem 1rem; }} }}
@media print {{ body {{ max-width: none; padding: 0; font-size: 10pt; }} nav {{ display: none; }}
  figure, tr {{ break-inside: avoid; }} h2 {{ break-after: avoid; }}
  .grid {{ grid-template-columns: repeat(4, 1fr); }} pre {{ white-space: pre-wrap; }}
  .scroll img {{ max-width: 100%; }} .verdicts li.agrees > span {{ white-space: normal; }} }}
"""
_NOTHING_OUTSIDE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_MARKS = {
    True: '<span class="yes" role="img" aria-label="agrees">✓</span>',
    False: '<span class="no" role="img" aria-label="disagrees">✗</span>',
    None: '<span aria-hidden="true">·</span>',
}


def write_html(
    path: str | os.PathLike[str], title: str, sections: Sequence[Section], *, lead: str = ""
) -> None:
    """Write the sections as one self-contained HTML page, whole or not at all.

    Every text is escaped. Pictures are embedded as PNG, so a page of 84 pictures of 224 px stays
    below 20 MB whatever they show.

    Args:
      path: of the file.
      title: the page's heading.
      sections: its parts.
      lead: what the page shows, in a sentence under the heading.
    """
    links = [f'<a href="#s{i}">{_text(s.title)}</a>' for i, s in enumerate(sections)]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_NOTHING_OUTSIDE}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">',
        f"<title>{_text(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<header>",
        f"<h1>{_text(title)}</h1>",
        f'<p class="lead">{_text(lead)}</p>' if lead else "",
        f'<nav aria-label="Sections">{"".join(links)}</nav>' if len(links) > 1 else "",
        "</header>\n<main>",
        *(_section(i, section) for i, section in enumerate(sections)),
        "</main>\n</body>\n</html>\n",
    ]
    write_atomic(path, "\n".join(filter(None, parts)).encode())


def _text(value: object) -> str:
    # Lone surrogates, from odd file names, cannot be encoded.
    return html.escape(str(value).encode(errors="replace").decode())


def _section(number: int, section: Section) -> str:
    intro = f"<p>{_text(section.intro)}</p>\n" if section.intro else ""
    body = _body(section.body, _text(section.title))
    return f'<section id="s{number}">\n<h2>{_text(section.title)}</h2>\n{intro}{body}\n</section>'


def _body(body: Body, label: str) -> str:
    match body:
        case Pictures(pictures):
            grid = "\n".join(map(_picture, pictures))
            return f'{_agreement(pictures)}<div class="grid">\n{grid}\n</div>'
        case Table():
            return _scroll(_table(body), label)
        case Figure(data, alt):
            return _scroll(_drawing(data, alt), label)
        case Text(text):
            # A newline right after <pre> is dropped by parsers, so this one keeps the text's own.
            return f'<pre tabindex="0" role="region" aria-label="{label}">\n{_text(text)}</pre>'


def _scroll(content: str, label: str) -> str:
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{content}</div>'


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _picture(picture: Picture) -> str:
    height, width = picture.pixels.shape[:2]
    name = _text(picture.caption)
    small = ' class="small"' if max(height, width) < 128 else ""
    # Quoting the colon too keeps any file name a path: never a scheme such as javascript.
    link = urllib.parse.quote(picture.file.encode(errors="replace"))
    caption = f'<a href="{link}">{name}</a>' if link else name
    lines = "\n".join(map(_verdict, picture.verdicts))
    return (
        f'<figure><img{small} src="{_uri("png", png(picture.pixels))}" alt="{name or "picture"}"'
        f' width="{width}" height="{height}">\n<figcaption>{caption}</figcaption>'
        + (f'\n<ul class="verdicts">\n{lines}\n</ul>' if lines else "")
        + "</figure>"
    )


def _verdict(verdict: Verdict) -> str:
    agrees = None if verdict.agrees is None else bool(verdict.agrees)
    kind = ' class="agrees"' if agrees else ""
    label = _text(verdict.label)
    return (
        f'<li{kind}>{_MARKS[agrees]}<span><span class="network">{_text(verdict.network)}</span>'
        f' <span title="{label} (class {int(verdict.index)})">{label}</span></span>'
        f' <span class="chance">{verdict.probability:.1%}</span></li>'
    )


def _agreement(pictures: Sequence[Picture]) -> str:
    """One line: how many pictures each network gives the class they were made for."""
    verdicts = [v for picture in pictures for v in picture.verdicts if v.agrees is not None]
    if not verdicts:
        return ""
    shown = collections.Counter(v.network for v in verdicts)
    agreed = collections.Counter(v.network for v in verdicts if v.agrees)
    counts = ", ".join(
        f"<span>{_text(name)} <b>{agreed[name]}/{n}</b></span>" for name, n in shown.items()
    )
    return f'<p class="note">✓ gives the class in the caption: {counts}</p>\n'


def _table(table: Table) -> str:
    numeric = [
        bool(table.rows) and all(_is_number(row[i]) for row in table.rows)
        for i in range(len(table.header))
    ]

    def line(values: Sequence[object], scopes: Sequence[str]) -> str:
        cells = []
        for value, scope, number in zip(values, scopes, numeric, strict=True):
            tag = f'th scope="{scope}"' if scope else "td"
            shown = f"{value:.4g}" if isinstance(value, float | np.floating) else value
            kind = ' class="number"' if number else ""
            cells.append(f"<{tag}{kind}>{_text(shown)}</{tag[:2]}>")
        return f"<tr>{''.join(cells)}</tr>"

    columns = len(table.header)
    head = line(table.header, ["col"] * columns)
    rows = "\n".join(line(row, ["row", *[""] * (columns - 1)]) for row in table.rows)
    return f"<table>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _drawing(data: bytes, alt: str) -> str:
    if not data.startswith(b"\x89PNG") and b"<svg" not in data[:1000]:
        raise ValueError("a figure is SVG or PNG bytes")
    kind = "png" if data.startswith(b"\x89PNG") else "svg+xml"
    return f'<img src="{_uri(kind, data)}" alt="{_text(alt)}">'
