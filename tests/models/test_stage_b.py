"""Stage B's option that no published network has."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from triptych.checkpoints.diffusers_config import model_config
from triptych.errors import CheckpointError
from triptych.models.stage_b import STAGE_B, StageB, unfolder

UNFOLDED = dataclasses.replace(STAGE_B["tiny"], semantic_unfold=4)


def answer(network: StageB, semantic: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, pooled = torch.randn(2, 4, 16, 24, generator=generator), torch.randn(2, 384, generator=generator)
    with torch.no_grad():
        return network.eval()(x, torch.tensor([0.2, 0.9]), semantic, pooled)


def test_a_fresh_unfolding_changes_nothing_and_a_trained_one_speaks() -> None:
    torch.manual_seed(0)
    plain, unfolded = StageB(STAGE_B["tiny"]), StageB(UNFOLDED)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    missing = unfolded.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"semantic_unfold"}
    semantic = torch.randn(2, 16, 2, 3)
    assert torch.equal(answer(unfolded, semantic), answer(plain, semantic))
    torch.nn.init.normal_(unfolded.semantic_unfold[2].weight)
    assert (answer(unfolded, semantic) - answer(plain, semantic)).abs().max() > 1e-3


def test_a_latent_speaks_to_its_own_place_and_its_neighbours_only() -> None:
    network = unfolder(16, 8, 4)
    semantic = torch.zeros(1, 16, 6, 6)
    before = network(semantic)
    semantic[:, :, 0, 0] = 1
    changed = (network(semantic) - before).abs().sum(1)[0] > 1e-6
    assert changed[:8, :8].all()
    assert not changed[8:].any()
    assert not changed[:, 8:].any()


def test_diffusers_cannot_express_it() -> None:
    with pytest.raises(CheckpointError, match="unfolds"):
        model_config("stage_b", UNFOLDED)
