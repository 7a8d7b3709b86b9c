"""The report of a run: one HTML file that opens anywhere, kept up to date beside the log while training.

Loss curves, loss by noise level, samples over time, settings, speed, memory, time left, skipped pictures.
Charts are inline SVG and pictures are inside the file, so it can be sent as it is; nothing is fetched.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from triptych.checkpoints.files import write_atomically
from triptych.training.config import RunSettings
from triptych.training.log import LEVELS

FILE, TAUGHT = "report.html", "taught"
MAX_SAMPLES = 12  # grids in the report, spread over the run
MAX_POINTS = 400  # of a curve
MAX_SKIPPED = 50
GRID_WIDTH = 900  # pixels of a sample grid at most
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 220, 56, 24  # of a chart
COLOURS = ("#1f6feb", "#bf3989", "#1a7f37", "#9a6700")
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #6a737d; --line: #d8dee4; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 960px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 2rem; } .facts b { display: block; font-size: 1.15rem; }
.facts span, figcaption, .axis { color: var(--soft); fill: var(--soft); font-size: 12px; }
svg { width: 100%; height: auto; } img { max-width: 100%; } figure { margin: 0 0 1rem; }
table { border-collapse: collapse; } td { padding: .1rem 1rem .1rem 0; vertical-align: top; }
pre { overflow-x: auto; background: color-mix(in srgb, var(--ink) 6%, transparent); padding: .8rem; }
"""


def write_report(out: Path, settings: RunSettings, skipped: Sequence[str] = ()) -> Path:
    """Write OUT/report.html from the log and the samples in a run's folder; returns its path."""
    lines = read_log(out / "log.jsonl")
    sections = [
        header(settings, lines),
        *loss_charts(lines),
        levels_chart(lines),
        taught(out / TAUGHT),
        samples(out / "samples"),
        speed_chart(lines),
        skipped_list(skipped),
        f"<h2>Settings</h2><pre>{html.escape(json.dumps(settings.model_dump(), indent=1))}</pre>",
    ]
    title = html.escape(settings.name or settings.recipe)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>"
    )
    with write_atomically(out / FILE) as file:
        file.write(page.encode("utf-8"))
    return out / FILE


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that is cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def header(settings: RunSettings, lines: Sequence[Mapping[str, Any]]) -> str:
    """The name of the run and its main numbers."""
    last = lines[-1] if lines else {}
    done = int(last.get("step", 0))
    facts = {"recipe": settings.recipe, "updates": f"{done:,} of {settings.steps:,}"}
    loss = next((value for name, value in last.items() if name.endswith(".loss")), None)
    if loss is not None:
        facts["loss"] = f"{loss:.4g}"
    if "samples_per_second" in last:
        facts["pictures a second"] = f"{last['samples_per_second']:.3g}"
    if done < settings.steps and "seconds_left" in last:
        facts["time left"] = duration(last["seconds_left"])
    for key, name in (("memory_bytes", "memory, peak"), ("gpu_bytes", "GPU memory, peak")):
        if key in last:
            facts[name] = f"{last[key] / 2**30:.2f} GiB"
    if "wait_fraction" in last:
        facts["waiting for pictures"] = f"{100 * last['wait_fraction']:.1f} %"
    shown = "".join(
        f"<div><span>{name}</span><b>{html.escape(value)}</b></div>" for name, value in facts.items()
    )
    state = "finished" if done >= settings.steps else "running"
    now = time.strftime("%Y-%m-%d %H:%M")
    return (
        f"<h1>{html.escape(settings.name or settings.recipe)}</h1><p>{state}, as of {now}</p>"
        f'<div class="facts">{shown}</div>'
    )


