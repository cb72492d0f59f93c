"""A line chart as one self-contained SVG. No command itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 80, 660, 50, 480
"""Edges of the plot; the legend stands to its right."""

COLOURS = ("#1f5fa8", "#c8452d", "#2f8f4e", "#8a5bb5", "#b8860b", "#167d8c", "#6b6b6b")
DASHES = ("", "7 4", "2 3")
"""Each colour comes once in every dash before any pair is repeated."""


@dataclass(frozen=True, kw_only=True)
class Point:
    x: float
    y: float
    low: float
    high: float
    """Ends of the whisker."""


def line_chart(title: str, x_label: str, y_label: str, lines: Mapping[str, Sequence[Point]]) -> str:
    """The chart of every named line, its points in the order of x."""
    points = [point for line in lines.values() for point in line]
    xs = ticks(min(point.x for point in points), max(point.x for point in points))
    ys = ticks(min([0.0, *(point.low for point in points)]), max(point.high for point in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - xs[0]) / (xs[-1] - xs[0]), (y - ys[0]) / (ys[-1] - ys[0])
        return round(LEFT + across * (RIGHT - LEFT), 1), round(BOTTOM - up * (BOTTOM - TOP), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="28" font-size="16" font-weight="bold">{escape(title)}</text>',
        f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 18}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(20 {(TOP + BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]
    for x in xs:
        across, _ = place(x, ys[0])
        parts.append(f'<text x="{across}" y="{BOTTOM + 20}" text-anchor="middle">{x:g}</text>')
    for y in ys:
        _, down = place(xs[0], y)
        parts.append(f'<path d="M{LEFT} {down}H{RIGHT}" stroke="{"#333" if y == 0 else "#ddd"}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{down + 4}" text-anchor="end">{y:g}</text>')
    for number, (name, line) in enumerate(lines.items()):
        parts += draw(number, name, [(*place(p.x, p.y), place(p.x, p.low)[1], place(p.x, p.high)[1]) for p in line])
    return "\n".join([*parts, "</svg>", ""])


def draw(number: int, name: str, places: Sequence[tuple[float, float, float, float]]) -> list[str]:
    """One line with its markers and whiskers, and its row in the legend."""
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
    stroke = f'stroke="{colour}" stroke-width="2" fill="none"' + (f' stroke-dasharray="{dash}"' if dash else "")
    path = " ".join(f"{x} {y}" for x, y, _, _ in places)
    down = TOP + 22 * number
    return [
        f'<path d="M{path}" {stroke}/>',
        *(f'<path d="M{x} {low}V{high}" stroke="{colour}"/>' for x, _, low, high in places if low != high),
        *(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y, _, _ in places),
        f'<path d="M{RIGHT + 30} {down}h34" {stroke}/>',
        f'<text x="{RIGHT + 72}" y="{down + 4}">{escape(name)}</text>',
    ]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, in at most about ten steps."""
    span = (high - low) or abs(high) or 1.0
    tens = 10.0 ** math.floor(math.log10(span))
    step = next(part * tens for part in (0.1, 0.2, 0.5, 1.0) if span / (part * tens) <= 10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]
