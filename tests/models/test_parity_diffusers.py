"""The same small random Stage B and C in diffusers and in ours: networks, gradients, whole sampling loops.

The two programs differ in a few habits (what time the network is told, the last step's noise, which tensor is
the result). The tests imitate diffusers' habits; ours has no switch for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triptych.checkpoints.convert import layout_tensors
from triptych.checkpoints.diffusers_config import model_config
from triptych.diffusion.denoiser import Denoiser, Guidance
from triptych.diffusion.samplers import sample_ddpm
from triptych.diffusion.schedule import Schedule
from triptych.models.stage_b import StageB, StageBConfig
from triptych.models.stage_c import StageC, StageCConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about optional packages of its own
    from diffusers import DDPMWuerstchenScheduler
    from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet

STAGE_C = StageCConfig(
    widths=(32, 48),
    heads=(2, 3),
    cond_width=24,
    down_blocks=(1, 2),
    up_blocks=(2, 1),
    text_width=20,
    pooled_width=20,
    image_width=12,
)
STAGE_B = StageBConfig(
    widths=(16, 24, 32),
    heads=(0, 2, 4),
    patterns=("CT", "CTA", "CTA"),
    down_blocks=(1, 2, 1),
    up_blocks=(1, 2, 1),
    down_repeats=(1, 2, 1),
    up_repeats=(3, 1, 2),
    cond_width=24,
    pooled_width=20,
    dropout=(0.0, 0.1, 0.1),
    self_attention=(True, False, True),
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def twin(ours: StageB | StageC) -> nn.Module:
    """Random weights in every tensor of ours, and the diffusers network with the same ones."""
    part = "stage_b" if isinstance(ours, StageB) else "stage_c"
    with torch.no_grad():
        for index, parameter in enumerate(ours.parameters()):
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.copy_(normal(*parameter.shape, seed=index) / fan_in**0.5)
    theirs = StableCascadeUNet.from_config(model_config(part, ours.config))
    theirs.load_state_dict(layout_tensors(ours.state_dict(), part, "diffusers"))
    ours.eval()
    return theirs.eval()


def stage_c_inputs(height: int, width: int) -> dict[str, Tensor]:
    return {
        "x": normal(2, 16, height, width, seed=1),
        "t": torch.tensor([0.3, 0.9]),
        "text_hidden": normal(2, 77, 20, seed=2),
        "text_pooled": normal(2, 1, 20, seed=3),
        "image_embed": normal(2, 1, 12, seed=4),
    }


def stage_b_inputs(height: int, width: int) -> dict[str, Tensor]:
    return {
        "x": normal(2, 4, height, width, seed=1),
        "t": torch.tensor([0.3, 0.9]),
        "semantic": normal(2, 16, 3, 5, seed=2),
        "text_pooled": normal(2, 1, 20, seed=3),
    }


THEIR_NAMES = {
    "x": "sample",
    "t": "timestep_ratio",
    "text_hidden": "clip_text",
    "text_pooled": "clip_text_pooled",
    "image_embed": "clip_img",
    "semantic": "effnet",
}


def ask(theirs: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """The diffusers network's answer to inputs under our names."""
    return theirs(**{THEIR_NAMES[name]: value for name, value in inputs.items()}, **more).sample


def assert_same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "switch"),
    [(6, 5, False), (1, 1, False), (9, 7, False), (6, 4, True), (9, 7, True)],
)
@torch.no_grad()
def test_stage_c_equals_diffusers(height: int, width: int, switch: bool) -> None:
    ours = StageC(replace(STAGE_C, level_switch=(switch,)))
    theirs = twin(ours)
    inputs = stage_c_inputs(height, width)
    assert_same(ours(**inputs), ask(theirs, inputs))
    two_images = inputs | {"image_embed": normal(2, 2, 12, seed=5)}
    assert_same(ours(**two_images), ask(theirs, two_images))
    # diffusers takes a scalar of its extra times only for one sample.
    single = {name: value[:1] for name, value in inputs.items()}
    extra = {"sca": torch.tensor([0.4]), "crp": torch.tensor([0.7])}
    assert_same(ours(**single, **extra), ask(theirs, single, **extra))


