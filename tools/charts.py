"""Charts as SVG text, without a plotting library: colors come from the page's style sheet and follow its theme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 320, 160  # view box; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 40, 6, 10, 22  # margins of the plot area


def line_chart(steps: Sequence[float], values: Sequence[float], *, title: str) -> str:
    """One curve over steps with a gridded value axis. Points that are not finite are left out."""
    points = [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y)]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    ticks = nice_ticks(min(ys), max(ys))
    across = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    up = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        for tick in ticks
    )
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
    ends = (
        f'<text x="{LEFT}" y="{HEIGHT - 5}">{number(xs[0])}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">step {number(xs[-1])}</text>'
    )
    dot = f'<circle class="curve-end" cx="{across(xs[-1]):.1f}" cy="{up(ys[-1]):.1f}" r="3.5"/>'
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'{grid}{ends}<polyline class="curve" points="{path}"/>{dot}</svg>'
    )


@dataclass(frozen=True)
class Curve:
    """Points (threshold, value) of one curve, thresholds ascending."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def threshold_chart(curves: Sequence[Curve], *, mark: tuple[float, float] | None, title: str) -> str:
    """Curves over a threshold, with an upright line at the threshold of `mark` and a dot at its value."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    ticks = nice_ticks(min(ys), max(ys))
    left = max(LEFT, 8 + 6 * len(number(ticks[-1])))
    across = _scale(min(xs), max(xs), left, WIDTH - RIGHT)
    up = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        f'<text x="{left - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        for tick in ticks
    ]
    middle = (min(xs) + max(xs)) / 2
    for x, anchor in ((min(xs), "start"), (middle, "middle"), (max(xs), "end")):
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{x:.2f}</text>')
    for curve in curves:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in curve.points)
        style = "curve dashed" if curve.dashed else "curve"
        parts.append(f'<polyline class="{style}" points="{path}"><title>{escape(curve.name)}</title></polyline>')
    if mark is not None and min(xs) <= mark[0] <= max(xs):
        threshold, value = mark
        x, anchor = across(threshold), "end" if threshold > middle else "start"
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<circle class="curve-end" cx="{x:.1f}" cy="{up(value):.1f}" r="3.5"/>'
            f'<text class="marked" x="{x + (-5 if anchor == "end" else 5):.1f}" y="{HEIGHT - BOTTOM - 6}" '
            f'text-anchor="{anchor}">{threshold:g}: {number(value)} left</text>'
        )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def interval(value: float, low: float, high: float) -> str:
    """A share between 0 and 1 as a dot with its interval on a track."""
    return (
        '<svg class="interval" viewBox="0 0 200 14" preserveAspectRatio="none" aria-hidden="true">'
        '<line class="track" x1="0" x2="200" y1="7" y2="7"/>'
        f'<line class="band" x1="{200 * low:.1f}" x2="{200 * high:.1f}" y1="7" y2="7"/>'
        f'<line class="value" x1="{200 * value:.1f}" x2="{200 * value:.1f}" y1="1" y2="13"/></svg>'
    )


def nice_ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """About `count` round numbers whose ends enclose low and high."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * count >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A number with as many digits as one reads: 12500, 3.21, 0.00042."""
    if value == 0:
        return "0"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:.0f}"
    if abs(value) < 0.01:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.3g}"


def _scale(low: float, high: float, start: float, end: float):
    """The straight map from [low, high] to [start, end]."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)
