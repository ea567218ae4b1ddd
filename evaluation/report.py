"""The report of a run: one HTML file with everything inside, readable offline, on a phone and in the dark.

    report = Report("Emoji in ten minutes", "tokenizer 0.4 M, generator 1.1 M parameters")
    report.add_tile("class accuracy", 0.71, "samples recognised as the class asked for")
    report.add_curves("loss", {"train": [(0, 1.2), (100, 0.8)]}, xlabel="images")
    report.write(folder / "report.html")

Sections appear in the order they were added; tiles stay on top and neighbouring curves share a row. Every text is
escaped, pictures are embedded as PNG, curves are drawn by evaluation/curves.py.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from core.files import write_atomic
from evaluation.curves import NUM_COLOURS, Series, format_number, line_chart

_SMALL = 320  # pictures with a shorter long side are enlarged by a whole factor, pixels kept sharp
_MARKS = {True: ' <span class="ok">✓</span>', False: ' <span class="wrong">✗</span>', None: ""}
_NUMBER = re.compile(r"^[-+]?[\d.,]+(e[-+]?\d+)?\s?%?$")

Picture = Tensor | Image.Image  # (3, H, W) uint8 or a PIL image


def _to_pil(picture: Picture) -> Image.Image:
    if isinstance(picture, Tensor):
        picture = Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
    return picture.convert("RGB")


def _image(picture: Picture, alt: str, css: str = "", width: int | None = None) -> str:
    """An <img> that carries its pixels. `width` is in CSS pixels."""
    buffer = io.BytesIO()
    image = _to_pil(picture)
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f' width="{width}"' if width else ""
    return f'<img class="{css}" alt="{escape(alt)}"{size} src="data:image/png;base64,{data}">'


def _show(value: Any) -> str:
    """Value of a tile or a cell as text."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return format_number(value)
    return str(value)


