"""What an evaluation or a run leaves behind: a table on the terminal, metrics.json, and one HTML page with everything
inside.

    report = Report("Emoji in ten minutes", "tokenizer 0.4 M, generator 1.1 M parameters")
    report.add_tile("class accuracy", 0.71, "samples recognised as the class asked for")
    report.add_curves("loss", {"train": [(0, 1.2), (100, 0.8)]}, xlabel="images")
    report.write(folder / "report.html")

The page is readable offline, on a phone and in the dark. Sections appear in the order they were added; tiles stay on
top and neighbouring curves share a row. Every text is escaped, pictures are embedded as PNG, curves are SVG.

metrics.json answers every question that a reader of a number may have: what was measured on how many pictures, by which
protocol, against which file, from which weights, with which labels, seed, rounding, precision and versions, and how
long each part took.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from core.dist import version_of
from core.files import ROOT, explain_os_errors, write_atomic
from evaluation.measure import Result
from evaluation.protocols import meaning_of
from evaluation.scores import Score

# ---------------------------------------------------------------------------------------------------------------------
# Line charts
# ---------------------------------------------------------------------------------------------------------------------
# Inline SVG: one function, no dependency. Colours come from the page's CSS (classes s0 ... s6).

Series = dict[str, list[tuple[float, float]]]
Bars = dict[str, list[tuple[float, float, float]]]  # of a series: (x, low, high) of intervals

WIDTH, HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 12, 42
_MAX_POINTS = 300
NUM_COLOURS = 7


def format_number(value: float) -> str:
    """Short and readable: 0.0012 -> 0.0012, 12500 -> 12.5k, 3e-7 -> 3e-7."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "not finite"
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if limit <= size < 1e12:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[suffix]:.4g}{suffix}"
    if size < 1e-3 or size >= 1e12:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten inside [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high]; with fewer than two of them also their multiples by 2 and 5, or linear ones."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for multiples in ((1,), (1, 2, 5)):
        values = [m * 10.0**e for e in exponents for m in multiples if low * 0.999 <= m * 10.0**e <= high * 1.001]
        if len(values) >= (2 if multiples == (1,) else 3):
            return values[:: max(1, math.ceil(len(values) / 7))]
    return ticks(low, high)


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _MAX_POINTS of them, keeping the lowest and highest of each stretch so that spikes stay visible."""
    if len(points) <= _MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / _MAX_POINTS)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        usable = [p for p in stretch if math.isfinite(p[1])] or stretch[:1]
        kept += sorted({min(usable, key=lambda p: p[1]), max(usable, key=lambda p: p[1])})
    return kept


def _range(values: list[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return (low / 2, high * 2) if log else (low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5)
    if log:
        margin = (high / low) ** 0.04
        return low / margin, high * margin
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def _spread(series: Series) -> bool:
    """Whether values are best seen on a log scale: all positive, the largest of them 30 times the smallest."""
    values = [y for line in series.values() for _, y in line if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) > 30 * min(values)


def line_chart(name: str, series: Series, log: bool = False, xlabel: str = "", bars: Bars | None = None) -> str:
    """An <svg>. Values that are not finite (or not positive with `log`) leave a gap; no values at all say so."""
    bars = bars or {}

    def usable(point: tuple[float, float]) -> bool:
        return math.isfinite(point[0]) and math.isfinite(point[1]) and (point[1] > 0 or not log)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">']
    points = [point for line in series.values() for point in line if usable(point)]
    if not points:
        return parts[0] + f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">no values</text></svg>'
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    ends = [end for of in bars.values() for _, *both in of for end in both if usable((0.0, end))]
    y_low, y_high = _range([p[1] for p in points] + ends, log)
    scale = math.log if log else float

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (scale(y) - scale(y_low)) / (scale(y_high) - scale(y_low))
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    for value in log_ticks(y_low, y_high) if log else ticks(y_low, y_high):
        y = place(x_low, value)[1]
        parts.append(f'<path class="rule" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{format_number(value)}</text>')
    for value in ticks(x_low, x_high):
        x = place(value, y_low)[0]
        parts.append(f'<path class="rule" d="M{x:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>')
        label = format_number(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{label}</text>')
    if xlabel:
        x = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(f'<text class="label" x="{x}" y="{HEIGHT - 6}" text-anchor="middle">{escape(xlabel)}</text>')
    for index, (label, line) in enumerate(series.items()):
        path, pen_down, drawn = [], False, []
        for point in _thin(line):
            if usable(point):
                drawn.append(place(*point))
                path.append(f"{'L' if pen_down else 'M'}{drawn[-1][0]:.1f} {drawn[-1][1]:.1f}")
            pen_down = usable(point)
        colour = f"s{index % NUM_COLOURS}"
        if path:
            parts.append(f'<path class="line {colour}" d="{"".join(path)}"/>')
        for x, y in drawn if label in bars else drawn[-1:]:
            parts.append(f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        for x, low, high in bars.get(label, []):
            if usable((x, low)) and usable((x, high)):
                (across, bottom), (_, top) = place(x, low), place(x, high)
                parts.append(f'<path class="line {colour}" opacity=".5" d="M{across:.1f} {bottom:.1f}V{top:.1f}"/>')
    return "".join(parts) + "</svg>"


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------
NOTHING = "\N{EN DASH}"  # in place of a value that is not there
_SMALL = 320  # pictures with a shorter long side are enlarged by a whole factor, pixels kept sharp
_MARKS = {True: ' <span class="ok">✓</span>', False: ' <span class="wrong">✗</span>', None: ""}
_NUMBER = re.compile(r"^[-+]?[\d.,]+(e[-+]?\d+)?\s?%?$")

_SENTENCE = 34  # letters; cells with more of them are broken into lines

Picture = Tensor | Image.Image  # (3, H, W) uint8 or a PIL image

RELOAD_SECONDS = 60  # of the page of something that goes on
# Shows one frame at a time and a slider for them; without scripts all frames are there, one below the other.
_SCRIPT = """
document.querySelectorAll('.frames').forEach(box => {
  const frames = [...box.querySelectorAll('.frame')], slider = box.querySelector('input'), shown = box.querySelector('output');
  const show = () => frames.forEach((frame, i) => {
    frame.hidden = i != slider.value;
    if (!frame.hidden) slider.setAttribute('aria-valuetext', shown.value = frame.dataset.label);
  });
  box.querySelector('label').hidden = frames.length < 2;
  box.querySelectorAll('h3').forEach(title => { title.hidden = frames.length > 1; });
  slider.addEventListener('input', () => { document.body.dataset.used = 'yes'; show(); });
  show();
});
const seconds = document.body.dataset.reload;
if (seconds) setInterval(() => { if (!document.body.dataset.used && !document.hidden) location.reload(); }, 1000 * seconds);
"""


@dataclass
class Frame:
    """One moment of pictures that change: what it is called, and (caption, pictures that belong together) each."""

    label: str
    groups: Sequence[tuple[str, Sequence[Picture]]]


def _to_pil(picture: Picture) -> Image.Image:
    if isinstance(picture, Tensor):
        picture = Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
    return picture.convert("RGB")


def _image(picture: Picture, alt: str, css: str = "", width: int | None = None, small: bool = False) -> str:
    """An <img> that carries its pixels. `width` is in CSS pixels; `small` spends fewer bytes and loses a little."""
    buffer = io.BytesIO()
    image = _to_pil(picture)
    if small:
        image.save(buffer, format="WEBP", quality=88)
    else:
        image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f' width="{width}"' if width else ""
    kind = "webp" if small else "png"
    return f'<img class="{css}" alt="{escape(alt)}"{size} src="data:image/{kind};base64,{data}">'


def _column_class(cells: Sequence[str]) -> str:
    """How a column of a table is set, as an attribute of its cells."""
    if cells and all(_NUMBER.match(x) or x in ("", NOTHING) for x in cells):
        return ' class="number"'
    return ' class="prose"' if any(len(x) > _SENTENCE and " " in x for x in cells) else ""


def _show(value: Any) -> str:
    """Value of a tile or a cell as text."""
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return format_number(value)
    return str(value)


class Report:
    """Collects sections and writes them."""

    def __init__(self, title: str, subtitle: str = ""):
        self.title, self.subtitle = title, subtitle
        self.reloads = False  # whether an open page looks again, until its reader moves a slider
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

    def add_curves(
        self, name: str, series: Series, log: bool | None = False, xlabel: str = "", bars: Bars | None = None
    ) -> Report:
        """A chart of name -> [(x, y), ...]. Values that are not finite leave gaps. log None: where the values ask for it."""
        log = _spread(series) if log is None else log
        legend = []
        for index, (label, points) in enumerate(series.items()):
            finite = [y for _, y in points if math.isfinite(y)]
            is_latest = (
                label not in (bars or {}) or len(points) == 1
            )  # the end of a row of measurements is not the last word
            last = f" <b>{format_number(finite[-1])}</b>" if finite and is_latest else ""
            legend.append(f'<span><i class="s{index % NUM_COLOURS}"></i>{escape(label)}{last}</span>')
        chart = line_chart(name, series, log, xlabel, bars)
        heading = escape(name) + (' <span class="caption">log scale</span>' if log else "")
        html = f'<section class="card"><h3>{heading}</h3>{chart}<div class="legend">{"".join(legend)}</div></section>'
        self._sections.append(("chart", html))
        return self

    def add_image(self, title: str, picture: Picture, caption: str = "", enlarged: int = 1) -> Report:
        """One picture or grid of pictures, `enlarged` at least so many times; small ones are enlarged with sharp pixels."""
        image = _to_pil(picture)
        factor = max(enlarged, _SMALL // max(image.size))
        html = _image(image, title, "picture pixels" if factor > 1 else "picture", image.width * factor)
        return self._add_card(title, html + (f'<div class="caption">{escape(caption)}</div>' if caption else ""))

    def add_frames(self, title: str, frames: Sequence[Frame], caption: str = "") -> Report:
        """Pictures through time, the last ones first to be seen; a slider, for the arrow keys too, goes back."""
        moments = []
        for frame in frames:
            cells = []
            for name, pictures in frame.groups:
                images = "".join(
                    _image(p, f"{name}, {frame.label}".lstrip(", "), "pixels", small=True) for p in pictures
                )
                cells.append(f'<figure>{images}<figcaption title="{escape(name)}">{escape(name)}</figcaption></figure>')
            label = escape(frame.label)
            moments.append(
                f'<div class="frame" data-label="{label}"><h3>{label}</h3><div class="cells">{"".join(cells)}</div></div>'
            )
        last = len(frames) - 1
        slider = (
            f'<label>when <input type="range" min="0" max="{last}" value="{last}" aria-label="{escape(title)}: when">'
            " <output></output></label>"
        )
        text = f'<div class="caption">{escape(caption)}</div>' if caption else ""
        return self._add_card(title, f'<div class="frames">{slider}{"".join(moments)}</div>{text}')

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
        """Columns whose cells are all numbers are set flush right; lines are broken where a column holds sentences."""
        cells = [[_show(cell) for cell in row] for row in rows]
        columns = list(zip(*cells)) if cells else [()] * len(headers)
        css = [_column_class(column) for column in columns]
        head = "".join(f"<th{style}>{escape(text)}</th>" for text, style in zip(headers, css))
        body = ["".join(f"<td{style}>{escape(text)}</td>" for text, style in zip(row, css)) for row in cells]
        lines = "".join(f"<tr>{row}</tr>" for row in body)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
        return self._add_card(
            title, f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">{table}</div>'
        )

    def add_config(self, text: str) -> Report:
        """The resolved configuration, folded away."""
        html = f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>"
        self._sections.append(("card", f'<section class="card">{html}</section>'))
        return self

    def add_environment(self, environment: dict[str, Any]) -> Report:
        """What `environment()` returns."""
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
        needs_script = self.reloads or any('class="frames"' in html for _, html in self._sections)
        script = f"<script>{_SCRIPT}</script>" if needs_script else ""
        style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>\n{style}</style></head>\n"
            f"<body{f' data-reload={RELOAD_SECONDS}' if self.reloads else ''}><main><header><h1>{escape(self.title)}</h1>"
            f"{subtitle}{tiles}</header>\n" + "\n".join(body) + f"\n</main>{script}</body></html>\n"
        )

    def write(self, path: str | Path) -> None:
        """Write the page atomically."""
        write_atomic(path, self.html())


# ---------------------------------------------------------------------------------------------------------------------
# What a result was made with
# ---------------------------------------------------------------------------------------------------------------------
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "pillow", "safetensors")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of this checkout, "-dirty" when tracked files differ from it; None outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def environment() -> dict[str, str]:
    """Name -> value, in the order worth reading. Takes milliseconds and reaches no network."""
    result = {"commit": _commit(), "python": platform.python_version()}
    result |= {package: version_of(package) for package in _PACKAGES}
    result["platform"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    result["cpu"] = f"{cpu_name()}, {os.cpu_count()} cores"
    result["torch threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        result["gpu"] = ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names)))
        result["cuda"] = torch.version.cuda
    else:
        result["gpu"] = "none"
    return {name: value for name, value in result.items() if value}


# ---------------------------------------------------------------------------------------------------------------------
# An evaluation's result
# ---------------------------------------------------------------------------------------------------------------------
def table(result: Result) -> str:
    """Aligned lines, one per number, each with its protocol and reference."""
    rows = [(s.name, _value(s), s.protocol, s.reference or "-") for s in result.scores]
    widths = [max(len(row[i]) for row in rows) for i in range(4)] if rows else [0] * 4
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip()
        for row in [("metric".ljust(widths[0]), "value", "protocol", "reference"), *rows]
    ]
    notes = {s.note: s.name for s in result.scores if s.note}
    lines += [f"note ({name}): {note}" for note, name in notes.items()]
    lines += [f"left out: {name} ({reason})" for name, reason in result.left_out.items()]
    return "\n".join(lines)


def _value(score: Score) -> str:
    is_distance = "fid" in score.name or score.name.startswith(("fd_", "rfd_", "pfd_"))
    shown = max(score.value, 0.0) if is_distance else score.value
    return with_interval(shown, score.interval, "" if score.std is None else f" +- {score.std:.4f}")


def with_interval(value: float, interval: Sequence[float] | None, spread: str = "") -> str:
    """A number as tables show it, with its interval where it has one."""
    return f"{value:.4f}{spread}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def write_csv(path: Path, headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table whose numbers are exact; None is an empty cell."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([headers, *rows])
    write_atomic(path, file.getvalue())


def tabular(headers: list[str], rows: list[list[str]], words: int = 1) -> str:
    """A LaTeX table whose first columns, `words` many, are of words and the rest of numbers."""

    def escaped(text: str) -> str:
        return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&").replace(NOTHING, "--")

    body = [" & ".join(map(escaped, row)) + r" \\" for row in (headers, *rows)]
    head = rf"\begin{{tabular}}{{{'l' * words}{'r' * (len(headers) - words)}}}"
    return "\n".join([head, r"\hline", body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular}"]) + "\n"


def precision_of(device: torch.device, features: str = "float32") -> dict[str, Any]:
    """What features and metrics ran in, for a record."""
    return {"features": features, "tf32": False, "metrics": "float64", "device": device.type}


def write_record(folder: str | Path, result: Result, context: dict[str, Any]) -> Path:
    """metrics.json in `folder`; returns its path."""
    folder = Path(folder)
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    scores = {
        s.name: {k: v for k, v in asdict(s).items() if k != "name" and v not in (None, "")} for s in result.scores
    }
    context = {
        **context,
        "scores": scores,
        "left_out": result.left_out,
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()},
    }
    path = folder / "metrics.json"
    write_metrics(path, result.values(), context)
    return path


def write_page(
    folder: str | Path,
    title: str,
    result: Result,
    context: dict[str, Any],
    pictures: Sequence[tuple[str, Picture, str]],
    tables: Sequence[tuple[str, list[str], list[list[Any]]]] = (),
) -> Path:
    """report.html in `folder`: numbers, pictures, tables, and what the numbers depend on. Opens without a network."""
    report = Report(title, f"{context.get('count', 0):,} pictures, protocol {context.get('protocol', '')}")
    for s in result.scores:
        meaning = meaning_of(s.name)
        beside = f"{s.interval[0]:.3f} to {s.interval[1]:.3f}" if s.interval else ""
        against = f" Against {s.reference}." if s.reference else ""
        report.add_tile(s.name, f"{s.value:.4g}", f"{meaning.sentence}{against}".strip(), beside)
    for name, picture, caption in pictures:
        report.add_image(name, picture, caption)
    report.add_table(
        "Numbers",
        ["metric", "value", "pictures", "protocol", "reference", "note"],
        [[s.name, f"{s.value:.6g}", s.count, s.protocol, s.reference, s.note] for s in result.scores],
    )
    for name, headers, rows in tables:
        report.add_table(name, headers, rows)
    if result.left_out:
        report.add_table("Left out", ["metric", "why"], [[k, v] for k, v in result.left_out.items()])
    report.add_table("Measured with", ["", ""], _flat({k: v for k, v in context.items() if k not in NOT_ON_PAGE}))
    path = Path(folder) / "report.html"
    report.write(path)
    return path


# Of a record's context: said elsewhere on the page, or in metrics.json alone.
NOT_ON_PAGE = ("job", "protocol_settings", "scores", "left_out")


def _flat(values: dict[str, Any], before: str = "") -> list[list[str]]:
    """(name, value) of everything but long lists; what is in a dictionary as "sample.scale"."""
    rows: list[list[str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{before}{name}.")
        elif not isinstance(value, list) or len(value) <= 8:
            rows.append([before + name, f"{value:.4g}" if isinstance(value, float) else str(value)])
    return rows


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null, and a run that wrote one still has a readable file."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_metrics(path: str | Path, metrics: dict[str, Any], context: dict[str, Any]) -> None:
    """Write `metrics` (plain numbers, text, lists, dicts) atomically.

    Args:
        context: what the numbers depend on: "count" of pictures, "net" name, "reference_fingerprint", "seed" and
            whatever else matters. The four named ones are always in the file, null when not given. Versions and
            processors are added here.
    """
    context = {"count": None, "net": None, "reference_fingerprint": None, "seed": None} | context
    entries: dict[str, Any] = {}
    for name, value in metrics.items():
        plain_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        entries[name] = {"value": value} | asdict(meaning_of(name)) if plain_number else {"value": value}
    record = _finite({"metrics": entries, "context": context, "environment": environment()})
    write_atomic(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
