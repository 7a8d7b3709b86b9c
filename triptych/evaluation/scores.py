"""The pictures of a comparison judged automatically, and how every system did.

Where a prompt says what must be seen, a judge looks whether it is (`verdicts`): measures are shares of
pictures. Judges of other kinds, such as CLIPScore (`scorers`), give every picture a number. What neither can
tell needs people (`triptych study`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.evaluation.compare import read_json, read_records, stored_prompts
from triptych.evaluation.lines import read_lines
from triptych.evaluation.metrics import Estimate, mean_interval, wilson
from triptych.evaluation.prompts import StudyPrompt
from triptych.evaluation.statistics import paired_difference, paired_shares
from triptych.evaluation.tables import write_rows
from triptych.evaluation.verdicts import MEASURES, QUALITY, can_judge, verdict_of
from triptych.images import read_metadata, read_picture, replace

if TYPE_CHECKING:
    from triptych.evaluation.detector import Detector
    from triptych.evaluation.scorers import Scorer

SHOWN = ("steps", "guidance", "sampler", "decoder_steps", "decoder_guidance", "size")
TOGETHER = 32  # pictures held in memory for a judge
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
    measures: dict[str, Estimate] = field(default_factory=dict)  # shares of pictures
    categories: dict[str, Estimate] = field(default_factory=dict)  # of QUALITY, by category of prompt
    scores: dict[str, Estimate] = field(default_factory=dict)  # means of judges' numbers
    ahead: Estimate | None = None  # of QUALITY, against the first system, over the same pictures
    scores_ahead: dict[str, Estimate] = field(default_factory=dict)


def score_pictures(out: Path, scorers: Sequence[Scorer] = (), detector: Detector | None = None) -> list[Row]:
    """Judge every picture that a judge can say something about; one row each.

    A row has "system", "stem", "index", "seed", "prompt", "category", the measures (QUALITY first) and the
    number of every scorer under its name. scores.jsonl keeps the rows, so that nothing is judged twice;
    results.jsonl (and results.parquet) has a row for every picture, with seconds and memory.
    """
    prompts = stored_prompts(out)
    kept = {(row["system"], row["stem"]): row for row in read_lines(out / "scores.jsonl") if "stem" in row}
    rows: list[Row] = []
    results: list[Row] = []
    for system in read_json(out / "study.json")["systems"]:
        records = list(read_records(system, out))
        for start in range(0, len(records), TOGETHER):
            some = records[start : start + TOGETHER]
            judged = [_kept_row(system, r, prompts[r["index"]], kept) for r in some]
            _judge(out, system, judged, [prompts[r["index"]] for r in some], scorers, detector)
            rows += [row for row in judged if row.keys() - _IDENTITY]
            results += [_result(row, prompts[r["index"]], r) for row, r in zip(judged, some, strict=True)]
    if rows:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace(out / "scores.jsonl", text.encode())
    write_rows(results, out / "results")
    return rows


_IDENTITY = {"system", "stem", "index", "seed", "time", "prompt", "category"}


def _kept_row(system: str, record: Row, prompt: StudyPrompt, kept: dict[tuple[str, str], Row]) -> Row:
    """What is known of a picture already, unless it was drawn anew since."""
    before = kept.get((system, record["stem"]))
    if before and before["time"] == record["time"]:
        return before
    about = {key: record[key] for key in ("stem", "index", "seed", "time")}
    return {"system": system, **about, "prompt": prompt.prompt, "category": prompt.category}


def _judge(
    out: Path,
    system: str,
    rows: Sequence[Row],
    prompts: Sequence[StudyPrompt],
    scorers: Sequence[Scorer],
    detector: Detector | None,
) -> None:
    """Add to the rows of a few pictures what their judges say and the rows do not have yet."""
    for row, prompt in zip(rows, prompts, strict=True):
        if QUALITY not in row and can_judge(prompt, detector):
            row.update(verdict_of(read_picture(_path(out, system, row)), prompt, detector))
    for scorer in scorers:
        todo = [row for row in rows if scorer.name not in row]
        images = [read_picture(_path(out, system, row)) for row in todo]
        for row, value in zip(todo, scorer.of(images, [row["prompt"] for row in todo]), strict=True):
            row[scorer.name] = round(value, 6)


def _path(out: Path, system: str, row: Row) -> Path:
    return out / "pictures" / system / f"{row['stem']}.png"


def _result(row: Row, prompt: StudyPrompt, record: Row) -> Row:
    more = {"challenge": prompt.challenge, "source": prompt.source}
    measured = {key: record.get(key) for key in ("seconds", "peak_bytes", "peak_of")}
    told = {key: value for key, value in row.items() if key != "time"}
    width, height = record["size"]
    return {**told, **more, "width": width, "height": height, **measured}


def standings(out: Path, rows: Sequence[Row], scorers: Sequence[str] = ()) -> list[Standing]:
    """Every system of a comparison in its order, from the records and from the rows of `score_pictures`."""
    found: list[Standing] = []
    first: list[Row] = []
    for name, settings in read_json(out / "study.json")["systems"].items():
        records = list(read_records(name, out))
        if not records:
            continue
        seconds = statistics.median(record["seconds"] for record in records)
        peaks = [(r["peak_bytes"], r["peak_of"]) for r in records if "peak_bytes" in r]
        settings = {**settings, **_used(out, name, records[0]["stem"])}
        standing = Standing(name, settings, len(records), seconds, *(max(peaks) if peaks else (None, "")))
        own = [row for row in rows if row["system"] == name]
        judged = [row for row in own if QUALITY in row]
        standing.measures = dict(_shares(judged, _measures_of(judged)))
        for category in dict.fromkeys(row["category"] for row in judged):
            alike = [row for row in judged if row["category"] == category]
            ((_, standing.categories[category or "other"]),) = _shares(alike, [QUALITY])
        standing.scores = {s: mean_interval([row[s] for row in own if s in row]) for s in scorers}
        if found:
            a, b = _paired(first, own, QUALITY)
            standing.ahead = paired_shares(a, b) if a else None
            pairs = {scorer: _paired(first, own, scorer) for scorer in scorers}
            standing.scores_ahead = {s: paired_difference(*pair) for s, pair in pairs.items() if pair[0]}
        else:
            first = own
        found.append(standing)
    return found


def _used(out: Path, system: str, stem: str) -> Row:
    """The settings that a triptych system's picture was made with, defaults included."""
    request = read_metadata(out / "pictures" / system / f"{stem}.png").get("request", {})
    return {name: request[name] for name in SHOWN if request.get(name) is not None}


def _paired(first: Sequence[Row], second: Sequence[Row], name: str) -> tuple[list[Any], list[Any]]:
    """The values of both systems where both have one, picture by picture."""
    before = {row["stem"]: row[name] for row in first if row.get(name) is not None}
    shared = [row for row in second if row["stem"] in before and row.get(name) is not None]
    return [before[row["stem"]] for row in shared], [row[name] for row in shared]


def _measures_of(rows: Sequence[Row]) -> list[str]:
    return [name for name in MEASURES if any(row.get(name) is not None for row in rows)]


def _shares(rows: Sequence[Row], names: Sequence[str]) -> Iterator[tuple[str, Estimate]]:
    for name in names:
        told = [bool(row[name]) for row in rows if row.get(name) is not None]
        yield name, wilson(sum(told), len(told))
