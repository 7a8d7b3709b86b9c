"""Any prompts drawn by one model, or pictures that are there already, looked at by every judge asked for.

Where a prompt says what must be seen, `verdicts` looks whether it is; published judges (`scorers`) give each
picture a number. The rows pair with those of another run (`runs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from triptych.errors import DataError
from triptych.evaluation.evaluate import Progress, Report, make_pictures
from triptych.evaluation.metrics import mean_interval, wilson
from triptych.evaluation.prompts import StudyPrompt
from triptych.evaluation.systems import PICTURE_SUFFIXES
from triptych.evaluation.verdicts import MEASURES, can_judge, verdict_of
from triptych.images import read_metadata, read_picture
from triptych.pipelines.cascade import Cascade

if TYPE_CHECKING:
    from triptych.evaluation.detector import Detector
    from triptych.evaluation.scorers import Scorer

TOGETHER = 32  # stored pictures held in memory for the judges
Row = dict[str, Any]


def evaluate_prompts(
    cascade: Cascade,
    prompts: Sequence[StudyPrompt],
    seeds: Sequence[int] = (0,),
    progress: Progress | None = None,
    scorers: Sequence[Scorer] = (),
    detector: Detector | None = None,
    **settings: Any,
) -> Report:
    """Draw each prompt with each seed, and judge the pictures. `settings` are fields of `Request`."""
    _check_judged(prompts, scorers, detector)
    images, drawn, used = make_pictures(cascade, [p.prompt for p in prompts], seeds, progress, **settings)
    rows: list[Row] = [
        {"prompt": prompt.prompt, "seed": seed, "category": prompt.category}
        for prompt, seed in zip(list(prompts) * len(seeds), drawn, strict=True)
    ]
    judge_rows(rows, images, list(prompts) * len(seeds), scorers, detector)
    return Report("scores", measures_of(rows, scorers), rows, used, images)


def evaluate_pictures(
    folder: Path,
    scorers: Sequence[Scorer] = (),
    count: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Judge the pictures of a folder by the prompts that their files hold, as `generate` writes them.

    Raises DataError when there are none, or one does not know its prompt.
    """
    if not scorers:
        raise DataError("Pictures without a truth need judges: name some, such as --judges clipscore.")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)[:count]
    if not paths:
        raise DataError(f"{folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)}).")
    rows: list[Row] = []
    for start in range(0, len(paths), TOGETHER):
        some = paths[start : start + TOGETHER]
        told = [_stored(path) for path in some]
        rows += judge_rows(told, [read_picture(path) for path in some], None, scorers, None)
        if progress is not None:
            progress(len(rows), len(paths))
    return Report("scores", measures_of(rows, scorers), rows, {"pictures": str(folder)})


def judge_rows(
    rows: list[Row],
    images: Sequence[Image.Image],
    prompts: Sequence[StudyPrompt] | None,
    scorers: Sequence[Scorer],
    detector: Detector | None,
) -> list[Row]:
    """Add to the rows of pictures what every judge says; `prompts` for those that look for a truth."""
    for row, image, prompt in zip(rows, images, prompts or (), strict=prompts is not None):
        if can_judge(prompt, detector):
            row.update(verdict_of(image, prompt, detector))
    for scorer in scorers:
        for row, value in zip(rows, scorer.of(images, [row["prompt"] for row in rows]), strict=True):
            row[scorer.name] = value
    return rows


def measures_of(rows: Sequence[Row], scorers: Sequence[Scorer]) -> dict[str, Any]:
    """Shares of pictures for verdicts, means for numbers, each with its interval."""
    found: dict[str, Any] = {}
    for name in MEASURES:
        told = [bool(row[name]) for row in rows if row.get(name) is not None]
        if told:
            found[name] = wilson(sum(told), len(told))
    return found | {s.name: mean_interval([row[s.name] for row in rows]) for s in scorers}


def _check_judged(
    prompts: Sequence[StudyPrompt], scorers: Sequence[Scorer], detector: Detector | None
) -> None:
    """Before drawing: is there a judge for anything?"""
    if not scorers and not any(can_judge(prompt, detector) for prompt in prompts):
        raise DataError(
            "Nothing judges these prompts: name judges (--judges clipscore, or detector for things), or "
            "prompts that say what must be seen, such as structured."
        )


def _stored(path: Path) -> Row:
    metadata = read_metadata(path)
    if not isinstance(metadata.get("prompt"), str):
        raise DataError(f"{path} does not hold its prompt, as pictures of triptych do.")
    return {"prompt": metadata["prompt"], "seed": metadata.get("seed"), "file": path.name}
