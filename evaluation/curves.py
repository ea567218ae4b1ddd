"""Line charts as inline SVG: one function, no dependency. Colours come from the page's CSS (classes s0 ... s6)."""

from __future__ import annotations

import math
from html import escape

Series = dict[str, list[tuple[float, float]]]

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


def line_chart(name: str, series: Series, log: bool = False, xlabel: str = "") -> str:
    """An <svg>. Values that are not finite (or not positive with `log`) leave a gap; no values at all say so."""

    def usable(point: tuple[float, float]) -> bool:
        return math.isfinite(point[0]) and math.isfinite(point[1]) and (point[1] > 0 or not log)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">']
    points = [point for line in series.values() for point in line if usable(point)]
    if not points:
        return parts[0] + f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">no values</text></svg>'
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high = _range([p[1] for p in points], log)
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
    for index, line in enumerate(series.values()):
        path, pen_down, drawn = [], False, []
        for point in _thin(line):
            if usable(point):
                drawn.append(place(*point))
                path.append(f"{'L' if pen_down else 'M'}{drawn[-1][0]:.1f} {drawn[-1][1]:.1f}")
            pen_down = usable(point)
        colour = f"s{index % NUM_COLOURS}"
        if path:
            parts.append(f'<path class="line {colour}" d="{"".join(path)}"/>')
            parts.append(f'<circle class="{colour}" cx="{drawn[-1][0]:.1f}" cy="{drawn[-1][1]:.1f}" r="3"/>')
    return "".join(parts) + "</svg>"
