"""Switches of speed change nothing that can be seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from controlnets import controlled_cascade
from PIL import Image
from torch import Tensor

from triptych import Cascade
from triptych.errors import RequestError
from triptych.models import compiled
from triptych.pipelines import speed
from triptych.pipelines.control import Steering
from triptych.pipelines.speed import Branches, Speed

SWITCHES = {
    "once": Speed(once=False),
    "little kept": Speed(kept_bytes=20_000),
    "fused": Speed(fused=False),
    "share": Speed(share=False),
    "together": Speed(together=False),
    "all": Speed(once=False, fused=False, share=False, together=False),
}
SETTINGS: dict[str, Any] = {
    "seed": 3, "steps": 3, "decoder_steps": 2, "decoder_guidance": 1.5, "count": 2, "size": "64x48",
}  # fmt: skip


@pytest.fixture(scope="module")
def cascade(tiny_cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    folder = controlled_cascade(tiny_cascade, tmp_path_factory.mktemp("controlled"))
    return Cascade.load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def steering(tmp_path_factory: pytest.TempPathFactory) -> Steering:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.linear_gradient("L").convert("RGB").resize((64, 48)).save(path)
    return Steering("canny", path)


def assert_same(got: Tensor, want: Tensor) -> None:
    assert float((got - want).abs().max() / want.abs().max()) < 1e-4


@pytest.mark.parametrize("switch", list(SWITCHES))
def test_a_picture_is_the_same_without(switch: str, cascade: Cascade) -> None:
    cascade.parts.speed = Speed()
    want = cascade.generate("a red apple", **SETTINGS)
    cascade.parts.speed = SWITCHES[switch]
    got = cascade.generate("a red apple", **SETTINGS)
    assert_same(got.latents_c, want.latents_c)
    assert_same(got.latents_b, want.latents_b)


@pytest.mark.parametrize("rest", ["fused", "all"])
def test_a_picture_is_the_same_in_compiled_blocks(
    rest: str, cascade: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, but not translated: what the translation gives is looked at in tests/models."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    cascade.parts.speed = Speed()
    want = cascade.generate("a red apple", **SETTINGS)
    cascade.parts.speed = replace(SWITCHES[rest], compiled=True)
    got = cascade.generate("a red apple", **SETTINGS)
    assert_same(got.latents_c, want.latents_c)
    assert_same(got.latents_b, want.latents_b)


@pytest.mark.parametrize("switch", ["share", "together", "all"])
def test_a_steered_picture_is_the_same_without(switch: str, cascade: Cascade, steering: Steering) -> None:
    cascade.parts.speed = Speed()
    want = cascade.steer("a star", steering, seed=1, steps=3, decoder_steps=1).latents_c
    cascade.parts.speed = SWITCHES[switch]
    got = cascade.steer("a star", steering, seed=1, steps=3, decoder_steps=1).latents_c
    assert_same(got, want)


@pytest.mark.parametrize("weights", ["narrow", "streamed"])
def test_what_is_kept_was_made_with_widened_weights(weights: Any, narrow_cascade: Path) -> None:
    """Weights of a block are wide only while it runs; keys and values kept from them are as wide."""
    latents = []
    for where in ("resident", weights):
        cascade = Cascade.load(narrow_cascade, device="cpu", dtype="float32")
        cascade.parts.weights = {"stage_c": where, "stage_b": where}
        latents.append(cascade.generate("a red apple", seed=1, steps=3, decoder_steps=2).latents_b)
    assert torch.equal(*latents)


@pytest.mark.parametrize(("speed", "asked"), [(Speed(), [(2, 4)]), (Speed(together=False), [(2, 2)] * 2)])
def test_branches_run_as_one_batch_or_one_after_the_other(speed: Speed, asked: list[Any]) -> None:
    seen: list[tuple[int, int]] = []
    cond = torch.arange(4.0)[:, None]

    def answer(x: Tensor, t: Tensor, rows: slice, scratch: Any) -> Tensor:
        seen.append((len(x), len(cond[rows])))
        return cond[rows]

    branches = Branches(answer, speed)
    on, off = branches(torch.zeros(2, 1), torch.zeros(2), ("cond", "uncond"))
    assert (on.flatten().tolist(), off.flatten().tolist()) == ([0, 1], [2, 3])
    assert seen == asked
    (only,) = branches(torch.zeros(2, 1), torch.zeros(2), ("cond",))
    assert only.flatten().tolist() == [0, 1]
    assert seen == [*asked, (2, 2)]


def test_a_missing_compiler_is_said_before_anything_is_loaded(
    tiny_cascade: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    monkeypatch.setattr(speed, "missing_compiler", lambda device: "a C++ compiler")
    with pytest.raises(RequestError, match="needs a C\\+\\+ compiler"):
        Cascade.load(tiny_cascade, speed=Speed(compiled=True))


def test_compiled_blocks_and_memory_limits_exclude_each_other(tiny_cascade: Path) -> None:
    cascade = Cascade.load(tiny_cascade)
    cascade.parts.speed = Speed(compiled=True)
    with pytest.raises(RequestError, match="leave out compiling"):
        cascade.generate("a red apple", max_memory="4GiB")


def test_switches_can_be_given_when_loading(tiny_cascade: Path) -> None:
    off = Speed(once=False, fused=False, share=False, together=False)
    assert Cascade.load(tiny_cascade, speed=off).parts.speed == off


def test_guidance_one_runs_one_branch(cascade: Cascade, branch_counts: list[int]) -> None:
    cascade.generate("a red apple", steps=1, decoder_steps=1, guidance=1, decoder_guidance=1, seed=1)
    assert branch_counts == [1, 1]
