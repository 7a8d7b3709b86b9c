"""What stands where, asked of Stage C while it learns from drawn shapes, whose truth is known.

Captions bind a colour and a form to a place ("a red cross to the left of a ring"), but the loss on latents
rewards that so little that a small network learns which words occur and not where they belong. A linear
layer, thrown away afterwards, must name from the middle of the network what stands at every latent; what it
cannot see in the noise it has to read in the caption.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.data.shapes import COLOURS, SHAPES
from triptych.models.blocks import channels_last, norm_last
from triptych.models.trunk import Trunk

UNKNOWN = -1  # nothing is known of this latent
BACKGROUND_WEIGHT = 0.25  # most latents show background
NAMES = (len(SHAPES) + 1, len(COLOURS) + 1)  # the last of each: background


def object_map(meta: Mapping[str, Any], size: tuple[int, int], latents: tuple[int, int]) -> Tensor | None:
    """Form and colour of what covers each latent, int8 (2, h, w), numbers in SHAPES and COLOURS.

    `meta` is a sample's, its boxes in pixels of a picture of `size` (width, height); `latents` is (h, w).
    The picture is used whole: a crop would move what the boxes say. None for all but drawn shapes: what other
    data calls "objects" may be anything.
    """
    objects = meta.get("objects")
    if meta.get("source") != "procedural" or not objects:
        return None
    height, width = latents
    found = torch.tensor(NAMES, dtype=torch.int8)[:, None, None].repeat(1, height, width) - 1
    for thing in objects:
        x0, y0, x1, y1 = thing["bbox"]
        left, right = _covered(x0 / size[0] * width, x1 / size[0] * width, width)
        top, bottom = _covered(y0 / size[1] * height, y1 / size[1] * height, height)
        found[0, top:bottom, left:right] = SHAPES.index(thing["shape"])
        found[1, top:bottom, left:right] = list(COLOURS).index(thing["colour"])
    return found


def _covered(start: float, stop: float, side: int) -> tuple[int, int]:
    """The latents from start to stop, at least one."""
    first = min(max(round(start), 0), side - 1)
    return first, min(max(round(stop), first + 1), side)


class Grounding(nn.Module):
    """Names form and colour at every place of a map (B, C, h, w): logits (B, 9 + 12, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.name = nn.Linear(width, sum(NAMES))

    def forward(self, x: Tensor) -> Tensor:
        return self.name(norm_last(channels_last(x))).movedim(-1, 1)


class Answer:
    """What a module answered in its last run: `map`."""

    def __init__(self, module: nn.Module) -> None:
        self.map: Tensor | None = None
        module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, given: Any, answer: Tensor) -> None:
        self.map = answer


def middle_of(trunk: Trunk) -> Answer:
    """What the deepest level hands to the way up, (B, C, h, w)."""
    deepest: Any = trunk.down_blocks[-1]
    return Answer(deepest[-1])


def grounding_loss(named: Tensor, objects: Tensor) -> Tensor:
    """Mean cross-entropy, (), of logits `named` (B, 21, h, w) on `objects` (B, 2, h, w), form plus colour.

    Rows of UNKNOWN do not count; 0 if there is nothing else.
    """
    form, colour = objects.long().unbind(1)
    weights = torch.where(form == NAMES[0] - 1, BACKGROUND_WEIGHT, 1.0) * (form != UNKNOWN)
    wrong = sum(
        F.cross_entropy(logits, wanted.clamp(min=0), reduction="none")
        for logits, wanted in zip(named.split(NAMES, dim=1), (form, colour), strict=True)
    )
    return (weights * wrong).sum() / weights.sum().clamp(min=1e-6)
