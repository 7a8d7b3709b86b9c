"""What the guess of Stage C (`models/stage_c.py`) learns from.

A perceptron remembers what words look like, but words it never heard together lead it between what it knows.
Two things keep it sure there. It hears its words with noise; and where samples name a prototype, the picture
that a thing's bare name means, it learns that one whatever style a caption asks for: the guess says what is
drawn, and the blocks, told the guess and the caption, how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from triptych.data.sources import to_canvas
from triptych.diffusion.loss import per_sample_loss
from triptych.images import to_pixels
from triptych.models.stage_c import GUESS_SIDE, at_size

UNNAMED = float("nan")  # latents of the prototype of a sample that names none


def blur_words(guess: nn.Module, amount: float) -> None:
    """While it learns, give a guess its pooled text (B, ..., W) with noise, for each row between nothing and
    `amount` of the text's own deviation."""

    def disturbed(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not module.training:
            return None
        text = given[0]
        share = amount * torch.rand(len(text), *[1] * (text.dim() - 1), device=text.device)
        return (text + share * text.std(-1, keepdim=True) * torch.randn_like(text),)

    if amount:
        guess.register_forward_pre_hook(disturbed)


@torch.no_grad()
def encode_prototypes(semantic: Any, pictures: Sequence[Image.Image | None], device: torch.device) -> Tensor:
    """Latents (B, C, 8, 8) of pictures on a square, rows of UNNAMED for those that are None."""
    side = GUESS_SIDE * semantic.config.stride
    shape = (len(pictures), semantic.config.latent_channels, GUESS_SIDE, GUESS_SIDE)
    latents = torch.full(shape, UNNAMED, device=device)
    known = [place for place, picture in enumerate(pictures) if picture is not None]
    if known:
        shown = [to_canvas(picture, side, side) for picture in pictures if picture is not None]
        latents[known] = semantic(to_pixels(shown).to(device))
    return latents


def guess_loss(guessed: Tensor, own: Tensor, prototype: Tensor | None, weigh: Tensor | None = None) -> Tensor:
    """Mean squared error, (), of a guess (B, C, 8, 8): from `prototype` (B, C, 8, 8) in rows that are known,
    else from the sample's own latents (B, C, h, w), whose places count as `weigh` (B, 1, h, w) says."""
    missed = per_sample_loss(at_size(guessed, own.shape[-2:]), own, weigh)
    if prototype is None:
        return missed.mean()
    known = ~prototype.flatten(1).isnan().any(1)
    return torch.where(known, per_sample_loss(guessed, prototype.nan_to_num(0.0)), missed).mean()
