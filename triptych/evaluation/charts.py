"""Charts as SVG text: bars of wins, ties and losses; quality against seconds. Nothing comes from outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from triptych.evaluation.metrics import Estimate
from triptych.evaluation.statistics import Tally

WIN, TIE, LOSS, INK, QUIET = "#2f7d5b", "#d9d4c7", "#b5563c", "#222", "#8a857a"
LABEL = 16  # half the width of "50 %"
FONT = 'font-family="system-ui, sans-serif"'


@dataclass(frozen=True)
class Bar:
    """One competitor: votes seen from the reference, its win rate, and the published one if there is one."""

    name: str
    tally: Tally
    rate: Estimate
    published: float | None = None


def bar_chart(title: str, bars: Sequence[Bar], reference: str) -> str:
    """Win, tie and loss as parts of one bar per competitor; the win rate's interval as a whisker.

    A short vertical line marks the published win rate, a long one stands at one half.
    """
    left, right, row, top = 190, 640, 54, 58
    height = top + row * len(bars) + 46
    scale = right - left

    def x(share: float) -> float:
        return round(left + scale * share, 1)

    parts = [_head(right + 150, height, title), _text(16, 26, title, 17, weight=600)]
    parts.append(_text(16, 44, f"votes for {reference}, ties, votes for the other", 12, QUIET))
    for number, bar in enumerate(bars):
        y, votes = top + number * row, max(1, bar.tally.votes)
        parts.append(_text(left - 12, y + 20, bar.name, 14, anchor="end"))
        parts.append(_text(left - 12, y + 36, f"{bar.tally.votes} votes", 11, QUIET, anchor="end"))
        begin = 0.0
        for part, colour in ((bar.tally.wins, WIN), (bar.tally.ties, TIE), (bar.tally.losses, LOSS)):
            share = part / votes
            parts.append(_box(x(begin), y + 4, scale * share, 24, colour))
            if share > 0.08:
                ink = INK if colour == TIE else "#fff"
                middle = x(begin + share / 2)
                if abs(middle - x(0.5)) < LABEL and share * scale > 5 * LABEL:
                    middle = x(0.5) + 1.6 * LABEL  # beside the line at one half
                parts.append(_text(middle, y + 21, f"{100 * share:.0f} %", 12, ink, anchor="middle"))
            begin += share
        if bar.tally.votes:
            parts.append(_whisker(x(bar.rate.low), x(bar.rate.high), x(bar.rate.value), y + 35))
            told = f"{100 * bar.rate.value:.1f} % ({100 * bar.rate.low:.0f} to {100 * bar.rate.high:.0f})"
            parts.append(_text(right + 12, y + 21, told, 12))
        if bar.published is not None:
            at = x(bar.published)
            parts.append(_line(at, y, at, y + 32, INK, 2, "4 2"))
            parts.append(_text(right + 12, y + 37, f"published {100 * bar.published:.1f} %", 11, QUIET))
    bottom = top + row * len(bars)
    parts.append(_line(x(0.5), top - 4, x(0.5), bottom, INK, 1))
    parts.append(_text(x(0.5), bottom + 16, "50 %", 11, QUIET, anchor="middle"))
    note = "whisker: win rate (ties as half) with its 95 % interval"
    if any(bar.published is not None for bar in bars):
        note += "; dashed line: published win rate"
    parts.append(_text(16, height - 8, note, 11, QUIET))
    return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Point:
    """One system: seconds a picture, and its quality with interval, as shares."""

    name: str
    seconds: float
    quality: Estimate


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both seconds and quality, from fast to slow."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.seconds, -p.quality.value)):
        if not front or point.quality.value > front[-1].quality.value:
            front.append(point)
    return front


def pareto_plot(title: str, points: Sequence[Point], measure: str) -> str:
    """Quality upwards, seconds a picture to the right on a logarithmic axis; a line joins the front."""
    left, right, top, bottom = 64, 620, 48, 330
    times = [max(point.seconds, 1e-4) for point in points]
    first, last = math.log10(min(times)) - 0.15, math.log10(max(times)) + 0.25
    highest = min(1.0, max(point.quality.high for point in points) * 1.08 + 0.01)
    lowest = max(0.0, min(point.quality.low for point in points) * 0.92 - 0.01)

    def x(seconds: float) -> float:
        return round(left + (right - left) * (math.log10(max(seconds, 1e-4)) - first) / (last - first), 1)

    def y(share: float) -> float:
        return round(bottom - (bottom - top) * (share - lowest) / (highest - lowest), 1)

    parts = [_head(right + 40, bottom + 56, title), _text(16, 26, title, 17, weight=600)]
    for number in range(5):
        share = lowest + (highest - lowest) * number / 4
        parts.append(_line(left, y(share), right, y(share), "#e6e2d8", 1))
        parts.append(_text(left - 8, y(share) + 4, f"{100 * share:.0f} %", 11, QUIET, anchor="end"))
    for seconds in _ticks(10**first, 10**last):
        parts.append(_line(x(seconds), bottom, x(seconds), bottom + 5, INK, 1))
        parts.append(_text(x(seconds), bottom + 19, f"{seconds:g} s", 11, QUIET, anchor="middle"))
    parts.append(_line(left, bottom, right, bottom, INK, 1))
    front = pareto_front(points)
    path = " ".join(f"{x(p.seconds)},{y(p.quality.value)}" for p in front)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{WIN}" stroke-width="2" opacity="0.6"/>')
    names = {point.name for point in front}
    for point in points:
        colour, at, level = (WIN if point.name in names else LOSS), x(point.seconds), y(point.quality.value)
        parts.append(_line(at, y(point.quality.low), at, y(point.quality.high), colour, 1.5))
        parts.append(f'<circle cx="{at}" cy="{level}" r="5" fill="{colour}"/>')
        late = at > (left + right) / 2 + 100
        parts.append(
            _text(at + (-9 if late else 9), level - 8, point.name, 12, anchor="end" if late else "start")
        )
    note = f"{measure}, with 95 % interval, against median seconds a picture; green: none is better in both"
    parts.append(_text(16, bottom + 46, note, 11, QUIET))
    return "\n".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within a range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [round(m * 10.0**p, 10) for p in powers for m in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def _head(width: float, height: float, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" style="max-width:100%;height:auto;background:#fff">'
        f"<title>{escape(title)}</title>"
    )


def _text(
    x: float, y: float, text: str, size: int, colour: str = INK, anchor: str = "start", weight: int = 400
) -> str:
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text {place} fill="{colour}" {FONT}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" fill="{colour}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    ends = f'x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width:g}"{dashed}/>'


def _whisker(low: float, high: float, value: float, y: float) -> str:
    dot = f'<circle cx="{value:g}" cy="{y:g}" r="3.5" fill="{INK}"/>'
    return _line(low, y, high, y, INK, 1.5) + dot
