"""The lower half of the cascade alone: given `latents_c` -> latents_b -> pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from triptych.errors import RequestError
from triptych.pipelines.cascade import Cascade
from triptych.pipelines.request import Request


def decode_latents(
    cascade: Cascade, latents_c: Tensor, prompts: Sequence[str], seeds: Sequence[int], **settings: Any
) -> list[Image.Image]:
    """Stage B and Stage A on given `latents_c` (B,16,h,w), one prompt and one seed for each of the B
    pictures.

    `settings` are fields of `Request`; `size` must be the one the latents belong to. Errors are those of
    `Cascade.generate`.
    """
    request = cascade.resolve(Request(prompt=tuple(prompts), seeds=tuple(seeds), **settings))
    chosen = cascade._plan(request)
    cascade.parts.weights, cascade.parts.keep = chosen.weights, chosen.keep
    pictures = request.pictures()
    shape = cascade._size_c(request)
    if len(latents_c) != len(pictures) or tuple(latents_c.shape[2:]) != shape:
        raise RequestError(
            f"Latents of shape {tuple(latents_c.shape)} were given for {len(pictures)} pictures, whose "
            f"latents are {shape[0]}x{shape[1]}."
        )
    images: dict[int, Image.Image] = {}
    for batch in cascade._read_prompts(request, pictures):
        batch.latents_c = latents_c[[picture.index for picture in batch.pictures]]
        for _ in cascade._stage_b(request, batch):
            pass
        for event in cascade._stage_a(request, batch):
            if event.image is not None:
                images[batch.pictures[event.step - 1].index] = event.image
    return [images[picture.index] for picture in pictures]
