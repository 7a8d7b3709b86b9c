"""A report of a comparison that is small enough to be kept beside the code.

    FOLDER/README.md         the tables and plots, readable where code is hosted
    FOLDER/index.html        the same with a strip of pictures for every prompt
    FOLDER/strips/*.jpg      one a prompt and seed: every system's picture, side by side, small
    FOLDER/pareto*.svg       quality against seconds
    FOLDER/results.jsonl     a line a picture
    FOLDER/study.json        prompts, seeds, settings, versions

The pictures are made as large as the limit allows; where even small ones are too much, prompts are left out
at even distances, and both pages say so.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from triptych.errors import DataError
from triptych.evaluation.compare import read_json, read_records, stored_prompts
from triptych.evaluation.lines import read_lines
from triptych.evaluation.metrics import Estimate
from triptych.evaluation.scores import Standing
from triptych.evaluation.sheet import (
    difference,
    mean,
    measure_tables,
    page,
    score_difference,
    systems_table,
    write_plots,
)
from triptych.evaluation.verdicts import QUALITY
from triptych.images import cover, grid, read_picture, replace

MEGABYTE = 1_000_000
SIDES = (192, 160, 128, 112, 96, 80, 64)  # of the small pictures, in pixels; the first that fits is taken
JPEG_QUALITY = 82
GAP = 4
STRIP_STYLE = "img.strip { width: auto; max-width: 100%; }"


@dataclass(frozen=True)
class Line:
    """One prompt and seed with a picture of every system."""

    index: int
    seed: int
    paths: tuple[Path, ...]


def write_digest(out: Path, found: Sequence[Standing], folder: Path, limit: int = 3 * MEGABYTE) -> Path:
    """Write the report of the comparison in OUT into FOLDER, at most `limit` bytes; the README's path.

    Raises DataError when FOLDER holds something else, or when even the tables are larger than `limit`.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "study.json").exists():
        raise DataError(f"{folder} holds something else: name an empty or new folder for the report.")
    shutil.rmtree(folder / "strips", ignore_errors=True)
    (folder / "strips").mkdir(parents=True)
    for name in ("study.json", "results.jsonl"):
        replace(folder / name, (out / name).read_bytes())
    plots = write_plots(folder, found)
    lines = _lines(out)
    _write_pages(out, found, folder, plots, lines, len(lines))
    strips = _fitting_strips(lines, limit - _size(folder), folder)
    shown = [line for line in lines if _strip_name(line) in strips]
    for name, content in strips.items():
        replace(folder / "strips" / name, content)
    _write_pages(out, found, folder, plots, shown, len(lines))
    return folder / "README.md"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _lines(out: Path) -> list[Line]:
    """The prompts and seeds of which every system has a picture."""
    systems = list(read_json(out / "study.json")["systems"])
    records = {name: {r["stem"]: r for r in read_records(name, out)} for name in systems}
    first = records[systems[0]] if systems else {}
    shared = [r for stem, r in first.items() if all(stem in of_one for of_one in records.values())]
    return [
        Line(r["index"], r["seed"], tuple(out / "pictures" / name / f"{r['stem']}.png" for name in systems))
        for r in sorted(shared, key=lambda r: (r["index"], r["seed"]))
    ]


