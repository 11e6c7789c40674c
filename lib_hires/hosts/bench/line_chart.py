"""Line charts as SVG, on logarithmic axes: a power law is a straight line, and its slope the exponent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

Points = Sequence[tuple[float, float]]

PANEL_WIDTH, PANEL_HEIGHT = 300, 250
LEFT, RIGHT, TOP, BOTTOM, LEGEND = 70, 16, 40, 52, 26
PAPER, INK, GRID = "#ffffff", "#1f2328", "#d8dee4"  # its own paper: the page around it may be dark
FONT = "font-family='DejaVu Sans, Arial, sans-serif'"
# Lines may coincide: the first is the widest and every further one lies on it, so that all of them can be seen.
STYLES = (
    ("#8fb8de", 9.0, "", 0.0),
    ("#b3261e", 2.6, "", 4.5),
    ("#1f2328", 1.4, "3 5", 2.6),
)  # colour, width, dashes, radius of the points


@dataclass(frozen=True)
class Panel:
    """One pair of axes. All values are above 0."""

    title: str
    y_label: str
    series: Mapping[str, Points]


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis: `ticks` by label, and where `low` and `high` lie in the picture."""

    low: float
    high: float
    start: float
    end: float
    ticks: Mapping[str, float]

    def place(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)


def line_chart(panels: Sequence[Panel], x_label: str, x_ticks: Mapping[str, float]) -> str:
    """The panels beside each other, with one legend below them: all of them have the same series."""
    width = len(panels) * (LEFT + PANEL_WIDTH + RIGHT)
    height = TOP + PANEL_HEIGHT + BOTTOM + LEGEND
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}' {FONT} font-size='13' fill='{INK}'>",
        f"<rect width='{width}' height='{height}' fill='{PAPER}'/>",
    ]
    for number, panel in enumerate(panels):
        left = number * (LEFT + PANEL_WIDTH + RIGHT) + LEFT
        parts += _panel(panel, left, x_label, x_ticks)
    parts += _legend(list(panels[0].series), height - LEGEND / 2)
    return "\n".join([*parts, "</svg>"]) + "\n"


def decade_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last at or below `low` to the first at or above `high`."""
    exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2)
    steps = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    first = max(step for step in steps if step <= low * (1 + 1e-9))
    last = min(step for step in steps if step >= high * (1 - 1e-9))
    return [step for step in steps if first <= step <= last]


def _panel(panel: Panel, left: float, x_label: str, x_ticks: Mapping[str, float]) -> Iterator[str]:
    x, y = _x_axis(left, x_ticks), _y_axis(panel)
    middle, bottom = left + PANEL_WIDTH / 2, TOP + PANEL_HEIGHT
    yield "<g class='panel'>"
    yield from _grid(x, y)
    yield _text(middle, TOP - 16, panel.title, "middle", weight="bold")
    yield _text(middle, bottom + 40, x_label, "middle")
    yield _text(left - 52, TOP + PANEL_HEIGHT / 2, panel.y_label, "middle", turned=True)
    for number, (name, points) in enumerate(panel.series.items()):
        yield from _line(name, [(x.place(across), y.place(up)) for across, up in points], number)
    yield "</g>"


def _x_axis(left: float, ticks: Mapping[str, float]) -> Axis:
    margin = 1.25  # room beside the outermost points
    return Axis(min(ticks.values()) / margin, max(ticks.values()) * margin, left, left + PANEL_WIDTH, ticks)


def _y_axis(panel: Panel) -> Axis:
    values = [value for points in panel.series.values() for _, value in points]
    ticks = decade_ticks(min(values) / 1.15, max(values) * 1.15)
    return Axis(ticks[0], ticks[-1], TOP + PANEL_HEIGHT, TOP, {f"{tick:g}": tick for tick in ticks})


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    for label, value in y.ticks.items():
        height = y.place(value)
        yield _rule(x.start, height, x.end, height)
        yield _text(x.start - 8, height + 4, label, "end")
    for label, value in x.ticks.items():
        across = x.place(value)
        yield _rule(across, y.start, across, y.end)
        yield _text(across, y.start + 18, label, "middle")
    yield (
        f"<rect x='{x.start:g}' y='{y.end:g}' width='{PANEL_WIDTH}' height='{PANEL_HEIGHT}' "
        f"fill='none' stroke='{INK}'/>"
    )


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{GRID}'/>"


def _line(name: str, places: Points, number: int) -> Iterator[str]:
    colour, width, dashes, radius = STYLES[number % len(STYLES)]
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
    yield f"<g class='series' data-name={quoteattr(name)}>"
    yield (
        f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='{width:g}' "
        f"stroke-dasharray='{dashes or 'none'}' stroke-linecap='round' stroke-linejoin='round'/>"
    )
    if radius:
        yield from (f"<circle cx='{a:.1f}' cy='{d:.1f}' r='{radius:g}' fill='{colour}'/>" for a, d in places)
    yield "</g>"


def _legend(names: Sequence[str], height: float) -> Iterator[str]:
    yield "<g class='legend'>"
    for number, name in enumerate(names):
        left = LEFT + number * 190
        yield from _line(name, [(left, height - 4), (left + 34, height - 4)], number)
        yield _text(left + 44, height, name, "start")
    yield "</g>"


def _text(x: float, y: float, text: str, anchor: str, weight: str = "normal", turned: bool = False) -> str:
    turn = f" transform='rotate(-90 {x:.1f} {y:.1f})'" if turned else ""
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-weight='{weight}'{turn}>{escape(text)}</text>"
