"""Which things a picture shows, and whether its prompt asks for those, after GenEval [Ghosh 2023].

Any object detector of transformers from a local folder, trained on COCO's classes. The rules are GenEval's:
every thing asked for must be seen as often as asked, not as often as `exclude` says, in its colour, and on
its side of the other. What differs: GenEval segments with Mask2Former and asks CLIP for the colour; here the
detector gives boxes, and a thing's colour is that of most pixels in the middle of its box which the rim
around it does not have. Numbers compare between systems judged by one detector, not with GenEval's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from triptych.errors import CheckpointError, DataError, nearest
from triptych.evaluation.judge_weights import find_judge
from triptych.evaluation.judges import to_lab

THRESHOLD = 0.3  # least confidence of a thing [Ghosh 2023, section 3.2]
COUNT_THRESHOLD = 0.5  # of a thing that is counted: GenEval takes 0.9 of a detector that is surer
OVERLAP = 0.7  # boxes of one class that share more than this are one thing
NEAR = 0.1  # of both sizes, within which nothing is left of or above anything [Ghosh 2023, section 3.2]
SIDEWAYS = 0.5  # least share of a direction that counts
PALETTE = {
    "red": (200, 30, 35),
    "orange": (240, 130, 25),
    "yellow": (245, 215, 50),
    "green": (50, 140, 60),
    "blue": (40, 85, 180),
    "purple": (120, 55, 150),
    "pink": (240, 150, 185),
    "brown": (115, 75, 45),
    "black": (25, 25, 25),
    "white": (240, 240, 240),
    "grey": (130, 130, 130),
}
# Names that detectors and prompt files use for COCO's.
ALIASES = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "computer mouse": "mouse",
    "computer keyboard": "keyboard",
    "tv remote": "remote",
    "gray": "grey",
}
AXES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
Row = dict[str, Any]


@dataclass(frozen=True)
class Thing:
    """One thing seen: its class, how sure that is in [0,1], and its box (x0, y0, x1, y1) in pixels."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]


class Detector:
    """An object detector of transformers with its own preparation of pictures."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        try:
            self.prepare: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            network: Any = AutoModelForObjectDetection.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, ImportError) as error:
            said = str(error).strip().splitlines()[0][:200]
            raise CheckpointError(f"{folder} holds no object detector of transformers: {said}") from None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network.to(self.device).float().eval()
        self.names = {n: plain_name(name) for n, name in self.network.config.id2label.items()}

    @torch.no_grad()
    def see(self, image: Image.Image, threshold: float = THRESHOLD) -> list[Thing]:
        """Everything seen with at least this confidence, the surest first, each thing once."""
        image = image.convert("RGB")
        answer = self.network(**self.prepare(images=[image], return_tensors="pt").to(self.device))
        size = [(image.height, image.width)]
        (found,) = self.prepare.post_process_object_detection(answer, threshold=threshold, target_sizes=size)
        things = []
        for score, label, box in zip(found["scores"], found["labels"], found["boxes"], strict=True):
            x0, y0, x1, y1 = box.tolist()
            name = self.names.get(int(label), str(int(label)))
            things.append(Thing(name, float(score), (x0, y0, x1, y1)))
        return apart(sorted(things, key=lambda thing: -thing.confidence))

    def verdict(self, image: Image.Image, truth: Row) -> Row:
        """The measures of `verdicts` for a truth with "include" and "exclude". Raises DataError."""
        for asked in (*truth["include"], *truth.get("exclude", ())):
            if plain_name(asked["class"]) not in self.names.values():
                known = nearest(plain_name(asked["class"]), sorted(set(self.names.values())))
                raise DataError(f'The detector does not know "{asked["class"]}": {known}.')
        return judge_things(image, self.see(image), truth)


def open_detector(weights: Path | None) -> Detector:
    """The detector in WEIGHTS/detector. Raises CheckpointError that says how to get one."""
    return Detector(find_judge("detector", weights).folder)


def judge_things(image: Image.Image, things: Sequence[Thing], truth: Row) -> Row:
    """Whether `things` are those that the truth asks for; None where nothing is asked."""
    groups = [_of_class(things, asked) for asked in truth["include"]]
    enough = [len(group) >= asked["count"] for group, asked in zip(groups, truth["include"], strict=True)]
    counted = any(asked["count"] > 1 for asked in truth["include"]) or bool(truth.get("exclude"))
    many = [len(_of_class(things, asked, True)) >= asked["count"] for asked in truth.get("exclude", ())]
    colours, relations = [], []
    for group, asked in zip(groups, truth["include"], strict=True):
        kept = group[: asked["count"]]
        if "color" in asked:
            told = [colour_of(image, thing.box) == plain_name(asked["color"]) for thing in kept]
            colours.append(len(kept) == asked["count"] and all(told))
        if "position" in asked:
            position, other = asked["position"]
            target = groups[other][: truth["include"][other]["count"]]
            pairs = [stands(one.box, position, two.box) for one in kept for two in target]
            relations.append(bool(pairs) and all(pairs))
    right = all((*enough, *colours, *relations)) and not any(many)
    return {
        "right": right,
        "objects": all(map(bool, groups)),
        "count": (all(enough) and not any(many)) if counted else None,
        "colours": all(colours) if colours else None,
        "relations": all(relations) if relations else None,
        "seen": [thing.name for thing in things],
    }


def _of_class(things: Sequence[Thing], asked: Row, counting: bool = False) -> list[Thing]:
    least = COUNT_THRESHOLD if counting or asked["count"] > 1 else THRESHOLD
    wanted = plain_name(asked["class"])
    return [thing for thing in things if thing.name == wanted and thing.confidence >= least]


def plain_name(name: str) -> str:
    """COCO's name of a class, in lower case."""
    name = name.strip().lower().replace("_", " ")
    return ALIASES.get(name, name)