@pytest.mark.parametrize(("height", "width"), [(16, 24), (20, 28), (10, 14), (8, 8)])
@torch.no_grad()
def test_stage_b_equals_diffusers(height: int, width: int) -> None:
    ours = StageB(STAGE_B)
    theirs = twin(ours)
    inputs = stage_b_inputs(height, width)
    assert_same(ours(**inputs), ask(theirs, inputs))
    pixels = normal(2, 3, 10, 7, seed=5)
    assert_same(ours(**inputs, pixels=pixels), ask(theirs, inputs, pixels=pixels))
    unconditional = inputs | {"semantic": torch.zeros(2, 16, 3, 5)}
    assert_same(ours(**unconditional), ask(theirs, unconditional))


@pytest.mark.parametrize("part", ["stage_b", "stage_c"])
def test_gradients_equal_diffusers(part: str) -> None:
    ours: StageB | StageC = StageB(STAGE_B) if part == "stage_b" else StageC(STAGE_C)
    theirs = twin(ours)
    inputs = stage_b_inputs(20, 28) if part == "stage_b" else stage_c_inputs(6, 5)
    ours(**inputs).square().mean().backward()
    ask(theirs, inputs).square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    got = layout_tensors({n: p.grad for n, p in ours.named_parameters()}, part, "diffusers")
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(got[name] / scale, gradient / scale, rtol=1e-3, atol=1e-4, msg=name)


STEPS = 6


def their_loop(
    theirs: nn.Module, cond: dict[str, Tensor], uncond: dict[str, Tensor], start: Tensor, weight: float
) -> list[Tensor]:
    """x after every step of the loop in diffusers' pipelines, except that the network is told our time."""
    scheduler, schedule = DDPMWuerstchenScheduler(), Schedule()
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(7)
    x, states = start, []
    both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}
    for t in scheduler.timesteps[:-1]:
        told = schedule.time(schedule.logsnr(t)).expand(2 * len(x))
        inputs = {"x": torch.cat([x, x]), "t": told} | both
        on, off = ask(theirs, inputs).chunk(2)
        predicted = torch.lerp(off, on, weight)
        x = scheduler.step(predicted, t.expand(len(x)), x, generator=generator).prev_sample
        states.append(x)
    return states


def our_loop(
    ours: nn.Module, cond: dict[str, Tensor], uncond: dict[str, Tensor], start: Tensor, weight: float
) -> list[Tensor]:
    """x after every step of ours, on the same draws; shift 1, no rescale, no noise in the last step."""
    generator = torch.Generator().manual_seed(7)
    draws = [torch.randn(start.shape, generator=generator) for _ in range(STEPS)]
    draws[-1] = torch.zeros(start.shape)  # diffusers adds none there
    conditions = {"cond": cond, "uncond": uncond}

    def predict(x: Tensor, t: Tensor, branches: Sequence[str]) -> list[Tensor]:
        return [ours(x, t, **conditions[branch]) for branch in branches]

    schedule = Schedule()
    denoise = Denoiser(predict, schedule, "eps", Guidance(weight, rescale=0.0))
    steps = sample_ddpm(denoise, start, *schedule.grid(STEPS), draws.__getitem__)
    return [step.x for step in steps]


@pytest.mark.parametrize(("part", "weight"), [("stage_b", 1.1), ("stage_c", 4.0)])
@torch.no_grad()
def test_a_whole_loop_equals_diffusers(part: str, weight: float) -> None:
    ours: StageB | StageC = StageB(STAGE_B) if part == "stage_b" else StageC(STAGE_C)
    theirs = twin(ours)
    inputs = stage_b_inputs(16, 20) if part == "stage_b" else stage_c_inputs(4, 5)
    start = inputs.pop("x")
    inputs.pop("t")
    uncond = {
        name: torch.zeros_like(value) if name != "text_pooled" else value.flip(0)
        for name, value in inputs.items()
    }
    got = our_loop(ours, inputs, uncond, start, weight)
    want = their_loop(theirs, inputs, uncond, start, weight)
    assert len(got) == len(want) == STEPS
    for x, expected in zip(got, want, strict=True):
        # Random networks are no denoisers: values grow large in the first steps, where alpha is 0.01.
        largest = float(expected.abs().max())
        assert float((x - expected).abs().max()) < 1e-4 * largest
