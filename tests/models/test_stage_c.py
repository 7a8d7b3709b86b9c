"""Stage C's options that no published network has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from triptych.checkpoints.diffusers_config import model_config
from triptych.checkpoints.files import PartInfo, write_part
from triptych.checkpoints.load import config_fields, load_part
from triptych.errors import CheckpointError
from triptych.models.scratch import Scratch
from triptych.models.stage_c import STAGE_C, StageC, at_size, embed_positions

MODULATED = dataclasses.replace(STAGE_C["tiny"], pooled_modulation=True)


def answer(network: StageC, pooled: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 3, 4, generator=generator)
    hidden = torch.randn(2, 5, 384, generator=generator)
    with torch.no_grad():
        return network.eval()(x, torch.tensor([0.2, 0.9]), hidden, pooled)


def randomised(network: StageC) -> StageC:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def test_a_fresh_modulation_changes_nothing() -> None:
    plain = randomised(StageC(STAGE_C["tiny"]))
    modulated = StageC(MODULATED)
    found = modulated.load_state_dict(plain.state_dict(), strict=False)
    assert found.unexpected_keys == []
    assert {name.split(".")[-2] for name in found.missing_keys} == {"mapper_pooled"}
    pooled = torch.randn(2, 384)
    assert torch.equal(answer(modulated, pooled), answer(plain, pooled))


def test_modulation_is_another_path_for_the_pooled_text() -> None:
    network = randomised(StageC(MODULATED))
    with torch.no_grad():  # shut the tokens of the pooled text, so that only the time blocks see it
        network.clip_txt_pooled_mapper.weight.zero_()
    first, second = (answer(network, torch.full((2, 384), value)) for value in (0.0, 0.05))
    assert (first - second).abs().max() > 1e-4


def test_modulated_weights_are_written_and_read_back(tmp_path: Path) -> None:
    network = randomised(StageC(MODULATED))
    info = PartInfo("stage_c", config=config_fields(MODULATED))
    write_part(tmp_path / "stage_c.safetensors", network.state_dict(), info)
    loaded, _ = load_part(tmp_path / "stage_c.safetensors", "stage_c")
    pooled = torch.randn(2, 384)
    assert torch.equal(answer(loaded, pooled), answer(network, pooled))


def test_diffusers_cannot_express_it() -> None:
    with pytest.raises(CheckpointError, match="pooled text"):
        model_config("stage_c", MODULATED)


PLACED = dataclasses.replace(STAGE_C["tiny"], positions=True)


def test_fresh_positions_change_nothing_and_trained_ones_tell_the_borders() -> None:
    plain, placed = randomised(StageC(STAGE_C["tiny"])), StageC(PLACED)
    assert set(placed.load_state_dict(plain.state_dict(), strict=False).missing_keys) == {
        "position_mapper.weight", "position_mapper.bias",
    }  # fmt: skip
    pooled = torch.zeros(2, 384)
    assert torch.equal(answer(placed, pooled), answer(plain, pooled))
    torch.nn.init.normal_(placed.position_mapper.weight)
    assert (answer(placed, pooled) - answer(plain, pooled)).abs().max() > 1e-3


def test_positions_are_the_same_at_the_borders_of_every_size_and_differ_everywhere() -> None:
    small, large = (embed_positions(torch.zeros(1, 1, side, 2 * side)) for side in (4, 64))
    assert large.shape == (64, 128, 16)
    assert len({tuple(row) for row in small.flatten(0, 1).tolist()}) == 32
    assert (small[0, 0] - large[8, 8]).abs().max() < 0.1  # the middle of the first latent of four


GUESSING = dataclasses.replace(STAGE_C["tiny"], guess=24)


def test_a_fresh_guess_changes_nothing_and_a_trained_one_follows_the_pooled_text() -> None:
    plain, guessing = randomised(StageC(STAGE_C["tiny"])), StageC(GUESSING)
    missing = guessing.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"guess", "guess_mapper"}
    pooled = torch.randn(2, 384)
    assert torch.equal(answer(guessing, pooled), answer(plain, pooled))
    torch.nn.init.normal_(guessing.guess_mapper.weight)
    with torch.no_grad():
        plain.clip_txt_pooled_mapper.weight.zero_()  # the only other way of the pooled text
        guessing.clip_txt_pooled_mapper.weight.zero_()
    told = answer(guessing, pooled) - answer(plain, pooled)
    assert (told[0] - told[1]).abs().max() > 1e-3


def test_a_guess_is_scaled_to_maps_of_other_sizes() -> None:
    guessed = torch.arange(64.0).view(1, 1, 8, 8)
    assert at_size(guessed, (8, 8)) is guessed
    doubled = at_size(guessed, (16, 16))
    assert doubled.shape == (1, 1, 16, 16)
    assert doubled.mean().item() == pytest.approx(guessed.mean().item(), abs=0.05)


def test_a_guess_keeps_its_form_in_the_middle_of_a_longer_map() -> None:
    guessed = torch.arange(64.0).view(1, 1, 8, 8)
    wide, high = at_size(guessed, (8, 12)), at_size(guessed, (12, 8))
    assert torch.equal(wide[..., 2:10], guessed)
    assert torch.equal(high[..., 2:10, :], guessed)
    assert torch.equal(wide[..., 0], guessed[..., 0])
    assert torch.equal(high[..., 11, :], guessed[..., 7, :])


def test_a_guess_is_made_once_for_all_steps_of_a_picture() -> None:
    network, pooled = randomised(StageC(GUESSING)).eval(), torch.randn(2, 384)
    made = []
    network.guess.register_forward_hook(lambda *call: made.append(call))
    scratch = Scratch(times=(0.9, 0.4))
    with torch.no_grad():
        for row, t in enumerate(scratch.times):
            scratch.row = row
            x = torch.randn(1, 16, 4, 6)
            hidden = torch.randn(2, 5, 384, generator=torch.Generator().manual_seed(0))
            both = network(x, torch.tensor([t]), hidden, pooled, scratch=scratch)
            alone = network(x, torch.tensor([t]), hidden[1:], pooled[1:])
            assert torch.allclose(both[1:], alone, atol=1e-5)  # guidance: one map, two conditions
    assert len(made) == 1 + 2  # once with the scratch, each time without


def test_diffusers_cannot_express_positions() -> None:
    with pytest.raises(CheckpointError, match="positions"):
        model_config("stage_c", PLACED)


def test_diffusers_cannot_express_a_guess() -> None:
    with pytest.raises(CheckpointError, match="guess"):
        model_config("stage_c", GUESSING)