class Report:
    """Collects sections and writes them."""

    def __init__(self, title: str, subtitle: str = ""):
        self.title, self.subtitle = title, subtitle
        self._tiles: list[str] = []
        self._sections: list[tuple[str, str]] = []  # (kind, html); neighbours of kind "chart" share a grid

    def add_tile(self, name: str, value: Any, meaning: str, beside: str = "") -> Report:
        """A number on top of the page.

        Args:
            value: numbers are shortened; pass text to format it yourself.
            meaning: one line on what the number says.
            beside: what to compare with, set small after the number ("real pictures: 33.8").
        """
        small = f'<span class="beside">{escape(beside)}</span>' if beside else ""
        self._tiles.append(
            f'<div class="tile"><div class="name">{escape(name)}</div><div class="value">{escape(_show(value))}{small}'
            f'</div><div class="meaning">{escape(meaning)}</div></div>'
        )
        return self

    def add_text(self, title: str, text: str) -> Report:
        """Paragraphs, separated by blank lines."""
        paragraphs = "".join(f"<p>{escape(part)}</p>" for part in re.split(r"\n\s*\n", text.strip()))
        return self._add_card(title, paragraphs)

    def add_curves(self, name: str, series: Series, log: bool = False, xlabel: str = "") -> Report:
        """A chart of name -> [(x, y), ...]. Values that are not finite leave gaps."""
        legend = []
        for index, (label, points) in enumerate(series.items()):
            finite = [y for _, y in points if math.isfinite(y)]
            last = f" <b>{format_number(finite[-1])}</b>" if finite else ""
            legend.append(f'<span><i class="s{index % NUM_COLOURS}"></i>{escape(label)}{last}</span>')
        chart = line_chart(name, series, log, xlabel)
        heading = escape(name) + (' <span class="caption">log scale</span>' if log else "")
        html = f'<section class="card"><h3>{heading}</h3>{chart}<div class="legend">{"".join(legend)}</div></section>'
        self._sections.append(("chart", html))
        return self

    def add_image(self, title: str, picture: Picture, caption: str = "") -> Report:
        """One picture or grid of pictures; small ones are enlarged with sharp pixels."""
        image = _to_pil(picture)
        factor = max(1, _SMALL // max(image.size))
        html = _image(image, title, "picture pixels" if factor > 1 else "picture", image.width * factor)
        return self._add_card(title, html + (f'<div class="caption">{escape(caption)}</div>' if caption else ""))

    def add_grid_with_neighbours(
        self,
        title: str,
        rows: Sequence[tuple[str, Sequence[tuple[Picture, Picture, float, bool | None]]]],
        caption: str = "Above: sample. Beneath it: the nearest training picture and its cosine similarity. "
        "The mark says whether a classifier recognises the class asked for.",
    ) -> Report:
        """Samples by class above their nearest training pictures.

        Args:
            rows: (class name, [(sample, neighbour, similarity, recognised or None when unknown), ...]).
        """
        html = []
        for class_name, pairs in rows:
            html.append(f'<h3>{escape(class_name)}</h3><div class="strip">')
            for sample, neighbour, similarity, recognised in pairs:
                mark = _MARKS[recognised]
                pictures = _image(sample, f"sample of {class_name}", "pixels")
                pictures += _image(neighbour, "nearest training picture", "pixels")
                html.append(f'<div class="pair"><div>{pictures}</div>{similarity:.2f}{mark}</div>')
            html.append("</div>")
        return self._add_card(title, f'<p class="caption">{escape(caption)}</p>' + "".join(html))

    def add_table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> Report:
        """Columns whose cells are all numbers are set flush right."""
        cells = [[_show(cell) for cell in row] for row in rows]
        columns = list(zip(*cells)) if cells else [()] * len(headers)
        css = [' class="number"' if c and all(_NUMBER.match(x) or x in ("", "–") for x in c) else "" for c in columns]
        head = "".join(f"<th{style}>{escape(text)}</th>" for text, style in zip(headers, css))
        body = ["".join(f"<td{style}>{escape(text)}</td>" for text, style in zip(row, css)) for row in cells]
        lines = "".join(f"<tr>{row}</tr>" for row in body)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
        return self._add_card(title, f'<div class="scroll">{table}</div>')

    def add_config(self, text: str) -> Report:
        """The resolved configuration, folded away."""
        html = f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>"
        self._sections.append(("card", f'<section class="card">{html}</section>'))
        return self

    def add_environment(self, environment: dict[str, Any]) -> Report:
        """What evaluation.environment.environment() returns."""
        items = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in environment.items())
        return self._add_card("Environment", f"<dl>{items}</dl>")

    def _add_card(self, title: str, html: str) -> Report:
        heading = f"<h2>{escape(title)}</h2>" if title else ""
        self._sections.append(("card", f'<section class="card">{heading}{html}</section>'))
        return self

    def html(self) -> str:
        """The whole page."""
        body, open_grid = [], False
        for kind, html in self._sections:
            if (kind == "chart") != open_grid:
                body.append("</div>" if open_grid else '<div class="charts">')
                open_grid = not open_grid
            body.append(html)
        if open_grid:
            body.append("</div>")
        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>' if self.subtitle else ""
        rows = max(1, math.ceil(len(self._tiles) / 5))
        columns = f'style="--columns:{math.ceil(len(self._tiles) / rows)}"'  # equal rows: 5, 3 + 3, 4 + 3, 4 + 4
        tiles = f'<div class="tiles" {columns}>{"".join(self._tiles)}</div>' if self._tiles else ""
        style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>\n{style}</style></head>\n"
            f"<body><main><header><h1>{escape(self.title)}</h1>{subtitle}{tiles}</header>\n"
            + "\n".join(body)
            + "\n</main></body></html>\n"
        )

    def write(self, path: str | Path) -> None:
        """Write the page atomically."""
        write_atomic(path, self.html())
