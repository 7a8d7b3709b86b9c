"""What steers a generation beside its text: pictures as embeddings, latents to start from, controls.

`Request` says in plain values what was asked; `Inputs` holds the tensors made from it. Text to image,
variations, image to image, control and inpainting are one pipeline with different inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from triptych.models.blocks import resize
from triptych.pipelines.request import Picture


@dataclass(frozen=True)
class Control:
    """What a ControlNet adds to Stage C: `residuals[k]` (1 or N,c,h,w), or None, before ConvBlock k.

    It acts on the steps between the fractions `begin` and `end` of the sampling (0 is the first step).
    """

    residuals: Sequence[Tensor | None]
    begin: float = 0.0
    end: float = 1.0

    def acts(self, step: int, steps: int) -> bool:
        return self.begin <= step / steps < self.end


@dataclass(frozen=True)
class Known:
    """Semantic latents (1 or N,16,h,w) that stay as they are where `drawn` (1,1,h,w) is 0 and not 1."""

    latents_c: Tensor
    drawn: Tensor


@dataclass(frozen=True)
class Inputs:
    """Tensors have one row for all pictures, or one row for each picture of the request.

    `latents_c` skips Stage C, `latents_b` Stage B as well. With `Request.strength` below 1 Stage C starts
    from `start`.
    """

    image_embed: Tensor | None = None  # (1 or N,k,Wi) embeddings of k pictures to follow
    text_pooled: Tensor | None = None  # (1 or N,1,Wp) takes the place of an empty prompt's pooled vector
    start: Tensor | None = None  # (1 or N,16,h,w) the picture to change
    latents_c: Tensor | None = None  # (1 or N,16,h,w) to be decoded as they are
    latents_b: Tensor | None = None  # (1 or N,4,H,W) to be decoded as they are
    controls: tuple[Control, ...] = ()
    known: Known | None = None  # what Stage C need not draw
    finish: Callable[[Image.Image, Picture], Image.Image] | None = None  # last touch on the finished picture

    def latents(self) -> list[tuple[str, Tensor]]:
        """All latents among the inputs, with their kind: "latents_c" or "latents_b"."""
        given = (("latents_c", self.start), ("latents_c", self.latents_c), ("latents_b", self.latents_b))
        return [(kind, latents) for kind, latents in given if latents is not None]


def rows(tensor: Tensor, pictures: Sequence[Picture]) -> Tensor:
    """The rows of `tensor` that belong to `pictures`; a single row belongs to all of them."""
    if len(tensor) == 1:
        return tensor.expand(len(pictures), *tensor.shape[1:])
    return tensor[[picture.index for picture in pictures]]


def combine(
    controls: Sequence[Control], step: int, steps: int, pictures: Sequence[Picture]
) -> list[Tensor | None]:
    """The sum of the residuals that act at a step, for the rows of `pictures`; empty when none acts."""
    acting = [control.residuals for control in controls if control.acts(step, steps)]
    total: list[Tensor | None] = [None] * max(map(len, acting), default=0)
    for residuals in acting:
        for index, residual in enumerate(residuals):
            if residual is not None:
                own, before = rows(residual, pictures), total[index]
                total[index] = own if before is None else before + resize(own, before.shape[-2:])
    return total


NOTHING = Inputs()
