"""The recipe of the small image tower: land near the picture's caption in the text tower's space, and keep
the look of the picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.conditioning.encode import centre_square
from triptych.models.image_tower import ImageTower
from triptych.training.processes import everywhere

TEMPERATURE = 0.07  # CLIP's starting value [Radford 2021, section 2.5]
VIEW = 32  # pixels per side of what the embedding must be able to show
CONTRAST = 0.3  # weight of telling the batch's captions apart, beside being near one's own


def embed(tower: ImageTower, pixels: Tensor) -> Tensor:
    """Embeddings (B, width) of pictures (B, 3, H, W) in [0, 1], brought to the tower's size here."""
    return tower(centre_square(pixels, tower.side))


class Viewer(nn.Module):
    """A small picture out of an embedding, (B, width) -> (B, 3, VIEW, VIEW): a helper of training.

    Captions do not say how a thing looks, so an embedding that only lies near them forgets it. Around its
    caption there is room: giving a small view of the picture back makes the tower use it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(width, 128 * 4 * 4)
        sides = ((128, 64), (64, 32), (32, 3))
        self.steps = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in sides)

    def forward(self, embed: Tensor) -> Tensor:
        x = self.enter(embed * embed.shape[1] ** 0.5).unflatten(1, (128, 4, 4))
        for step in self.steps:
            x = step(F.interpolate(F.silu(x), scale_factor=2.0, mode="nearest"))
        return x


def view_loss(viewer: nn.Module, embed: Tensor, pixels: Tensor) -> Tensor:
    """Mean squared error, (), between a viewer's answer and the centre squares of `pixels` (B, 3, H, W)."""
    return F.mse_loss(viewer(embed), centre_square(pixels, VIEW))


def embedding_loss(image: Tensor, text: Tensor) -> Tensor:
    """Distance to the own caption, plus the contrastive loss of CLIP; both (B, width), length 1.

    Captions of drawings repeat, so the contrastive target is not the own caption alone: it is spread over the
    batch as the captions resemble each other [Andonian 2022].
    """
    image, text = everywhere(image), everywhere(text.detach())  # told apart among the global batch
    near = 1 - (image * text).sum(1)
    same = (text @ text.T / TEMPERATURE).softmax(1)  # (B, B), row: what a picture's caption resembles
    likeness = image @ text.T / TEMPERATURE
    # Images to captions and captions to images; `same` is built from a symmetric matrix, so it serves both.
    contrast = (F.cross_entropy(likeness, same) + F.cross_entropy(likeness.T, same)) / 2
    least = torch.special.entr(same).sum(1).mean()  # what a perfect tower reaches; so that 0 is perfect
    return near.mean() + CONTRAST * (contrast - least)