def duration(seconds: float) -> str:
    """ "3 h 05 min", "4 min" or "20 s"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def loss_charts(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """One chart for each loss, and one for the other terms of the log."""
    names = list(dict.fromkeys(name for line in lines for name in line if "." in name))
    losses = [name for name in names if name.endswith(".loss")]
    others = [name for name in names if name not in losses and not name.endswith("gradient_norm")]
    norms = [name for name in names if name.endswith("gradient_norm")]
    charts = []
    for title, group in (("Loss", losses), ("Terms", others), ("Gradient norm", norms)):
        curves = {
            name: [(line["step"], line[name]) for line in lines if finite(line.get(name))] for name in group
        }
        if any(len(points) > 1 for points in curves.values()):
            charts.append(f"<h2>{title}</h2>{line_chart(curves)}")
    return charts


def levels_chart(lines: Sequence[Mapping[str, Any]]) -> str:
    """Unweighted loss by noise level, early and late in the run."""
    told = [line for line in lines if "loss_by_t" in line]
    if not told:
        return ""
    count = max(1, len(told) // 4)
    curves = {}
    for name, part in (("first quarter", told[:count]), ("last quarter", told[-count:])):
        points = []
        for level in range(LEVELS):
            values = [v for line in part if finite(v := line["loss_by_t"][level])]
            if values:
                points.append(((level + 0.5) / LEVELS, sum(values) / len(values)))
        curves[name] = points
    return f"<h2>Loss by noise level</h2>{line_chart(curves, 'noise level: 0 clean, 1 noise')}"


def speed_chart(lines: Sequence[Mapping[str, Any]]) -> str:
    points = [(line["step"], line["samples_per_second"]) for line in lines if "samples_per_second" in line]
    return f"<h2>Pictures a second</h2>{line_chart({'speed': points})}" if len(points) > 1 else ""


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def line_chart(curves: Mapping[str, Sequence[tuple[float, float]]], x_label: str = "update") -> str:
    """Curves over a common axis as SVG; the vertical axis is logarithmic where values span a factor of 20."""
    curves = {name: thinned(points) for name, points in curves.items() if points}
    if not curves:
        return ""
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    logarithmic = min(ys) > 0 and max(ys) / min(ys) > 20
    scale = math.log10 if logarithmic else float
    low, high = scale(min(ys)), scale(max(ys))
    span_x, span_y = (max(xs) - min(xs)) or 1, (high - low) or 1

    def place(x: float, y: float) -> str:
        left = LEFT + (x - min(xs)) / span_x * (WIDTH - LEFT - 8)
        top = 8 + (1 - (scale(y) - low) / span_y) * (HEIGHT - BOTTOM - 16)
        return f"{left:.1f},{top:.1f}"

    parts = []
    for share in (0.0, 0.5, 1.0):
        value = low + share * span_y
        top = 8 + (1 - share) * (HEIGHT - BOTTOM - 16)
        text = f"{10**value if logarithmic else value:.3g}"
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{top:.1f}" y2="{top:.1f}" stroke="var(--line)"/>'
            f'<text class="axis" x="{LEFT - 6}" y="{top + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for x, anchor in ((min(xs), "start"), (max(xs), "end")):
        left = LEFT if anchor == "start" else WIDTH - 8
        parts.append(f'<text class="axis" x="{left}" y="{HEIGHT - 6}" text-anchor="{anchor}">{x:.4g}</text>')
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{x_label}</text>'
    )
    for index, points in enumerate(curves.values()):
        colour = COLOURS[index % len(COLOURS)]
        way = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    legend = "".join(
        f'<span style="color:{COLOURS[index % len(COLOURS)]}">&#9644; {html.escape(name)}</span> '
        for index, name in enumerate(curves)
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
        f"<figcaption>{legend}</figcaption></figure>"
    )


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: means of neighbours."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def samples(folder: Path) -> str:
    """Sample grids over time, the newest first."""
    files = sorted(folder.glob("*.png"))
    if not files:
        return ""
    last = len(files) - 1
    count = min(MAX_SAMPLES, len(files))
    chosen = [files[round(index * last / max(count - 1, 1))] for index in range(count)]
    figures = "".join(
        f"<figure>{picture(path)}<figcaption>update {int(path.stem)}</figcaption></figure>"
        for path in reversed(chosen)
    )
    return f"<h2>Samples</h2>{figures}"


def taught(folder: Path) -> str:
    """What a LoRA has taught, where that was measured (see `evaluation.taught`): numbers and pictures."""
    numbers = folder / "numbers.json"
    if not numbers.is_file():
        return ""
    told = json.loads(numbers.read_text(encoding="utf-8"))
    gain = told["near_with"] - told["near_without"]
    figures = "".join(
        f"<figure>{picture(path)}<figcaption>{caption}</figcaption></figure>"
        for name, caption in (("with", "with the token"), ("without", "the same without it"),
                              ("others_with", "other prompts, wearing the file"),
                              ("others_without", "other prompts without it"))
        if (path := folder / f"{name}.png").is_file()
    )  # fmt: skip
    return (
        f"<h2>What was taught</h2><p>Cosine to the taught pictures: {told['near_with']:.3f} with the token, "
        f"{told['near_without']:.3f} without it, {gain:+.3f}. Other prompts moved by {told['moved']:.3f}.</p>"
        f"{figures}"
    )


def picture(path: Path) -> str:
    """A picture inside the page, as JPEG."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((GRID_WIDTH, GRID_WIDTH))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def skipped_list(skipped: Sequence[str]) -> str:
    if not skipped:
        return "<h2>Skipped pictures</h2><p>None.</p>"
    rows = "".join(f"<li>{html.escape(line)}</li>" for line in skipped[:MAX_SKIPPED])
    more = (
        f"<p>and {len(skipped) - MAX_SKIPPED} more in skipped.txt</p>" if len(skipped) > MAX_SKIPPED else ""
    )
    return f"<h2>Skipped pictures ({len(skipped)})</h2><ul>{rows}</ul>{more}"
