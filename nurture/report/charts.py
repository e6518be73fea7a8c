"""Line charts as inline SVG: no script, no network, no dependency, and they follow the page's light or dark colours.

A chart is drawn small (440 x 270 units) and scaled by the page, so that its text can be read on a phone. Colour is not
the only sign: lines of different runs or sources also differ in their dashes. Everything a caller passes is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 12, 44
_MOST_POINTS = 300
COLOURS = 8
"""Classes c0 to c7 of the page's stylesheet."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: in the legend; lines of one name share an entry.
        points: (x, y), in the order they are joined.
        colour: which of the page's colours.
        dashes: 0 for a whole line, 1 to 3 for dashed ones.
        intervals: (low, high) of every point, drawn as bars.
        marks: draw a dot at every point.
        joined: draw the line between the points.
        run: which of several runs it is from: they share colours, and the legend names each once, by its dashes.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashes: int = 0
    intervals: Sequence[tuple[float, float]] = ()
    marks: bool = False
    joined: bool = True
    run: str = ""


@dataclass(frozen=True)
class _Axis:
    """Where values lie: `low` to `high` on the line from `start` to `end`, in tens of decades if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        share = (self._scaled(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        if not self.log:
            return value
        # Nothing has no logarithm: it stands a decade before the smallest number there is.
        return math.log10(value) if value > 0 else self.low


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    percent: bool = False,
) -> Markup:
    """Return a figure with its legend, empty if there is nothing to draw.

    Args:
        log_x: a logarithmic axis; 0 stands at its left end.
        percent: y is a share: 0 to 1 is drawn as 0 to 100 %.
    """
    lines = [_finite(line) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup()
    x_axis, x_ticks = _x_axis([x for line in lines for x, _ in line.points], log_x)
    heights = [y for line in lines for _, y in line.points]
    heights += [bound for line in lines for pair in line.intervals for bound in pair]
    y_axis, y_ticks = _linear_axis(heights, HEIGHT - _BOTTOM, _TOP, (0.0, 1.0) if percent else None)
    parts = [_grid(x_axis, x_ticks, y_axis, y_ticks, x_label, y_label, percent)]
    parts += [_drawn(line, x_axis, y_axis) for line in lines]
    return Markup(
        '<figure class="chart"><figcaption>{title}</figcaption>'
        '<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{parts}</svg>{legend}</figure>'
    ).format(title=title, width=WIDTH, height=HEIGHT, parts=Markup().join(parts), legend=_legend(lines))


def _finite(line: Line) -> Line:
    """Return the line without points that cannot be drawn, thinned where it has more than anyone can see."""
    kept = [i for i, (x, y) in enumerate(line.points) if math.isfinite(x) and math.isfinite(y)]
    if len(kept) > _MOST_POINTS:
        kept = [kept[round(i * (len(kept) - 1) / (_MOST_POINTS - 1))] for i in range(_MOST_POINTS)]
    intervals = [line.intervals[i] for i in kept] if line.intervals else ()
    return replace(line, points=[line.points[i] for i in kept], intervals=intervals)


def _x_axis(values: Sequence[float], log: bool) -> tuple[_Axis, list[tuple[float, str]]]:
    start, end = _LEFT, WIDTH - _RIGHT
    if not log:
        axis, ticks = _linear_axis(values, start, end, None)
        # Steps seldom end at a round number: the line gets the whole width, and ticks past its end are left out.
        last = max(values) if max(values) > min(values) else axis.high
        return replace(axis, high=last), [tick for tick in ticks if tick[0] <= last]
    positive = [value for value in values if value > 0] or [1.0]
    first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    has_zero = min(values) <= 0
    axis = _Axis(first - has_zero, max(last, first + 1), start, end, log=True)
    every = max(1, math.ceil((last - first) / 6))
    ticks = [(10.0**power, _short(10.0**power)) for power in range(first, int(axis.high) + 1, every)]
    return axis, [(0.0, "0"), *ticks] if has_zero else ticks


def _linear_axis(
    values: Sequence[float], start: float, end: float, fixed: tuple[float, float] | None
) -> tuple[_Axis, list[tuple[float, str]]]:
    low, high = fixed or (min(values), max(values))
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = _nice((high - low) / 4)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    count = round((high - low) / step)
    ticks = [(low + i * step, _short(low + i * step, step)) for i in range(count + 1)]
    return _Axis(low, high, start, end), ticks


def _nice(step: float) -> float:
    """Return the next larger of 1, 2, 2.5, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(nice * power for nice in (1, 2, 2.5, 5, 10) if nice * power >= step * (1 - 1e-9))


