"""The recipe of the small image tower: land where the text tower puts the picture's caption."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from triptych.conditioning.encode import centre_square
from triptych.models.image_tower import ImageTower

TEMPERATURE = 0.07  # CLIP's starting value [Radford 2021, section 2.5]
CONTRAST = 0.3  # weight of telling the batch's captions apart, beside being near one's own


def image_tower_loss(tower: ImageTower, pixels: Tensor, pooled: Tensor) -> Tensor:
    """Scalar loss of `tower` on pictures (B, 3, H, W) in [0, 1] and their captions' `pooled` (B, width).

    The pictures are brought to the tower's size here. Each row of `pooled` has length 1.
    """
    return embedding_loss(tower(centre_square(pixels, tower.side)), pooled)


def embedding_loss(image: Tensor, text: Tensor) -> Tensor:
    """Distance to the own caption, plus the contrastive loss of CLIP; both (B, width), length 1.

    Captions of drawings repeat, so the contrastive target is not the own caption alone: it is spread over the
    batch as the captions resemble each other [Andonian 2022].
    """
    text = text.detach()
    near = 1 - (image * text).sum(1)
    same = (text @ text.T / TEMPERATURE).softmax(1)  # (B, B), row: what a picture's caption resembles
    likeness = image @ text.T / TEMPERATURE
    # Images to captions and captions to images; `same` is built from a symmetric matrix, so it serves both.
    contrast = (F.cross_entropy(likeness, same) + F.cross_entropy(likeness.T, same)) / 2
    least = torch.special.entr(same).sum(1).mean()  # what a perfect tower reaches; so that 0 is perfect
    return near.mean() + CONTRAST * (contrast - least)
