"""Line plots as SVG, with logarithmic axes, written by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 360, 70, 50, 40, 150
_COLOURS = ("#1f6fb4", "#d1622b", "#3c8d40", "#8a5aa8", "#777777")


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _label(exponent: int) -> str:
    return f"{10**exponent:,}" if exponent >= 0 else f"{10.0**exponent:g}"


def line_plot(title: str, x_label: str, y_label: str, series: Mapping[str, Points]) -> str:
    """The series as one SVG; each point is (x, y), both above zero."""
    (x0, x1) = _decades([x for points in series.values() for x, _ in points])
    (y0, y1) = _decades([y for points in series.values() for _, y in points])
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at_x(exponent: float) -> float:
        return _LEFT + (exponent - x0) / (x1 - x0) * (right - _LEFT)

    def at_y(exponent: float) -> float:
        return bottom - (exponent - y0) / (y1 - y0) * (bottom - _TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}</text>',
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text x="16" y="{(_TOP + bottom) / 2}" text-anchor="middle"'
        f' transform="rotate(-90 16 {(_TOP + bottom) / 2})">{escape(y_label)}</text>',
    ]
    for exponent in range(x0, x1 + 1):
        x = at_x(exponent)
        parts.append(f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_label(exponent)}</text>'
        )
    for exponent in range(y0, y1 + 1):
        y = at_y(exponent)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(exponent)}</text>'
        )
    for number, (name, points) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [(at_x(math.log10(x)), at_y(math.log10(y))) for x, y in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        parts.append(
            f'<text x="{right + 10}" y="{_TOP + 14 + 18 * number}" fill="{colour}">'
            f"{escape(name)}</text>"
        )
    return "\n".join([*parts, "</svg>", ""])
