"""Runs that save memory: they go on exactly, and what cannot work together is refused with the reason."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from triptych.checkpoints.files import read_tensors
from triptych.errors import SettingsError
from triptych.training.config import RunSettings, check_settings
from triptych.training.loop import train

THRIFTY = {
    "checkpointing": True,
    "weights": "bfloat16",
    "ema": {"enabled": False},
    "optim": {"kind": "adafactor", "fused_backward": True, "clip_by": "layer", "lr": 1e-3},
}


def run_settings(out: Path, **changes: Any) -> RunSettings:
    """Stage C at size tiny on drawn shapes."""
    raw: dict[str, Any] = {
        "recipe": "stage_c", "out": str(out), "size": "tiny", "steps": 4, "batch": 2, "save_every": 2,
        "sample_every": 4, "data": {"shapes": 6, "size": 64, "readers": 0}, "tensorboard": False,
        "sample_prompts": ["a red apple"],
    }  # fmt: skip
    return check_settings(raw | changes, "test")


def final(out: Path) -> dict[str, torch.Tensor]:
    return read_tensors(out / "state.safetensors")


def losses(out: Path) -> list[float]:
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


@pytest.mark.parametrize("kind", ["adafactor", "adamw8bit"])
def test_a_thrifty_run_that_was_interrupted_ends_with_the_same_bits(tmp_path: Path, kind: str) -> None:
    thrifty = THRIFTY | {"optim": THRIFTY["optim"] | {"kind": kind}}
    train(run_settings(tmp_path / "whole", **thrifty))
    train(run_settings(tmp_path / "parts", **thrifty | {"steps": 2}))
    train(run_settings(tmp_path / "parts", **thrifty))
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert not any(name.startswith("average.") for name in whole)
    assert {t.dtype for t in whole.values()} >= {torch.float32, torch.bfloat16}
    for name, tensor in whole.items():
        assert tensor.equal(parts[name]), name
    assert (tmp_path / "whole" / "stage_c.safetensors").exists()


def test_recomputing_and_updating_in_the_backward_pass_change_nothing(tmp_path: Path) -> None:
    plain = {"ema": {"enabled": False}, "optim": {"clip_by": "layer"}}
    train(run_settings(tmp_path / "plain", **plain))
    thrifty = plain | {"checkpointing": True, "optim": {"clip_by": "layer", "fused_backward": True}}
    train(run_settings(tmp_path / "thrifty", **thrifty))
    one, other = final(tmp_path / "plain"), final(tmp_path / "thrifty")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], msg=name, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8"])
def test_a_lora_learns_on_a_narrow_base(tmp_path: Path, base: str) -> None:
    pytest.importorskip("peft")
    settings = run_settings(
        tmp_path, recipe="lora", name="dog", checkpointing=True, steps=2, ema={"enabled": False},
        lora={"base": base, "prior": 0.0, "rank": 2},
    )  # fmt: skip
    train(settings)
    written = read_tensors(tmp_path / "dog.safetensors")
    up = [tensor for name, tensor in written.items() if "lora_up" in name]
    assert up
    assert any(tensor.abs().max() > 0 for tensor in up)
    assert all(tensor.dtype == torch.float32 for tensor in up)


FUSED = {"fused_backward": True, "clip_by": "layer"}
REFUSED = [
    ({"optim": FUSED, "accumulate": 2}, "accumulate = 2 has nothing to add up"),
    ({"optim": {"fused_backward": True}}, 'its norm cannot be clipped: use optim.clip_by = "layer"'),
    ({"optim": FUSED | {"kind": "schedule_free"}}, "cannot move them one by one"),
    ({"optim": FUSED, "not_finite": "skip"}, 'the update cannot be left out: use not_finite = "stop"'),
    ({"optim": FUSED, "shard": True}, "before other processes have added their gradients"),
    ({"weights": "bfloat16"}, "add checkpointing = true"),
    (
        {"weights": "bfloat16", "checkpointing": True, "optim": {"kind": "schedule_free"}},
        "bfloat16 is too coarse",
    ),
    ({"recipe": "semantic", "checkpointing": True}, "recipe semantic has none"),
    ({"recipe": "lora", "checkpointing": True, "weights": "bfloat16"}, "a LoRA has lora.base"),
    ({"recipe": "lora", "lora": {"base": "int8"}}, "add checkpointing = true"),
    ({"recipe": "lora", "parts": {"offload": True}}, "a LoRA holds its text encoder as lora.base says"),
    (
        {"parts": {"offload": True}, "diffusion": {"train_text": True}},
        "moves the weights of the text encoder",
    ),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_what_cannot_work_together_is_refused_in_a_sentence(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        run_settings(tmp_path, **changes)
    message = str(caught.value)
    assert reason in message
    assert message.startswith("test: ")
    assert message.endswith(".")


def test_all_that_is_not_refused_is_accepted(tmp_path: Path) -> None:
    kinds, flags = ("adamw", "muon", "adafactor", "adamw8bit"), (False, True)
    for kind, fused, narrow in itertools.product(kinds, flags, flags):
        optim = {"kind": kind, "fused_backward": fused, "clip_by": "layer"}
        weights = "bfloat16" if narrow else "float32"
        run_settings(tmp_path, optim=optim, weights=weights, checkpointing=True)
