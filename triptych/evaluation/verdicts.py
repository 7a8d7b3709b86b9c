"""One picture against what its prompt says must be seen: which judge looks depends on the prompt.

truth has "objects"     plain shapes: the pixel judge (`judges`)
truth has "concept"     an icon: the icon judge (`icon_judge`)
truth has "include"     things of photographs: a detector (`detector`), which has to be given
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

from triptych.errors import DataError
from triptych.evaluation.icon_judge import load_judge
from triptych.evaluation.judges import judge_shapes
from triptych.evaluation.prompts import StudyPrompt

if TYPE_CHECKING:
    from triptych.evaluation.detector import Detector

QUALITY = "right"  # the one verdict per picture that plots and comparisons of systems use
SHAPES_MEASURES = ("right", "objects", "colours", "shapes", "count", "relations", "background")
MEASURES = (*SHAPES_MEASURES, "top5")
TOP = 5
Row = dict[str, Any]


def can_judge(prompt: StudyPrompt, detector: Detector | None) -> bool:
    """Whether there is a judge for what the prompt says must be seen."""
    return bool(prompt.truth) and ("include" not in prompt.truth or detector is not None)


def verdict_of(image: Image.Image, prompt: StudyPrompt, detector: Detector | None = None) -> Row:
    """The measures of one picture: QUALITY and more, True, False or None, and what was "seen".

    Raises DataError when the prompt's truth is of no known kind.
    """
    truth = prompt.truth
    if "concept" in truth:
        judge = load_judge()
        (rank,) = judge.rank([image], [truth["concept"]])
        return {QUALITY: rank == 1, f"top{TOP}": rank <= TOP, "rank": rank}
    if "include" in truth and detector is not None:
        return detector.verdict(image, truth)
    if "objects" not in truth:
        raise DataError(
            f'The truth of "{prompt.prompt[:60]}" names no objects, no concept and nothing to include.'
        )
    verdict = judge_shapes(image, truth["objects"], truth.get("relations", ()), truth.get("background"))
    measures: Row = {name: getattr(verdict, name) for name in SHAPES_MEASURES}
    return {**measures, "seen": [f"{seen.colour} {seen.shape}" for seen in verdict.seen.objects]}
