"""The image tower's loss: zero when perfect, and a batch can be learnt by heart."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from triptych.models.image_tower import IMAGE_TOWER, ImageTower
from triptych.training.image_tower import embedding_loss, image_tower_loss


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
        loss = image_tower_loss(tower, pixels, text)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.1