def apart(things: Sequence[Thing]) -> list[Thing]:
    """Things without those that a surer one of their class covers."""
    kept: list[Thing] = []
    for thing in things:
        if all(k.name != thing.name or overlap(k.box, thing.box) <= OVERLAP for k in kept):
            kept.append(thing)
    return kept


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """The shared area of two boxes over the area of both together."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / both if both > 0 else 0.0


def stands(one: Sequence[float], position: str, other: Sequence[float]) -> bool:
    """Whether the first box is "left of", "right of", "above" or "below" the second. Raises DataError."""
    if position not in AXES:
        raise DataError(f'There is no position "{position}": {nearest(position, AXES)}.')
    gaps = []
    for axis in (0, 1):
        gap = (one[axis] + one[axis + 2] - other[axis] - other[axis + 2]) / 2
        reach = NEAR * (one[axis + 2] - one[axis] + other[axis + 2] - other[axis])
        gaps.append(float(np.sign(gap) * max(0.0, abs(gap) - reach)))
    axis, side = AXES[position]
    length = float(np.hypot(gaps[0], gaps[1]))
    return length > 0 and side * gaps[axis] / length > SIDEWAYS


def colour_of(image: Image.Image, box: Sequence[float]) -> str:
    """The colour of the thing in a box: the commonest in its middle that the rim around it does not have."""
    names = _named_pixels(image)
    height, width = names.shape
    x0, y0, x1, y1 = (round(value) for value in box)
    across, down = max(1, (x1 - x0) // 5), max(1, (y1 - y0) // 5)
    middle = _cut(names, x0 + across, y0 + down, x1 - across, y1 - down)
    whole = np.zeros((height, width), dtype=bool)
    whole[max(0, y0 - down) : y1 + down, max(0, x0 - across) : x1 + across] = True
    whole[max(0, y0) : y1, max(0, x0) : x1] = False
    rim = Counter(names[whole].tolist())
    seen = Counter(middle.ravel().tolist())
    around = {name for name, times in rim.items() if times > 0.25 * rim.total()}
    own = {name: times for name, times in seen.items() if name not in around}
    # Little of another colour is a detail; then the thing has the colour of its surroundings.
    best = own if own and max(own.values()) >= 0.2 * seen.total() else dict(seen)
    return list(PALETTE)[max(best, key=lambda name: best[name])]


def _named_pixels(image: Image.Image) -> np.ndarray[Any, np.dtype[Any]]:
    """The number in PALETTE of every pixel's colour (H,W)."""
    known = to_lab(np.array(list(PALETTE.values())))
    lab = to_lab(np.asarray(image.convert("RGB")))
    far = np.stack([((lab - colour) ** 2).sum(-1) for colour in known])
    return np.asarray(far.argmin(0))


def _cut(names: np.ndarray[Any, np.dtype[Any]], x0: int, y0: int, x1: int, y1: int) -> Any:
    height, width = names.shape
    x0, y0 = min(max(0, x0), width - 1), min(max(0, y0), height - 1)
    return names[y0 : max(y0 + 1, y1), x0 : max(x0 + 1, x1)]
