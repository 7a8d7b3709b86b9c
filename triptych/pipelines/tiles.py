"""Stage A a tile at a time: large pictures in bounded memory, without seams.

Every output pixel depends on latents at most `reach` away, because Stage A has no norm over the picture. So a
tile is decoded with that many latents around it, which are cut off again: the result is the whole decode's,
to rounding, and nothing is blended.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from triptych.models.stage_a import StageAConfig

Tile = tuple[int, int]  # rows and columns of latents_b


def reach(config: StageAConfig) -> int:
    """How many latents away the decoder of Stage A looks: a step for each block, doubled map or not."""
    outer = config.levels - 1  # levels outside the innermost: one doubling and one block each
    return config.bottleneck_blocks + 2 * outer


def widened(config: StageAConfig, tile: Tile, height: int, width: int) -> Tile:
    """Rows and columns of latents that are decoded for one tile of latents_b of `height` x `width`."""
    beside = 2 * reach(config)
    return min(height, tile[0] + beside), min(width, tile[1] + beside)


def decode_in_tiles(network: Any, latents_b: Tensor, tile: Tile | None, fused: bool = True) -> Tensor:
    """Pixels (B,3,4h,4w) of latents_b (B,4,h,w), as `StageA.decode`; None decodes everything at once."""
    height, width = latents_b.shape[-2:]
    if tile is None or (tile[0] >= height and tile[1] >= width):
        whole: Tensor = network.decode(latents_b, fused)
        return whole
    factor, around = 2**network.config.levels, reach(network.config)
    pixels = torch.empty(len(latents_b), 3, factor * height, factor * width, device=latents_b.device)
    for top, bottom in _spans(height, tile[0]):
        for left, right in _spans(width, tile[1]):
            above, before = max(0, top - around), max(0, left - around)
            part = latents_b[:, :, above : bottom + around, before : right + around]
            decoded = network.decode(part, fused)
            rows = slice(factor * (top - above), factor * (bottom - above))
            columns = slice(factor * (left - before), factor * (right - before))
            target = pixels[:, :, factor * top : factor * bottom, factor * left : factor * right]
            target.copy_(decoded[:, :, rows, columns])
    return pixels


def _spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, step):
        yield start, min(start + step, length)
