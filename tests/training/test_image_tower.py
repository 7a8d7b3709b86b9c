"""The image tower's loss: zero when perfect, and a batch can be learnt by heart."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional as F

from triptych.models.image_tower import IMAGE_TOWER, ImageTower
from triptych.training.image_tower import Viewer, embed, embedding_loss, view_loss


def captions(count: int, width: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, width), dim=1)


def test_a_perfect_tower_has_no_loss_even_when_captions_repeat() -> None:
    text = captions(6, 32)
    text[3] = text[0]
    assert abs(float(embedding_loss(text, text))) < 1e-5
    assert float(embedding_loss(text.flip(0), text)) > 0.5


def test_one_batch_is_learnt_by_heart() -> None:
    config = IMAGE_TOWER["tiny"]
    tower = ImageTower(config)
    pixels, text = torch.rand(8, 3, 48, 40), captions(8, config.width)
    optimiser = torch.optim.AdamW(tower.parameters(), lr=3e-3)
    for _ in range(150):
        loss = embedding_loss(embed(tower, pixels), text)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.1


def test_an_embedding_can_lie_near_its_caption_and_keep_the_look_of_the_picture() -> None:
    config = dataclasses.replace(IMAGE_TOWER["tiny"], place_width=8)
    tower, viewer = ImageTower(config), Viewer(config.width)
    pixels = torch.rand(8, 3, 4, 4).repeat_interleave(12, 2).repeat_interleave(12, 3)
    text = captions(1, config.width).expand(8, -1)  # one caption for all: it says nothing of the look
    optimiser = torch.optim.AdamW([*tower.parameters(), *viewer.parameters()], lr=3e-3)
    for _ in range(200):
        embeds = embed(tower, pixels)
        loss = (1 - (embeds * text).sum(1)).mean() + 10 * view_loss(viewer, embeds, pixels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    plain = (pixels - pixels.mean(0)).square().mean()
    with torch.no_grad():
        embeds = embed(tower, pixels)
        assert view_loss(viewer, embeds, pixels) < 0.3 * plain
        assert (embeds * text).sum(1).min() > 0.6
