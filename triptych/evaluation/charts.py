"""Charts as SVG text: bars of wins, ties and losses; quality against seconds. Nothing comes from outside."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
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
    """One system: seconds a picture, and its quality with interval, more being better."""

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


def pareto_plot(title: str, points: Sequence[Point], measure: str, share: bool = True) -> str:
    """Quality upwards, seconds a picture to the right on a logarithmic axis; a line joins the front.

    `share` says that quality is a share in [0,1], told in per cent.
    """
    left, right, top, bottom = 64, 620, 48, 330
    times = [max(point.seconds, 1e-4) for point in points]
    first, last = math.log10(min(times)) - 0.15, math.log10(max(times)) + 0.25
    lowest, highest = _quality_range(points, share)

    def x(seconds: float) -> float:
        return round(left + (right - left) * (math.log10(max(seconds, 1e-4)) - first) / (last - first), 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (value - lowest) / (highest - lowest), 1)

    parts = [_head(right + 40, bottom + 56, title), _text(16, 26, title, 17, weight=600)]
    for value in _levels(lowest, highest):
        told = f"{100 * value:.4g} %" if share else f"{value:.6g}"
        parts.append(_line(left, y(value), right, y(value), "#e6e2d8", 1))
        parts.append(_text(left - 8, y(value) + 4, told, 11, QUIET, anchor="end"))
    for seconds in _ticks(10**first, 10**last):
        parts.append(_line(x(seconds), bottom, x(seconds), bottom + 5, INK, 1))
        parts.append(_text(x(seconds), bottom + 19, f"{seconds:g} s", 11, QUIET, anchor="middle"))
    parts.append(_line(left, bottom, right, bottom, INK, 1))
    front = pareto_front(points)
    path = " ".join(f"{x(p.seconds)},{y(p.quality.value)}" for p in front)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{WIN}" stroke-width="2" opacity="0.6"/>')
    names = {point.name for point in front}
    places = _label_places([(x(p.seconds), y(p.quality.value), p.name) for p in points], top, right, bottom)
    for point, (text_x, text_y, anchor) in zip(points, places, strict=True):
        colour, at, level = (WIN if point.name in names else LOSS), x(point.seconds), y(point.quality.value)
        parts.append(_line(at, y(point.quality.low), at, y(point.quality.high), colour, 1.5, opacity=0.5))
        parts.append(f'<circle cx="{at}" cy="{level}" r="5" fill="{colour}"/>')
        parts.append(_text(text_x, text_y, point.name, 12, anchor=anchor))
    note = f"{measure}, with 95 % interval, against median seconds a picture; green: none is better in both"
    parts.append(_text(16, bottom + 46, note, 11, QUIET))
    return "\n".join([*parts, "</svg>"])


SERIES = ("#2f7d5b", "#b5563c", "#3c6fb5", "#a8832a", "#6d4fa3")


def curve_plot(
    title: str, curves: Mapping[str, Sequence[tuple[float, Estimate]]], along: str, note: str
) -> str:
    """Shares in [0,1] over something that grows, such as updates: a line for each name, with intervals.

    `along` names the horizontal axis, `note` stands below it.
    """
    left, right, top, bottom = 64, 560, 48, 330
    places = [at for points in curves.values() for at, _ in points]
    first, last = min(places), max(places)

    def x(at: float) -> float:
        return round(left + 10 + (right - left - 20) * (at - first) / ((last - first) or 1), 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * value, 1)

    parts = [_head(right + 190, bottom + 62, title), _text(16, 26, title, 17, weight=600)]
    for percent in range(0, 101, 20):
        parts.append(_line(left, y(percent / 100), right, y(percent / 100), "#e6e2d8", 1))
        parts.append(_text(left - 8, y(percent / 100) + 4, f"{percent} %", 11, QUIET, anchor="end"))
    for at in sorted(set(places)):
        parts.append(_line(x(at), bottom, x(at), bottom + 5, INK, 1))
        parts.append(_text(x(at), bottom + 19, f"{at:g}", 11, QUIET, anchor="middle"))
    ends = _apart([y(points[-1][1].value) for points in curves.values()], 15)
    for (name, points), colour, end in zip(curves.items(), SERIES, ends, strict=False):
        path = " ".join(f"{x(at)},{y(found.value)}" for at, found in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for at, found in points:
            parts.append(_line(x(at), y(found.low), x(at), y(found.high), colour, 1.5, opacity=0.35))
            parts.append(f'<circle cx="{x(at)}" cy="{y(found.value)}" r="3.5" fill="{colour}"/>')
        told = f"{name}: {100 * points[-1][1].value:.0f} %"
        parts.append(_text(right + 8, end + 4, told, 12, colour))
    parts.append(_text((left + right) / 2, bottom + 38, along, 12, anchor="middle"))
    parts.append(_text(16, bottom + 56, note, 11, QUIET))
    return "\n".join([*parts, "</svg>"])


def _apart(levels: Sequence[float], least: float) -> list[float]:
    """The levels moved down as far as needed to stand `least` apart, in their order."""
    placed = list(levels)
    order = sorted(range(len(placed)), key=lambda number: placed[number])
    for above, below in itertools.pairwise(order):
        placed[below] = max(placed[below], placed[above] + least)
    return placed


def _quality_range(points: Sequence[Point], share: bool) -> tuple[float, float]:
    """The ends of the quality axis, a little beyond all intervals."""
    low, high = min(p.quality.low for p in points), max(p.quality.high for p in points)
    room = 0.08 * (high - low) + (0.01 if share else 1e-3 * max(abs(low), abs(high), 1e-6))
    return (max(0.0, low - room), min(1.0, high + room)) if share else (low - room, high + room)


def _label_places(
    points: Sequence[tuple[float, float, str]], top: float, right: float, bottom: float
) -> list[tuple[float, float, str]]:
    """Where each point's name stands: x, y and anchor, beside its point and clear of the names before it."""
    taken: list[tuple[float, float, float, float]] = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    places = []
    for x, y, name in points:
        width = 6.6 * len(name)
        found = None
        for shift in (-8, 16, -22, 30, -36, 44, -50, -64, -78):
            for start, anchor in ((x + 9, "start"), (x - 9, "end")):
                first = start if anchor == "start" else start - width
                box = (first, y + shift - 10, first + width, y + shift + 2)
                inside = first > 66 and first + width < right + 38 and top - 12 < box[1] and box[3] < bottom
                if inside and not any(_overlaps(box, other) for other in taken):
                    found = (start, y + shift, anchor, box)
                    break
            if found:
                break
        start, level, anchor, box = found or (x + 9, y - 8, "start", (x, y, x, y))
        taken.append(box)
        places.append((start, level, anchor))
    return places


def _overlaps(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _levels(low: float, high: float) -> list[float]:
    """Round numbers within a range, four to seven of them at even distances."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within a range, or finer steps where those are fewer than three."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), [n / 10 for n in range(10, 100)]):
        ticks = [round(m * 10.0**p, 10) for p in powers for m in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 8) or 1]


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


def _line(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    colour: str,
    width: float,
    dashes: str = "",
    opacity: float = 1,
) -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    dashed += f' opacity="{opacity:g}"' if opacity < 1 else ""
    ends = f'x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width:g}"{dashed}/>'


def _whisker(low: float, high: float, value: float, y: float) -> str:
    dot = f'<circle cx="{value:g}" cy="{y:g}" r="3.5" fill="{INK}"/>'
    return _line(low, y, high, y, INK, 1.5) + dot
