"""The text tower learns beside Stage C where it is asked to, and generation loads what it became."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from triptych.checkpoints.catalog import package_folder
from triptych.conditioning.encode import load_text_encoder
from triptych.errors import SettingsError
from triptych.training.config import check_settings, read_settings
from triptych.training.loop import train

TINY = Path(__file__).parents[2] / "recipes" / "tiny" / "stage_c.toml"
SHORT = ("steps=2", "sample_every=99", "ema.enabled=false", "tensorboard=false", "diffusion.train_text=true")


def test_it_moves_and_is_saved_as_generation_loads_it(tmp_path: Path) -> None:
    out = train(read_settings(TINY, [*SHORT, f'out="{tmp_path.as_posix()}/run"']))
    before = load_text_encoder(package_folder() / "text_encoder.safetensors")
    after = load_text_encoder(out / "text_encoder.safetensors")
    moved = [
        not torch.equal(old, new)
        for old, new in zip(before.tower.parameters(), after.tower.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2
    assert not torch.equal(before.encode(["a red apple"])[1], after.encode(["a red apple"])[1])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {"shapes": 4, "cache": "cache"}}, "holds what the text encoder said before training"),
        ({"recipe": "stage_b"}, "not with recipe stage_b"),
        ({"shard": True}, "every process holds whole"),
    ],
)
def test_what_it_cannot_go_with_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    raw: dict[str, Any] = {"recipe": "stage_c", "out": "out", "diffusion": {"train_text": True}}
    with pytest.raises(SettingsError, match=reason):
        check_settings(raw | changes, "test")
