"""What the guess of Stage C (`models/stage_c.py`) learns from.

A perceptron remembers what words look like, but words it never heard together lead it between what it knows.
Two things keep it sure there. It hears its words disturbed, by noise and by the differences that other words
for one picture make; and where samples name a prototype, the picture that a thing's bare name means, it
learns that one whatever style a caption asks for: the guess says what is drawn, and the blocks, told the
guess and the caption, how.
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


class BlurredWords:
    """Disturbs the pooled text (B, ..., W) that a guess is given while it learns, so that words it never
    heard lead it to the nearest that it did.

    Noise points everywhere, for each row between nothing and `noise` of the text's own deviation, mostly
    little. Other words for one thing point along few of those directions: so each row is also moved as if
    from one caption to another, between nothing and `rewording` of the difference that two captions of one
    picture of the batch make.
    """

    def __init__(self, guess: nn.Module, noise: float, rewording: float) -> None:
        self.noise, self.rewording = noise, rewording
        self.differences: Tensor | None = None  # (B, ..., W) of this batch, zero in rows that have none
        self.rows: Tensor | None = None  # (B,) bool: those to disturb; None: all
        if noise or rewording:
            guess.register_forward_pre_hook(self.disturbed)

    def hear(self, text: Tensor, other: Tensor | None, prototype: Tensor | None) -> None:
        """Take a batch: pooled texts of its captions and of other captions of the same pictures (B, ..., W),
        and prototypes as `guess_loss` takes them. With those, rows that name none stay undisturbed: their
        words say exactly what is drawn, as those of drawn shapes do."""
        self.differences = None if other is None else (text - other.to(text)).detach()
        self.rows = None if prototype is None else known_rows(prototype)

    def disturbed(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not module.training:
            return None
        text = given[0]
        one = (len(text), *[1] * (text.dim() - 1))

        def share() -> Tensor:
            return torch.rand(one, device=text.device)

        moved = self.noise * share().square() * text.std(-1, keepdim=True) * torch.randn_like(text)
        if self.rewording and self.differences is not None:
            differences = self.differences.to(text)
            donors = differences.flatten(1).any(1).nonzero()[:, 0]
            if len(donors):
                drawn = donors[torch.randint(len(donors), (len(text),), device=text.device)]
                moved = moved + self.rewording * share() * differences[drawn]
        if self.rows is not None:
            moved = moved * self.rows.to(moved).view(one)
        return (text + moved,)


def no_prototypes(count: int, channels: int, device: torch.device) -> Tensor:
    """Prototypes (count, channels, 8, 8) of samples that name none."""
    return torch.full((count, channels, GUESS_SIDE, GUESS_SIDE), UNNAMED, device=device)


def known_rows(prototype: Tensor) -> Tensor:
    """Which rows of prototypes (B, C, 8, 8) some sample names, (B,) bool."""
    return ~prototype.flatten(1).isnan().any(1)


@torch.no_grad()
def encode_prototypes(semantic: Any, pictures: Sequence[Image.Image | None], device: torch.device) -> Tensor:
    """Latents (B, C, 8, 8) of pictures on a square, rows of UNNAMED for those that are None."""
    side = GUESS_SIDE * semantic.config.stride
    latents = no_prototypes(len(pictures), semantic.config.latent_channels, device)
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
    return torch.where(
        known_rows(prototype), per_sample_loss(guessed, prototype.nan_to_num(0.0)), missed
    ).mean()
