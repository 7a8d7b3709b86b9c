"""The pictures of a comparison judged automatically, where their prompts say what must be seen.

Prompts of shapes are judged by the pixel judge, prompts of icons by the icon judge (`judges`, `icon_judge`);
prompts of neither kind need people (`triptych study`). Measures are shares of pictures.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triptych.errors import DataError
from triptych.evaluation.compare import read_json, read_records, stored_prompts
from triptych.evaluation.icon_judge import load_judge
from triptych.evaluation.judges import judge_shapes
from triptych.evaluation.lines import read_lines
from triptych.evaluation.metrics import Estimate, wilson
from triptych.evaluation.prompts import StudyPrompt
from triptych.evaluation.statistics import paired_shares
from triptych.images import read_picture, replace

QUALITY = "right"  # the one number per picture that plots and comparisons of systems use
SHAPES_MEASURES = ("right", "objects", "colours", "shapes", "count", "relations", "background")
Row = dict[str, Any]


@dataclass
class Standing:
    """How one system did: speed, memory, and measures where pictures were judged."""

    name: str
    settings: Row
    pictures: int
    seconds: float  # median per picture, without loading
    peak_bytes: int | None = None
    peak_of: str = ""
    measures: dict[str, Estimate] = field(default_factory=dict)
    categories: dict[str, Estimate] = field(default_factory=dict)  # of QUALITY, by category of prompt
    ahead: Estimate | None = None  # of QUALITY, against the first system, over the same pictures


def score_pictures(out: Path) -> list[Row]:
    """Judge every picture whose prompt has a truth; scores.jsonl keeps the rows and is used again.

    A row has "system", "stem", "index", "seed", "category" and the measures; QUALITY is in each.
    """
    prompts = stored_prompts(out)
    kept = {(row["system"], row["stem"]): row for row in read_lines(out / "scores.jsonl") if "stem" in row}
    rows = []
    for system in read_json(out / "study.json")["systems"]:
        for record in read_records(system, out):
            prompt = prompts[record["index"]]
            if prompt.truth:
                row = kept.get((system, record["stem"]))
                rows.append(
                    row if row and row["time"] == record["time"] else _score(out, system, record, prompt)
                )
    if rows:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace(out / "scores.jsonl", text.encode())
    return rows


def _score(out: Path, system: str, record: Row, prompt: StudyPrompt) -> Row:
    image = read_picture(out / "pictures" / system / f"{record['stem']}.png")
    row = {
        "system": system,
        **{key: record[key] for key in ("stem", "index", "seed", "time")},
        "prompt": prompt.prompt,
        "category": prompt.category,
    }
    if "concept" in prompt.truth:
        (rank,) = load_judge().rank([image], [prompt.truth["concept"]])
        return {**row, QUALITY: rank == 1, "top5": rank <= 5, "rank": rank}
    if "objects" not in prompt.truth:
        raise DataError(f'The truth of "{prompt.prompt[:60]}" names neither objects nor a concept.')
    truth = prompt.truth
    verdict = judge_shapes(image, truth["objects"], truth.get("relations", ()), truth.get("background"))
    measures = {name: getattr(verdict, name) for name in SHAPES_MEASURES}
    return {**row, **measures, "seen": [f"{seen.colour} {seen.shape}" for seen in verdict.seen.objects]}


def standings(out: Path, rows: Sequence[Row]) -> list[Standing]:
    """Every system of a comparison in its order, from the records and from the rows of `score_pictures`."""
    found: list[Standing] = []
    reference: dict[str, bool] = {}
    for name, settings in read_json(out / "study.json")["systems"].items():
        records = list(read_records(name, out))
        if not records:
            continue
        seconds = statistics.median(record["seconds"] for record in records)
        peaks = [(r["peak_bytes"], r["peak_of"]) for r in records if "peak_bytes" in r]
        standing = Standing(name, settings, len(records), seconds, *(max(peaks) if peaks else (None, "")))
        own = [row for row in rows if row["system"] == name]
        standing.measures = dict(_shares(own, _measures_of(own)))
        for category in dict.fromkeys(row["category"] for row in own):
            alike = [row for row in own if row["category"] == category]
            ((_, standing.categories[category or "other"]),) = _shares(alike, [QUALITY])
        quality = {row["stem"]: bool(row[QUALITY]) for row in own}
        if not found:
            reference = quality
        elif shared := [stem for stem in quality if stem in reference]:
            standing.ahead = paired_shares([reference[s] for s in shared], [quality[s] for s in shared])
        found.append(standing)
    return found


def _measures_of(rows: Sequence[Row]) -> list[str]:
    known = (*SHAPES_MEASURES, "top5")
    return [name for name in known if any(row.get(name) is not None for row in rows)]


def _shares(rows: Sequence[Row], names: Sequence[str]) -> Iterator[tuple[str, Estimate]]:
    for name in names:
        told = [bool(row[name]) for row in rows if row.get(name) is not None]
        yield name, wilson(sum(told), len(told))