def _fitting_strips(lines: Sequence[Line], room: int, folder: Path) -> dict[str, bytes]:
    """Strips by file name, as large as `room` bytes allow; fewer of them when the smallest are too many."""
    if room <= 0:
        raise DataError(f"The tables of {folder} alone are larger than the limit: allow more megabytes.")
    for side in SIDES:
        strips: dict[str, bytes] = {}
        used = 0
        for line in lines:
            content = _strip(line, side)
            used += len(content)
            if used > room:
                break
            strips[_strip_name(line)] = content
        else:
            return strips
    fewer = max(1, len(strips) * 9 // 10)  # leaves room for strips that are larger than the first ones
    chosen = [lines[number * len(lines) // fewer] for number in range(fewer)]
    return {} if not strips else _fitting_strips(chosen, room, folder) if fewer < len(lines) else strips


def _strip_name(line: Line) -> str:
    return f"{line.index:05d}-{line.seed}.jpg"


def _strip(line: Line, side: int) -> bytes:
    images: list[Image.Image] = []
    for path in line.paths:
        image = read_picture(path)
        if not images:
            width, height = image.size
            size = (max(1, side * width // max(image.size)), max(1, side * height // max(image.size)))
        images.append(cover(image, size))
    buffer = io.BytesIO()
    grid(images, len(images), GAP).save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return buffer.getvalue()


def _write_pages(
    out: Path,
    found: Sequence[Standing],
    folder: Path,
    plots: dict[str, str],
    shown: Sequence[Line],
    whole: int,
) -> None:
    study = read_json(out / "study.json")
    title = study["name"] or "Comparison"
    order = f"systems from left to right: {', '.join(study['systems'])}."
    told = f"{len(shown)} of {whole} prompts and seeds; {order}"
    prompts = stored_prompts(out)
    right = _right(out)
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(made(study, found))}</p>", systems_table(found)]
    parts += [*measure_tables(found), *plots.values(), f"<h2>Pictures</h2>\n<p>{escape(told)}</p>"]
    for line in shown:
        prompt = prompts[line.index]
        about = (str(line.index), prompt.source, prompt.category, f"seed {line.seed}")
        quiet = " · ".join(filter(None, (*about, right.get((line.index, line.seed)))))
        parts.append(
            f'<div class="row"><p>{escape(prompt.prompt)}<br><span class="quiet">{escape(quiet)}</span></p>'
            f'<img class="strip" src="strips/{_strip_name(line)}" loading="lazy" alt=""></div>'
        )
    body = f"<style>{STRIP_STYLE}</style>\n" + "\n".join(parts)
    replace(folder / "index.html", page(title, body).encode())
    replace(folder / "README.md", _readme(title, study, found, plots, shown, told).encode())


def _right(out: Path) -> dict[tuple[int, int], str]:
    """Which systems a judge found right, by prompt and seed; nothing where none looked."""
    found: dict[tuple[int, int], list[str]] = {}
    for row in read_lines(out / "results.jsonl"):
        if row.get(QUALITY) is not None:
            names = found.setdefault((row["index"], row["seed"]), [])
            names += [row["system"]] if row[QUALITY] else []
    return {key: f"right: {', '.join(names) or 'none'}" for key, names in found.items()}


def made(study: dict[str, Any], found: Sequence[Standing]) -> str:
    """Where and of how many pictures the numbers are."""
    pictures = sum(one.pictures for one in found)
    seeds = len(study["settings"]["seeds"])
    drawn = "1 seed" if seeds == 1 else f"{seeds} seeds"
    return (
        f"{len(found)} systems, {len(study['prompts'])} prompts, {drawn}, "
        f"{pictures} pictures; triptych {study['version']}, torch {study['torch']}, {study['machine']}."
    )


def _readme(
    title: str,
    study: dict[str, Any],
    found: Sequence[Standing],
    plots: dict[str, str],
    shown: Sequence[Line],
    told: str,
) -> str:
    parts = [f"# {title}", made(study, found), markdown_table(found)]
    parts += [f"![{name.removesuffix('.svg')}]({name})" for name in plots]
    parts.append(
        'Intervals are 95 %. "Ahead" is paired over the same prompts and seeds, against the first system. '
        "Seconds are the median a picture, without loading, measured in the run that made the pictures. "
        "Every picture and number: [index.html](index.html), [results.jsonl](results.jsonl)."
    )
    if shown:
        some = [shown[number * len(shown) // min(8, len(shown))] for number in range(min(8, len(shown)))]
        prompts = study["prompts"]
        parts.append(f"## Some pictures\n\nSystems from left to right: {', '.join(study['systems'])}.")
        parts += [f"{prompts[s.index]['prompt']}\n\n![](strips/{_strip_name(s)})" for s in some]
    return "\n\n".join(parts) + "\n"


def markdown_table(found: Sequence[Standing]) -> str:
    """A line a system: seconds, memory, the share right with its difference, every judge's mean."""
    right = any(one.measures for one in found)
    names = list(dict.fromkeys(name for one in found for name in one.scores))
    head = ["system", "s a picture", "memory"]
    head += ["right", "ahead, points"] if right else []
    for name in names:
        head += [name, "ahead"]
    rows = [head, ["---"] * len(head)]
    for one in found:
        memory = "" if one.peak_bytes is None else f"{one.peak_bytes / 2**30:.2f} GiB"
        row = [one.name, f"{one.seconds:.3g}", memory]
        if right:
            row += [_percent(one.measures.get("right")), difference(one.ahead)]
        for name in names:
            row += [mean(one.scores.get(name)), score_difference(one.scores_ahead.get(name))]
        rows.append(row)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _percent(estimate: Estimate | None) -> str:
    if estimate is None or estimate.count == 0:
        return ""
    return f"{100 * estimate.value:.1f} % ({100 * estimate.low:.0f} to {100 * estimate.high:.0f})"
