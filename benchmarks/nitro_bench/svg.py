"""Charts as inline SVG: bars, stacked bars, dots, distributions, a roofline. Colours come from the page's style.

Every chart is drawn on a fixed canvas `WIDTH` units wide and scales with the page. Its text keeps its size by a canvas that is
narrow: 360 units, the width of a phone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH = 360
LABEL_HEIGHT, BAR_HEIGHT, GAP = 15, 14, 12
AXIS_HEIGHT = 26
PALETTE = 8
"""Classes c0 ... c7 of the page's style."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One row of a chart."""

    label: str
    values: Sequence[float]
    colour: int = 0


def svg(height: float, body: Iterable[str], title: str) -> str:
    """A whole picture; `title` is what a screen reader says."""
    content = "".join(body)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f"{content}</svg>"
    )


def text(x: float, y: float, content: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(content)}</text>'


def rect(x: float, y: float, width: float, height: float, css: str, tip: str = "") -> str:
    inner = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(width, 0.5):.2f}" height="{height:.1f}" class="{css}">{inner}</rect>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / most
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step - 1e-9) * step
    return [first + step * index for index in range(int((high - first) / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 10, 100 between two positive numbers; 2 and 5 too where there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    return [10.0**e * f for e in exponents for f in factors if low <= 10.0**e * f <= high]


def number(value: float) -> str:
    """Short, for axes and labels."""
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-3:
        return f"{value:.2g}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:.3g}" if size < 1000 else f"{value:,.0f}"


class Axis:
    """Values to places on the canvas."""

    def __init__(self, low: float, high: float, left: float, right: float, *, log: bool = False) -> None:
        self.low, self.high, self.left, self.right, self.log = low, high, left, right, log

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.left + share * (self.right - self.left)

    def ticks(self) -> list[float]:
        found = decades(self.low, self.high) if self.log else []
        return found if len(found) > 1 else ticks(self.low, self.high)  # two slow subjects lie within a decade


def bottom_axis(axis: Axis, top: float, bottom: float, unit: str) -> Iterator[str]:
    """Grid lines with their numbers below, and the unit."""
    for value in axis.ticks():
        x = axis.at(value)
        yield line(x, top, x, bottom, "grid")
        yield text(x, bottom + 12, number(value), "tick", "middle")
    yield text(axis.right, bottom + 24, unit, "tick", "end")


def bars(rows: Sequence[Series], unit: str, title: str, *, log: bool = False) -> str:
    """One bar per row, its label above, its number at its end; `log` for rows of very different sizes."""
    values = [row.values[0] for row in rows]
    low = 10 ** math.floor(math.log10(min(v for v in values if v > 0)) - 0.2) if log else 0.0
    axis = Axis(low, max(values) * (1.6 if log else 1.0), 2, WIDTH - 62, log=log)
    parts, y = [], 4.0
    for row, value in zip(rows, values, strict=True):
        parts.append(text(2, y + 11, row.label, "label"))
        y += LABEL_HEIGHT
        end = axis.at(value) if value > 0 else axis.left
        parts.append(
            rect(axis.left, y, end - axis.left, BAR_HEIGHT, f"c{row.colour % PALETTE}", f"{row.label}: {value:g} {unit}")
        )
        parts.append(text(end + 5, y + 11, f"{number(value)} {unit}", "value"))
        y += BAR_HEIGHT + GAP
    return svg(y, parts, title)


def stacked(rows: Sequence[Series], names: Sequence[str], unit: str, title: str) -> str:
    """One bar per row made of parts, named by `names` in the legend above, as shares of one axis."""
    totals = [sum(row.values) for row in rows]
    axis = Axis(0, max(totals), 2, WIDTH - 66)
    parts, y = list(legend(names)), legend_height(names)
    for row, total in zip(rows, totals, strict=True):
        parts.append(text(2, y + 11, row.label, "label"))
        y += LABEL_HEIGHT
        passed = 0.0
        for index, (name, value) in enumerate(zip(names, row.values, strict=True)):
            width = axis.at(passed + value) - axis.at(passed)
            parts.append(rect(axis.at(passed), y, width, BAR_HEIGHT, f"c{index % PALETTE}", f"{name}: {value:.4g} {unit}"))
            passed += value
        parts.append(text(axis.at(total) + 5, y + 11, f"{number(total)} {unit}", "value"))
        y += BAR_HEIGHT + GAP
    return svg(y, parts, title)


def legend(names: Sequence[str]) -> Iterator[str]:
    for index, (name, x, y) in enumerate(_legend_places(names)):
        yield rect(x, y, 9, 9, f"c{index % PALETTE}")
        yield text(x + 13, y + 9, name, "tick")


def legend_height(names: Sequence[str]) -> float:
    return max((y for _, _, y in _legend_places(names)), default=0.0) + 20


def _legend_places(names: Sequence[str]) -> Iterator[tuple[str, float, float]]:
    x, y = 2.0, 2.0
    for name in names:
        width = 22 + 6.1 * len(name)
        if x + width > WIDTH:
            x, y = 2.0, y + 16
        yield name, x, y
        x += width


def distributions(rows: Sequence[Series], unit: str, title: str) -> str:
    """Each row's samples as a density over one axis, with marks at the median (tall) and at p95.

    The axis ends at the largest p99 of the rows (the maximum where there are few samples); what lies beyond is counted at the
    edge.
    """
    tops = [float(np.percentile(row.values, 99 if len(row.values) >= 100 else 100)) for row in rows]
    lows = [min(row.values) for row in rows]
    pad = 0.04 * (max(tops) - min(lows)) or 0.05 * max(tops)
    axis = Axis(max(0.0, min(lows) - pad), max(tops) + pad, 4, WIDTH - 8)
    height, parts, y = 34.0, [], 2.0
    bottom = y + len(rows) * (LABEL_HEIGHT + height + 8)
    parts += list(bottom_axis(axis, y, bottom, unit))
    for row in rows:
        median = float(np.median(row.values))
        beyond = sum(value > axis.high for value in row.values)
        more = f", {beyond} beyond" if beyond else ""
        parts.append(text(4, y + 11, row.label, "label"))
        parts.append(text(WIDTH - 4, y + 11, f"{number(median)} {unit}{more}", "value", "end"))
        y += LABEL_HEIGHT
        parts.append(_density(row, axis, y, height))
        x = axis.at(median)
        parts.append(line(x, y, x, y + height, "mark"))
        if len(row.values) >= 20:
            x = axis.at(min(axis.high, float(np.percentile(row.values, 95))))
            parts.append(line(x, y + height / 2, x, y + height, "mark thin"))
        y += height + 8
    return svg(bottom + AXIS_HEIGHT, parts, title)


def _density(row: Series, axis: Axis, y: float, height: float) -> str:
    """A smoothed histogram as an area, its highest place `height` high."""
    places = np.linspace(axis.low, axis.high, 90)
    values = np.asarray(row.values)
    spread = min(values.std(), (np.percentile(values, 75) - np.percentile(values, 25)) / 1.34) or values.std()
    # Silverman's rule, and never narrower than two pixels of the curve.
    width = max(0.9 * spread * len(values) ** -0.2, 1.5 * (axis.high - axis.low) / len(places))
    density = np.exp(-0.5 * ((places[:, None] - values[None]) / width) ** 2).sum(axis=1)
    density *= (height - 3) / density.max()
    points = " ".join(f"{axis.at(x):.1f},{y + height - h:.1f}" for x, h in zip(places, density, strict=True))
    ends = f"{axis.right:.1f},{y + height:.1f} {axis.left:.1f},{y + height:.1f}"
    return f'<polygon points="{points} {ends}" class="c{row.colour % PALETTE} area"/>'


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One point of a plane."""

    label: str
    x: float
    y: float
    colour: int = 0
    picture: str = ""
    """A data URI that is drawn beside the point."""


def plane(dots: Sequence[Dot], x_unit: str, y_unit: str, title: str) -> str:
    """Points with their pictures, x logarithmic: which is better is up and to the left."""
    height, side = 300.0, 40.0
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    x_axis = Axis(min(xs) / 1.25, max(xs) * 1.25, 34, WIDTH - side - 8, log=True)
    pad = max(0.08 * (max(ys) - min(ys)), 2.0)
    y_axis = Axis(min(ys) - pad, max(ys) + pad, height - 30, 14 + side / 2)
    parts = list(bottom_axis(x_axis, 8, height - 28, x_unit))
    for value in y_axis.ticks():
        parts.append(line(34, y_axis.at(value), WIDTH - 4, y_axis.at(value), "grid"))
        parts.append(text(30, y_axis.at(value) + 4, number(value), "tick", "end"))
    parts.append(text(2, 8, y_unit, "tick"))
    places = [(x_axis.at(dot.x), y_axis.at(dot.y)) for dot in dots]
    tips = [f"<title>{escape(dot.label)}: {dot.x:.4g} {x_unit}, {dot.y:.4g} {y_unit}</title>" for dot in dots]
    for dot, tip, corner in zip(dots, tips, _free_corners(places, side, height - 28), strict=True):
        if dot.picture and corner is not None:
            place = f'x="{corner[0]:.1f}" y="{corner[1]:.1f}" width="{side}" height="{side}"'
            parts.append(f'<image href="{dot.picture}" {place}>{tip}</image>')
    for dot, tip, (x, y) in zip(dots, tips, places, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="c{dot.colour % PALETTE} dot">{tip}</circle>')
    return svg(height, parts, title)


def _free_corners(places: Sequence[tuple[float, float]], side: float, bottom: float) -> Iterator[tuple[float, float] | None]:
    """Where each point's picture goes: right of it, above, below or left, wherever it hides no other point or picture."""
    taken: list[tuple[float, float]] = []
    for x, y in places:
        corners = ((x + 7, y - side / 2), (x - side / 2, y - side - 7), (x - side / 2, y + 7), (x - side - 7, y - side / 2))
        free = [
            (left, top)
            for left, top in corners
            if top >= 10
            and top + side <= bottom
            and not any(left - 5 < px < left + side + 5 and top - 5 < py < top + side + 5 for px, py in places)
            and not any(abs(left - tx) < side and abs(top - ty) < side for tx, ty in taken)
        ]
        taken += free[:1]
        yield free[0] if free else None


def roofline(dots: Sequence[Dot], roofs: Mapping[str, float], bandwidth: float, title: str) -> str:
    """Operations a second over operations per byte, both logarithmic, under the measured roofs.

    Args:
        roofs: what is multiplied -> operations a second.
        bandwidth: bytes a second.
    """
    height = 260.0
    ridges = [roof / bandwidth for roof in roofs.values()]
    xs, ys = [dot.x for dot in dots] + ridges, [dot.y for dot in dots] + list(roofs.values())
    x_axis = Axis(min(xs) / 4, max(xs) * 4, 44, WIDTH - 8, log=True)
    y_axis = Axis(min(ys) / 4, max(ys) * 2, height - 30, 12, log=True)
    parts = list(bottom_axis(x_axis, 12, height - 30, "FLOP per byte"))
    for value in decades(y_axis.low, y_axis.high):
        parts.append(line(44, y_axis.at(value), WIDTH - 8, y_axis.at(value), "grid"))
        parts.append(text(40, y_axis.at(value) + 4, f"{number(value / 1e9)}", "tick", "end"))
    parts.append(text(2, 9, "GFLOP/s", "tick"))
    for name, roof in roofs.items():
        ridge = roof / bandwidth
        start = max(x_axis.low, y_axis.low / bandwidth)
        points = [(start, start * bandwidth), (ridge, roof), (x_axis.high, roof)]
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" class="roof"/>')
        parts.append(text(x_axis.at(ridge) + 3, y_axis.at(roof) - 5, name, "tick"))
    for index, dot in enumerate(dots):
        x, y = x_axis.at(dot.x), y_axis.at(dot.y)
        tip = f"<title>{escape(dot.label)}: {dot.y / 1e9:.4g} GFLOP/s at {dot.x:.4g} FLOP per byte</title>"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="c{dot.colour % PALETTE} dot">{tip}</circle>')
        # In turn above and below: neighbours, and the roof that they touch, stay readable.
        parts.append(text(x, y + (17 if index % 2 else -9), dot.label, "label", "middle"))
    return svg(height, parts, title)