def _short(value: float, step: float = 1.0) -> str:
    """Write a number of an axis: 0.25, 3, 40k, 2M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    if value and abs(value) < 1e-3 and step < 1e-3:
        return f"{value:.0e}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + f"{step:e}".startswith("2.5"))
    return f"{value:.{digits}f}"


def _grid(
    x_axis: _Axis,
    x_ticks: Sequence[tuple[float, str]],
    y_axis: _Axis,
    y_ticks: Sequence[tuple[float, str]],
    x_label: str,
    y_label: str,
    percent: bool,
) -> Markup:
    parts = []
    for value, text in y_ticks:
        y = y_axis.place(value)
        text = f"{100 * value:.0f} %" if percent else text
        parts.append(
            Markup(
                '<path class="grid" d="M{0} {1:.1f}H{2}"/><text x="{3}" y="{4:.1f}" class="y">{5}</text>'
            ).format(_LEFT, y, WIDTH - _RIGHT, _LEFT - 6, y + 4, text)
        )
    for value, text in x_ticks:
        x = x_axis.place(value)
        parts.append(
            Markup('<text x="{0:.1f}" y="{1}" class="x">{2}</text>').format(x, HEIGHT - _BOTTOM + 16, text)
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        Markup('<text x="{0}" y="{1}" class="x label">{2}</text>').format(middle, HEIGHT - 8, x_label)
    )
    height = (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(
        Markup('<text transform="translate(12 {0}) rotate(-90)" class="x label">{1}</text>').format(
            height, y_label
        )
    )
    return Markup().join(parts)


def _drawn(line: Line, x_axis: _Axis, y_axis: _Axis) -> Markup:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in line.points]
    style = Markup("c{0} d{1}").format(line.colour % COLOURS, line.dashes)
    parts = []
    if line.joined and len(places) > 1:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(Markup('<path class="line {0}" d="{1}"/>').format(style, path))
    for (x, _), (low, high) in zip(places, line.intervals):
        bar = f"M{x:.1f} {y_axis.place(low):.1f}V{y_axis.place(high):.1f}"
        parts.append(Markup('<path class="bar {0}" d="{1}"/>').format(style, bar))
    if line.marks or len(places) == 1:
        dot = Markup('<circle class="dot {0}" cx="{1:.1f}" cy="{2:.1f}" r="3.2"/>')
        parts += [dot.format(style, x, y) for x, y in places]
    return Markup().join(parts)


def _legend(lines: Sequence[Line]) -> Markup:
    named, runs = dict[str, Line](), dict[str, Line]()
    for line in lines:
        named.setdefault(line.name, line)
        runs.setdefault(line.run, line)
    entries = [(name, f"c{line.colour % COLOURS} d{line.dashes}") for name, line in named.items()]
    if any(runs):
        # Lines of one source are known by their dashes, those of several by colours too; every run is named once.
        one = len(entries) == 1
        colours = [] if one else [(name, f"c{line.colour % COLOURS} d0") for name, line in named.items()]
        entries = colours + [
            (run, f"c{line.colour % COLOURS if one else 'n'} d{line.dashes}") for run, line in runs.items()
        ]
    if len(entries) < 2:
        return Markup()
    sign = Markup('<li><svg viewBox="0 0 26 8"><path class="line {0}" d="M1 4H25"/></svg>{1}</li>')
    items = [sign.format(style, escape(name)) for name, style in entries]
    return Markup('<ul class="legend">{0}</ul>').format(Markup().join(items))
