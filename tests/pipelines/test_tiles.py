"""Pictures decoded in tiles are those decoded whole, at any tile size, up to rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.tiny_cascade import randomise
from triptych.models.stage_a import STAGE_A, StageA
from triptych.pipelines.tiles import decode_in_tiles, reach, widened


@pytest.fixture(scope="module")
def stage_a() -> StageA:
    torch.manual_seed(0)
    network = randomise(StageA(dataclasses.replace(STAGE_A["tiny"], bottleneck_blocks=3)), 1)
    for name, parameter in network.named_parameters():
        if name.endswith("gammas"):  # blocks that look around with all their might
            parameter.data.fill_(0.7)
    return network.requires_grad_(False)


@pytest.mark.parametrize("tile", [(8, 8), (5, 40), (16, 7), (40, 40)])
def test_tiles_leave_no_seam(stage_a: StageA, tile: tuple[int, int]) -> None:
    latents = torch.randn(2, 4, 32, 24, generator=torch.Generator().manual_seed(2))
    whole = stage_a.decode(latents)
    assert torch.allclose(
        decode_in_tiles(stage_a, latents, tile), whole, atol=1e-5 * float(whole.abs().max())
    )


def test_the_decoder_looks_as_far_as_is_said(stage_a: StageA) -> None:
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(3))
    changed = latents.clone()
    changed[..., 16, 16] += 10
    moved = (stage_a.decode(changed) - stage_a.decode(latents)).abs().amax((0, 1)) > 0
    rows = moved.any(1).nonzero().flatten()
    far = max(64 - int(rows.min()), int(rows.max()) - 67) / 4
    assert reach(stage_a.config) - 2 <= far <= reach(stage_a.config)


def test_tiles_are_decoded_with_what_is_around_them() -> None:
    config = STAGE_A["full"]
    assert widened(config, (64, 256), 512, 256) == (64 + 2 * reach(config), 256)
