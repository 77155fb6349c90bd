"""A line plot as SVG, both axes logarithmic: growth is a slope, and no growth is a level line."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 40, 50
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


class Line(NamedTuple):
    """Points of one curve, by growing x."""

    name: str
    points: Sequence[tuple[float, float]]


class _Axis:
    """Where a value stands between two ends, by its logarithm; the range is whole powers of ten."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, is_padded: bool) -> None:
        low, high = math.log10(min(values)), math.log10(max(values))
        self._low = math.floor(low) if is_padded else low
        self._high = max(math.ceil(high) if is_padded else high, self._low + 1e-9)
        self._start, self._end = start, end

    def place(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    @property
    def powers(self) -> list[float]:
        return [10.0**power for power in range(math.ceil(self._low), math.floor(self._high) + 1)]


def draw(title: str, x_name: str, y_name: str, lines: Sequence[Line]) -> str:
    """Return the plot's text; values are above 0."""
    across = [x for line in lines for x, _ in line.points]
    up = [y for line in lines for _, y in line.points]
    x_axis = _Axis(across, LEFT, WIDTH - RIGHT, is_padded=False)
    y_axis = _Axis(up, HEIGHT - BOTTOM, TOP, is_padded=True)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 20, title, size=14),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_name, anchor="middle"),
        _text(LEFT - 8, TOP - 8, y_name, anchor="end"),
    ]
    for value in y_axis.powers:
        y = y_axis.place(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{value:g}", anchor="end"))
    for value in sorted(set(across)):
        parts.append(_text(x_axis.place(value), HEIGHT - BOTTOM + 18, f"{value:g}", anchor="middle"))
    for number, line in enumerate(lines):
        parts += _curve(line, x_axis, y_axis, COLOURS[number % len(COLOURS)])
    return "\n".join([*parts, "</svg>", ""])


def _curve(line: Line, x_axis: _Axis, y_axis: _Axis, colour: str) -> list[str]:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places),
        _text(places[-1][0] + 8, places[-1][1] + 4, line.name, colour=colour),
    ]


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, colour: str = "#222"
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{colour}">{escape(text)}</text>'
