"""What makes less work of a picture: nil strength changes nothing, and more does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from triptych import Cascade
from triptych.errors import RequestError
from triptych.images import to_images
from triptych.pipelines.fast import FAST
from triptych.pipelines.request import Request
from triptych.pipelines.speed import Speed

SETTINGS: dict[str, Any] = {
    "seed": 3, "steps": 4, "decoder_steps": 4, "decoder_guidance": 1.5, "count": 2, "size": "64x48",
}  # fmt: skip
NIL: dict[str, Any] = {
    "guidance_interval": "0-1", "guidance_agreement": 0, "reuse": 1, "decoder_reuse": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def cascade(narrow_cascade: Path) -> Cascade:
    return Cascade.load(narrow_cascade, device="cpu", dtype="float32")


def test_at_nil_everything_is_the_plain_picture(cascade: Cascade) -> None:
    plain = cascade.generate("a red apple", **SETTINGS)
    nil = cascade.generate("a red apple", **SETTINGS, **NIL)
    assert torch.equal(plain.latents_c, nil.latents_c)
    assert torch.equal(plain.latents_b, nil.latents_b)


def test_outside_its_interval_guidance_runs_one_branch(cascade: Cascade, branch_counts: list[int]) -> None:
    steps = {**SETTINGS, "decoder_guidance": 1, "decoder_steps": 1}
    cascade.generate("a red apple", **steps, guidance_interval="0.4-0.8")
    assert branch_counts == [1, 2, 2, 1, 1]  # at t = 1, 0.75, 0.5, 0.25; then Stage B


def test_an_interval_without_a_step_is_guidance_one(cascade: Cascade) -> None:
    never = cascade.generate("a red apple", **SETTINGS, guidance_interval=(0.9, 0.95))
    off = cascade.generate("a red apple", **SETTINGS, guidance=1)
    assert torch.equal(never.latents_c, off.latents_c)


def test_once_branches_agree_the_second_is_left_out(cascade: Cascade, branch_counts: list[int]) -> None:
    steps = {**SETTINGS, "decoder_guidance": 1, "decoder_steps": 1}
    cascade.generate("a red apple", **steps, guidance_agreement=100)
    assert branch_counts == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("speed", [Speed(), Speed(fused=False), Speed(together=False, once=False)])
def test_reuse_is_the_same_whatever_else_is_on(cascade: Cascade, speed: Speed) -> None:
    """Blocks that work in place never touch what the next step takes over."""
    chosen = {**SETTINGS, "reuse": 2, "decoder_reuse": 3}
    cascade.parts.speed = Speed(once=False, fused=False, share=False)
    want = cascade.generate("a red apple", **chosen)
    cascade.parts.speed = speed
    got = cascade.generate("a red apple", **chosen)
    for name in ("latents_c", "latents_b"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=1e-4, rtol=1e-4)
    plain = cascade.generate("a red apple", **SETTINGS)
    assert not torch.allclose(plain.latents_b, got.latents_b, atol=1e-4)


def test_a_picture_alone_is_that_picture_in_a_batch(cascade: Cascade) -> None:
    """Each picture drops its guidance when its own branches agree, not when another's do."""
    settings = {**SETTINGS, "guidance_agreement": 0.15, "reuse": 2}
    both = cascade.generate("a red apple", **settings)
    for row in (0, 1):
        alone = cascade.generate("a red apple", **{**settings, "count": 1, "seed": 3 + row})
        torch.testing.assert_close(alone.latents_c[0], both.latents_c[row], atol=1e-4, rtol=1e-4)


def test_fast_fills_in_what_is_not_given(cascade: Cascade) -> None:
    plain = cascade.resolve(Request(prompt="a", seed=1))
    fast = cascade.resolve(Request(prompt="a", seed=1, fast=True, steps=7, decoder_reuse=1))
    fewest = min(plain.decoder_steps or 0, FAST["decoder_steps"])  # never more steps than without
    for name, value in FAST.items():
        given = {"steps": 7, "decoder_reuse": 1, "decoder_steps": fewest}.get(name, value)
        assert getattr(fast, name) == given
    assert fast.guidance == plain.guidance
    assert cascade.resolve(fast) == fast


def test_a_models_own_table_goes_before_the_general_one(cascade: Cascade) -> None:
    stage_c = {**cascade.parts.info("stage_c").settings, "fast": {"steps": 5, "reuse": 2}}
    stage_b = cascade.parts.info("stage_b").settings
    filled = Request(prompt="a", seed=1, fast=True).resolve(stage_c, stage_b, 16)
    assert (filled.steps, filled.reuse, filled.decoder_sampler) == (5, 2, FAST["decoder_sampler"])
    assert Request(prompt="a", seed=1).resolve(stage_c, stage_b, 16).reuse is None


def test_a_draft_is_the_previewers_picture_enlarged(cascade: Cascade) -> None:
    made = cascade.generate("a red apple", **SETTINGS, draft=True)
    plain = cascade.generate("a red apple", **SETTINGS)
    assert torch.equal(made.latents_c, plain.latents_c)
    assert made.latents_b.numel() == 0
    with cascade.parts.turn("previewer") as network, torch.no_grad():
        shown = to_images(network(plain.latents_c))
    for image, small in zip(made.images, shown, strict=True):
        assert image.size == (64, 48)
        assert image.tobytes() == small.resize((64, 48), 3).tobytes()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"guidance_interval": "0.9-0.2"}, "the lower noise level comes first"),
        ({"guidance_interval": "half"}, "write two noise levels such as 0.2-0.9"),
        ({"guidance_interval": "0.2-1.5"}, "less than or equal to 1"),
        ({"guidance_agreement": -1}, "greater than or equal to 0"),
        ({"reuse": 0}, "greater than or equal to 1"),
        ({"decoder_reuse": 0}, "greater than or equal to 1"),
    ],
)
def test_mistakes_are_told(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        Request(prompt="a", **wrong)
