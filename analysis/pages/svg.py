"""Draw line charts, histograms and fits as inline SVG, coloured by the CSS of the page.

Charts therefore follow the light or dark theme of the page. Plotting libraries are not used because
their SVG has fixed colours and draws text as paths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from analysis.number_format import number

# Size of a chart and its margins, in px.
WIDTH = 560
HEIGHT = 250
LEFT = 58
RIGHT = 14
TOP = 12
BOTTOM = 34
MAX_POINTS = 600
"""Approximate maximum number of points drawn per line."""
N_COLOURS = 6  # .s0 to .s5 in the page's CSS

Point = tuple[float, float]


@dataclass(frozen=True)
class Layer:
    """The elements of a fit chart that share one colour."""

    name: str
    colour: int
    """Number of the colour, taken modulo `N_COLOURS`."""
    dots: Sequence[Point] = ()
    """Measured points."""
    rings: Sequence[Point] = ()
    """Measured points that were also forecast by a fit without them."""
    line: Sequence[Point] = ()
    band: Sequence[tuple[float, float, float]] = ()
    """(x, low, high), cut off at the ends of the axes, which span only dots, rings and lines."""
    style: str = ""
    """Additional CSS class of the line: `faint` or `dashed`."""


@dataclass(frozen=True)
class Axis:
    """A mapping from a range of values to a range of pixels."""

    low: float
    high: float
    start_px: float
    end_px: float
    log: bool = False

    def px(self, value: float) -> float:
        """Return the pixel position of a value; values outside the range are placed at its end."""
        low = self._scaled(self.low)
        high = self._scaled(self.high)
        at = self._scaled(value)
        share = min(max((at - low) / (high - low), 0.0), 1.0)
        return self.start_px + share * (self.end_px - self.start_px)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.log else value

    def ticks(self) -> list[float]:
        """Return round values within the range.

        On a logarithmic axis, these are powers of ten, with intermediate values if there are few.
        """
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def line_chart(
    series: Mapping[str, Sequence[Point]], *, label: str, x_label: str, log: bool = False
) -> str:
    """Draw an `<svg>` with one line for each series.

    Args:
        series: Name -> points (x, y) in order of x. Points that are not finite, or not positive on
            a logarithmic axis, are left out and interrupt the line.
        label: Description of the chart for screen readers.
        x_label: Label of the x axis.
        log: Use a logarithmic y axis.

    Returns:
        The SVG, or an empty string if no point can be drawn.
    """
    runs = {name: _runs(points, log) for name, points in series.items()}
    points = [point for parts in runs.values() for part in parts for point in part]
    if not points:
        return ""
    x_axis = Axis(*_x_range([x for x, _ in points]), LEFT, WIDTH - RIGHT)
    y_axis = Axis(*_y_range([y for _, y in points], log), HEIGHT - BOTTOM, TOP, log)
    body = [_frame(x_axis, y_axis, x_label)]
    for index, (name, parts) in enumerate(runs.items()):
        colour = f"s{index % N_COLOURS}"
        body += [_polyline(part, x_axis, y_axis, colour, name) for part in parts]
    return _svg(label, "".join(body))


def histogram(edges: Sequence[float], counts: Sequence[int], *, label: str, x_label: str) -> str:
    """Draw an `<svg>` with one bar for each count.

    Args:
        edges: Edges of the bins, one more than there are counts.
        counts: Number of values in each bin.
        label: Description of the chart for screen readers.
        x_label: Label of the x axis.

    Returns:
        The SVG, or an empty string if all counts are 0.
    """
    if not any(counts):
        return ""
    x_axis = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    y_axis = Axis(0, _linear_ticks(0, max(counts) * 1.08)[-1] or 1, HEIGHT - BOTTOM, TOP)
    # The highest tick may be lower than the highest bar.
    if y_axis.high < max(counts):
        y_axis = Axis(0, max(counts) * 1.05, HEIGHT - BOTTOM, TOP)
    body = [_frame(x_axis, y_axis, x_label)]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            body.append(_bar(x_axis, y_axis, low, high, count))
    return _svg(label, "".join(body))


def fit_chart(layers: Sequence[Layer], *, label: str, x_label: str, log: bool = True) -> str:
    """Draw an `<svg>` of points with the curves fitted to them.

    Args:
        layers: Layers in drawing order, from back to front.
        label: Description of the chart for screen readers.
        x_label: Label of the x axis, which is logarithmic.
        log: Use a logarithmic y axis.

    Returns:
        The SVG, or an empty string if there is nothing to draw.
    """
    points = [p for layer in layers for p in (*layer.dots, *layer.rings, *layer.line)]
    if not points:
        return ""
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    x_axis = Axis(low / 1.1, high * 1.1, LEFT, WIDTH - RIGHT, log=True)
    y_axis = Axis(*_y_range([y for _, y in points], log), HEIGHT - BOTTOM, TOP, log)
    body = [_frame(x_axis, y_axis, x_label)]
    body += [_layer(layer, x_axis, y_axis) for layer in layers]
    return _svg(label, "".join(body))


def standalone(svg: str, css: str) -> str:
    """Turn an inline chart into a standalone SVG file with its own CSS."""
    size = f'xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"'
    opening, body = svg.split(">", 1)
    return f"{opening.replace('<svg', f'<svg {size}', 1)}><style>{css}</style>{body}"


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Reduce a line to about `limit` points.

    The lowest and the highest point of each interval are kept, so that spikes stay visible.
    """
    if len(points) <= limit:
        return list(points)
    kept: list[Point] = []
    # Each interval contributes up to two points.
    size = math.ceil(len(points) / (limit // 2))
    for first in range(0, len(points), size):
        part = points[first : first + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _labels(ticks: Sequence[float]) -> list[str]:
    """Format the ticks with just enough digits to make all labels different."""
    for digits in (3, 4, 5):
        labels = [number(tick, digits) for tick in ticks]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{tick:g}" for tick in ticks]


def _runs(points: Sequence[Point], log: bool) -> list[list[Point]]:
    """Split a series at the points that cannot be drawn, and thin each part."""
    runs: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [thin(run) for run in runs if run]


def _x_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _y_range(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return (low / 1.15, high * 1.15)
    # Let the axis span at least a tenth of the value, so that noise on a constant looks flat.
    spread = (abs(high) * 0.1 or 1.0) - (high - low)
    if spread > 0:
        low, high = (low if low == 0 else low - spread / 2), high + spread / 2
    pad = (high - low) * 0.06
    # If the values come close to zero, start the axis at zero.
    floor = 0.0 if 0 <= low < (high - low) * 0.5 else low - pad
    return floor, high + pad


def _linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    raw = (high - low) / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / 7)]
    # The range is so narrow that a logarithmic axis is almost linear.
    return _linear_ticks(low, high)


def _frame(x_axis: Axis, y_axis: Axis, x_label: str) -> str:
    base, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick, label in zip(y_axis.ticks(), _labels(y_axis.ticks()), strict=True):
        y = y_axis.px(tick)
        parts.append(_rule("grid", y))
        parts.append(_text(LEFT - 8, y + 4, label, "end"))
    for tick, label in zip(x_axis.ticks(), _labels(x_axis.ticks()), strict=True):
        parts.append(_text(x_axis.px(tick), base + 16, label, "middle"))
    return "".join([*parts, _rule("axis", base), _text(right, HEIGHT - 3, x_label, "end")])


def _rule(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _polyline(points: list[Point], x_axis: Axis, y_axis: Axis, colour: str, name: str) -> str:
    x_last, y_last = points[-1]
    tip = f"<title>{escape(name)}: {y_last:.6g} at {number(x_last)}</title>"
    if len(points) == 1:
        centre = f'cx="{x_axis.px(x_last):.1f}" cy="{y_axis.px(y_last):.1f}"'
        return f'<circle class="dot {colour}" {centre} r="2">{tip}</circle>'
    path = " ".join(f"{x_axis.px(x):.1f},{y_axis.px(y):.1f}" for x, y in points)
    return f'<polyline class="line {colour}" points="{path}">{tip}</polyline>'


def _layer(layer: Layer, x_axis: Axis, y_axis: Axis) -> str:
    def place(x: float, y: float) -> str:
        return f"{x_axis.px(x):.1f},{y_axis.px(y):.1f}"

    colour = layer.colour % N_COLOURS
    parts = []
    if layer.band:
        low = [place(x, below) for x, below, _ in layer.band]
        high = [place(x, above) for x, _, above in reversed(layer.band)]
        parts.append(f'<polygon class="band f{colour}" points="{" ".join(low + high)}"/>')
    tip = f"<title>{escape(layer.name)}</title>"
    if layer.line:
        path = " ".join(place(x, y) for x, y in layer.line)
        kind = f"line s{colour} {layer.style}".rstrip()
        parts.append(f'<polyline class="{kind}" points="{path}">{tip}</polyline>')
    for kind, radius, points in (("dot", 2, layer.dots), ("ring", 3.5, layer.rings)):
        for x, y in points:
            centre = f'cx="{x_axis.px(x):.1f}" cy="{y_axis.px(y):.1f}" r="{radius}"'
            tip = f"<title>{escape(layer.name)}: {y:.5g} at {number(x)}</title>"
            parts.append(f'<circle class="{kind} s{colour}" {centre}>{tip}</circle>')
    return "".join(parts)


def _bar(x_axis: Axis, y_axis: Axis, low: float, high: float, count: int) -> str:
    left, right, top = x_axis.px(low), x_axis.px(high), y_axis.px(count)
    place = f'x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(right - left - 1, 0.5):.1f}"'
    tip = f"<title>{low:.2f} to {high:.2f}: {count:,}</title>"
    return f'<rect class="bar" {place} height="{HEIGHT - BOTTOM - top:.1f}">{tip}</rect>'


def _svg(label: str, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )
