"""Guidance, and the way from a network's answer to x0 and eps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from triptych.diffusion.denoiser import Branch, Denoiser, Guidance, guide
from triptych.diffusion.prediction import add_noise
from triptych.diffusion.schedule import Schedule


class Network:
    """Answers sin(x) + t + a constant per branch, and remembers what it was asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.asked: list[tuple[Branch, ...]] = []
        self.times: list[Tensor] = []
        self.dtype = dtype

    def __call__(self, x: Tensor, t: Tensor, branches: Sequence[Branch]) -> list[Tensor]:
        self.asked.append(tuple(branches))
        self.times.append(t)
        constants = {"cond": 0.5, "uncond": -0.2}
        return [
            ((1 + constants[b]) * torch.sin(x) + t.view(-1, 1, 1, 1) + constants[b]).to(self.dtype)
            for b in branches
        ]


@pytest.fixture
def x() -> Tensor:
    scale = torch.tensor([1.0, 3.0, 0.2]).view(3, 1, 1, 1)
    return torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * scale


LOGSNR = torch.tensor(0.5)


@pytest.mark.parametrize(
    "guidance",
    [None, Guidance(1.0), Guidance((1.0, 1.0)), Guidance(4.0, interval=(0.5, 1.0)), Guidance((7.0, 1.0))],
)
def test_without_guidance_only_the_conditional_branch_runs(x: Tensor, guidance: Guidance | None) -> None:
    network = Network()
    denoised = Denoiser(network, Schedule(), guidance=guidance)(x, LOGSNR, t=0.0)
    assert network.asked == [("cond",)]
    plain = network(x, Schedule().time(LOGSNR).expand(3), ("cond",))[0]
    assert torch.equal(denoised.prediction, plain)


def test_with_guidance_both_branches_come_in_one_call(x: Tensor) -> None:
    network = Network()
    Denoiser(network, Schedule(), guidance=Guidance())(x, LOGSNR, t=0.5)
    assert network.asked == [("cond", "uncond")]
    assert network.times[0].shape == (3,)
    assert torch.equal(network.times[0], Schedule().time(LOGSNR).expand(3))


def test_the_interval_includes_its_ends_on_a_float32_grid() -> None:
    guidance = Guidance(4.0, interval=(0.3, 0.8))
    t, _ = Schedule().grid(10)
    assert [guidance.weight_at(float(value)) for value in t] == [1, 1, 4, 4, 4, 4, 4, 4, 1, 1, 1]


def test_a_pair_of_weights_is_mixed_in_t() -> None:
    guidance = Guidance((6.0, 1.5))
    assert [guidance.weight_at(t) for t in (1.0, 0.5, 0.0)] == [6.0, 3.75, 1.5]


def test_guidance_extrapolates_from_uncond_through_cond(x: Tensor) -> None:
    cond, uncond = torch.cos(x), torch.sin(x)
    torch.testing.assert_close(guide(cond, uncond, 4.0), uncond + 4 * (cond - uncond))
    torch.testing.assert_close(guide(cond, uncond, 0.3), uncond + 0.3 * (cond - uncond))


def test_full_rescale_gives_each_image_the_conditional_deviation(x: Tensor) -> None:
    cond, uncond = torch.cos(x) * x, torch.sin(x)
    guided = guide(cond, uncond, 7.0, rescale=1.0)
    torch.testing.assert_close(guided.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))


def test_an_image_in_a_batch_equals_the_image_alone(x: Tensor) -> None:
    denoise = Denoiser(Network(), Schedule(2.0), guidance=Guidance(4.0, rescale=0.7))
    together = denoise(x, LOGSNR, t=0.6)
    for i in range(3):
        for whole, alone in zip(together, denoise(x[i : i + 1], LOGSNR, t=0.6), strict=True):
            torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_x0_and_eps_always_make_up_x(x: Tensor, prediction: str) -> None:
    denoise = Denoiser(Network(), Schedule(), prediction, Guidance())  # type: ignore[arg-type]
    x0, eps, _ = denoise(x, LOGSNR, t=0.6)
    torch.testing.assert_close(add_noise(x0, eps, LOGSNR), x)


def test_the_state_keeps_its_precision_when_the_network_runs_in_another(x: Tensor) -> None:
    denoise = Denoiser(Network(torch.bfloat16), Schedule(), guidance=Guidance())
    assert {tensor.dtype for tensor in denoise(x, LOGSNR, t=0.6)} == {torch.float32}


def test_guidance_may_change_between_steps(x: Tensor) -> None:
    network = Network()
    denoise = Denoiser(network, Schedule(), guidance=Guidance())
    denoise(x, LOGSNR, t=0.6)
    denoise.guidance = None
    denoise(x, LOGSNR, t=0.6)
    assert network.asked == [("cond", "uncond"), ("cond",)]


def test_impossible_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rescale is 1\.5"):
        Guidance(rescale=1.5)
    with pytest.raises(ValueError, match="interval"):
        Guidance(interval=(0.9, 0.1))


def test_an_image_whose_branches_agreed_is_guided_no_more() -> None:
    """The first image's branches differ by 0.05 of it, the second's by 0.5, which halves at every call."""
    asked: list[tuple[Branch, ...]] = []

    def predict(x: Tensor, t: Tensor, branches: Sequence[Branch]) -> list[Tensor]:
        asked.append(tuple(branches))
        apart = torch.tensor([0.05, 0.5 / 2 ** (len(asked) - 1)]).view(2, 1, 1, 1)
        return [torch.ones_like(x) - apart * (branch == "uncond") for branch in branches]

    denoise = Denoiser(predict, Schedule(), guidance=Guidance(3.0, rescale=0.0, agreement=0.2))
    x = torch.zeros(2, 4, 2, 2)
    answers = [denoise(x, LOGSNR, t=0.5).prediction[:, 0, 0, 0].tolist() for _ in range(4)]
    expected = [[1.1, 2.0], [1.0, 1.5], [1.0, 1.25], [1.0, 1.0]]  # ones + 2 * apart while guided
    torch.testing.assert_close(torch.tensor(answers), torch.tensor(expected))
    assert asked == [("cond", "uncond")] * 3 + [("cond",)]
