"""Curves for the report: data points -> coordinates, ticks and labels of one drawing.

Only arithmetic: the page's template turns a `Chart` into inline SVG, styles it and escapes its texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]  # step, value

LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40  # margins for labels, in units of the drawing
MOST_POINTS = 800  # of one line; more would not be seen


@dataclass(frozen=True)
class Series:
    """One line or one set of dots. `style` is a CSS class: `raw`, `smooth`, `evaluated`, `rate`."""

    name: str
    style: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing of `width` x `height` units. Ticks are (position, label); a line is (style, path data); a
    dot is (style, x, y, text shown when pointed at)."""

    title: str
    y_label: str
    width: int
    height: int
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, str]]
    dots: list[tuple[str, float, float, str]]
    legend: list[tuple[str, str]]
    left: int = LEFT
    top: int = TOP

    @property
    def right(self) -> int:
        return self.width - RIGHT

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM


def draw(
    title: str,
    y_label: str,
    series: Iterable[Series],
    *,
    x_range: tuple[float, float] | None = None,
    width: int = 860,
    height: int = 320,
) -> Chart | None:
    """Lay `series` out on common axes; None when none has a point. A line of one point becomes a dot."""
    series = [s for s in series if s.points]
    if not series:
        return None
    xs = x_range or _range(x for s in series for x, _ in s.points)
    ys = [y for s in series for _, y in s.points]
    y_ticks = ticks(min(ys), max(ys), 5 if height > 200 else 3)
    x_ticks = [x for x in ticks(*xs, 8, whole=True) if xs[0] <= x <= xs[1]]
    low, high = y_ticks[0], y_ticks[-1]

    def place(point: Point) -> Point:
        across = (point[0] - xs[0]) / ((xs[1] - xs[0]) or 1)
        up = (point[1] - low) / (high - low)
        return (
            round(LEFT + across * (width - LEFT - RIGHT), 1),
            round(height - BOTTOM - up * (height - TOP - BOTTOM), 1),
        )

    lines, dots = [], []
    for s in series:
        if len(s.points) > 1:
            path = " ".join("{:g},{:g}".format(*place(p)) for p in thin(s.points))
            lines.append((s.style, f"M{path}"))
        if s.dots or len(s.points) == 1:
            shown = s.points[:: math.ceil(len(s.points) / 100)]
            dots += [
                (s.style, *place(p), f"{s.name} at step {p[0]:g}: {label(p[1])}") for p in shown
            ]
    return Chart(
        title,
        y_label,
        width,
        height,
        [(place((x, low))[0], f"{x:,.0f}") for x in x_ticks],
        [(place((xs[0], y))[1], label(y)) for y in y_ticks],
        lines,
        dots,
        [(s.style, s.name) for s in series],
    )


def ticks(low: float, high: float, number: int, *, whole: bool = False) -> list[float]:
    """About `number` round values from at or below `low` to at or above `high`; at least two.

    Steps are 1, 2 or 5 times a power of ten; `whole`: at least 1.
    """
    if high <= low:
        margin = 0.5 if whole else abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    # the tolerance keeps a bound that is itself round from adding another step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def label(value: float) -> str:
    """A number in at most about six characters: `2.5`, `0.031`, `3e-05`, `12,000`."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def smooth(points: Sequence[Point], share: float = 0.03) -> list[Point]:
    """Exponential moving average over about `share` of the points (at least 5), unbiased at the start."""
    if not points:
        return []
    keep = 1 - 1 / max(5.0, share * len(points))
    total = weight = 0.0
    out = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        out.append((x, total / weight))
    return out


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    stretches = (points[i : i + size] for i in range(0, len(points), size))
    return [
        p
        for part in stretches
        for p in sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    ]


def _range(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    return min(values), max(values)
