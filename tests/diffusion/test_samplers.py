"""Samplers on Gaussian data, where the ideal denoiser and the exact flow are formulas."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from triptych.diffusion.denoiser import Denoiser, Guidance
from triptych.diffusion.prediction import PREDICTIONS, Prediction, add_noise, target
from triptych.diffusion.samplers import (
    SAMPLERS,
    Denoise,
    Step,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_euler,
    sample_lcm,
)
from triptych.diffusion.schedule import Schedule, alpha_sigma

# Data: every channel its own normal distribution.
MEAN = torch.tensor([1.5, -0.7, 0.0], dtype=torch.float64).view(1, 3, 1, 1)
DEVIATION = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64).view(1, 3, 1, 1)


def draws(seed: int, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    def noise(index: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + index)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return noise


def no_draws(index: int) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def ideal_x0(x: Tensor, logsnr: Tensor) -> Tensor:
    """E[x0 | x] for the Gaussian data."""
    alpha, sigma = alpha_sigma(logsnr)
    return (MEAN * sigma**2 + alpha * DEVIATION**2 * x) / (sigma**2 + alpha**2 * DEVIATION**2)


def ideal(x: Tensor, logsnr: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
    alpha, sigma = alpha_sigma(logsnr)
    x0 = ideal_x0(x, logsnr)
    eps = (x - alpha * x0) / sigma
    return x0, eps, eps


def spread(logsnr: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(logsnr)
    return (alpha**2 * DEVIATION**2 + sigma**2).sqrt()


def exact_flow(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The probability flow keeps (x - alpha * mean) / deviation of x_t constant."""
    z = (x - alpha_sigma(start)[0] * MEAN) / spread(start)
    return alpha_sigma(end)[0] * MEAN + spread(end) * z


def levels(steps: int, start: float = -6.0, end: float = 5.0) -> tuple[Tensor, Tensor]:
    """A smooth grid of noise levels, free of the published schedule's clamps."""
    return torch.linspace(1, 0, steps + 1), torch.linspace(start, end, steps + 1, dtype=torch.float64)


def last(steps: Iterable[Step]) -> Step:
    return list(steps)[-1]


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(sample_ddim, 1), (sample_euler, 1), (sample_dpmpp_2m, 2)],
    ids=["ddim", "euler", "dpmpp_2m"],
)
def test_deterministic_samplers_converge_to_the_exact_flow_at_their_order(
    sampler: Callable[..., Iterable[Step]], order: int
) -> None:
    x = draws(0, (4, 3, 2, 2))(0)
    errors = []
    for steps in (40, 80, 160, 320):
        times, logsnrs = levels(steps)
        want = exact_flow(x, logsnrs[0], logsnrs[-1])
        errors.append(float((last(sampler(ideal, x, times, logsnrs, no_draws)).x - want).abs().max()))
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert ratios[-1] == pytest.approx(2**order, rel=0.1), errors
    assert ratios[-2] == pytest.approx(2**order, rel=0.2), errors


@pytest.mark.parametrize("sampler", [sample_ddim, sample_euler, sample_dpmpp_2m])
def test_deterministic_samplers_follow_the_flow_on_the_published_grid(
    sampler: Callable[..., Iterable[Step]],
) -> None:
    x = draws(1, (4, 3, 2, 2))(0)
    times, logsnrs = Schedule(2.0).grid(1000)
    want = exact_flow(x, logsnrs[0].double(), logsnrs[-1].double())
    torch.testing.assert_close(
        last(sampler(ideal, x, times, logsnrs.double(), no_draws)).x, want, atol=0.02, rtol=0
    )


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noisy_samplers_have_the_moments_of_the_data(eta: float) -> None:
    times, logsnrs = levels(150)
    shape = (40_000, 3, 1, 1)
    x = draws(2, shape)(999) * spread(logsnrs[0]) + alpha_sigma(logsnrs[0])[0] * MEAN
    step = last(sample_ddim(ideal, x, times, logsnrs, draws(3, shape), eta=eta))
    alpha, _ = alpha_sigma(logsnrs[-1])
    mean, deviation = step.x.mean(dim=0), step.x.std(dim=0)
    torch.testing.assert_close(mean, (alpha * MEAN)[0], atol=0.04, rtol=0)
    torch.testing.assert_close(deviation, spread(logsnrs[-1])[0], atol=0, rtol=0.04)


def test_ddpm_moments_improve_with_steps() -> None:
    """For a linear denoiser the variance obeys a recursion without any sampling error."""
    errors = []
    shape = (2, 3, 1, 1)
    for steps in (50, 100, 200):
        times, logsnrs = levels(steps)
        gain, variance = torch.ones(1, 3, 1, 1, dtype=torch.float64), spread(logsnrs[0]) ** 2
        for i in range(steps):
            pair = (times[i : i + 2], logsnrs[i : i + 2])
            x = torch.stack([MEAN[0] * 0, MEAN[0] * 0 + 1])  # two points show the slope of one step
            silent = last(sample_ddpm(ideal, x, *pair, lambda index: torch.zeros(shape).double())).x
            loud = last(sample_ddpm(ideal, x, *pair, lambda index: torch.ones(shape).double())).x
            gain = silent[1:] - silent[:1]
            variance = gain**2 * variance + (loud - silent)[:1] ** 2
        errors.append(float((variance.sqrt() - spread(logsnrs[-1])).abs().max()))
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]
    assert errors[2] < 0.02 * DEVIATION.max()


def consistency(x: Tensor, logsnr: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """The exact consistency map: along the flow, all the way to clean data."""
    alpha, sigma = alpha_sigma(logsnr)
    x0 = MEAN + DEVIATION * (x - alpha * MEAN) / spread(logsnr)
    eps = (x - alpha * x0) / sigma
    return x0, eps, eps


def test_lcm_is_exact_in_one_step_with_the_exact_consistency_map() -> None:
    times, logsnrs = Schedule().grid(1)
    x = draws(4, (5, 3, 2, 2))(0)
    step = last(sample_lcm(consistency, x, times, logsnrs.double(), draws(5, tuple(x.shape))))
    clean = exact_flow(x, logsnrs[0].double(), torch.tensor(60.0, dtype=torch.float64))
    torch.testing.assert_close(step.x0, clean, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 4])
def test_lcm_keeps_the_distribution_for_any_number_of_steps(steps: int) -> None:
    times, logsnrs = levels(steps)
    shape = (40_000, 3, 1, 1)
    x = draws(6, shape)(999) * spread(logsnrs[0]) + alpha_sigma(logsnrs[0])[0] * MEAN
    step = last(sample_lcm(consistency, x, times, logsnrs, draws(7, shape)))
    torch.testing.assert_close(step.x0.mean(dim=0), MEAN[0], atol=0.04, rtol=0)
    torch.testing.assert_close(step.x0.std(dim=0), DEVIATION[0], atol=0, rtol=0.03)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_kind_of_prediction_does_not_matter(name: str, kind: Prediction) -> None:
    """A network that answers v or x0 ideally gives the trajectory of one that answers eps ideally."""

    def run(prediction: Prediction) -> list[Step]:
        current: list[Tensor] = []

        def predict(x: Tensor, t: Tensor, branches: object) -> list[Tensor]:
            x0, eps, _ = ideal(x, current[0], 0.0)
            return [target(prediction, x0, eps, current[0])]

        denoise = Denoiser(predict, Schedule(2.0), prediction)

        def told(x: Tensor, logsnr: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
            current[:] = [logsnr]
            return denoise(x, logsnr, t)

        x = draws(8, (2, 3, 4, 4))(0)
        times, logsnrs = Schedule(2.0).grid(12)
        return list(SAMPLERS[name](told, x, times, logsnrs.double(), draws(9, (2, 3, 4, 4))))

    for got, want in zip(run(kind), run("eps"), strict=True):
        torch.testing.assert_close(got.x0, want.x0, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(got.x, want.x, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("shift", [0.25, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 500])
def test_samplers_are_finite_in_float32_between_the_clamps(name: str, shift: float, steps: int) -> None:
    """Large shifts and many steps put several grid points on the same clamped level."""

    def denoise(x: Tensor, logsnr: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        x0, eps, _ = ideal(x.double(), logsnr.double(), t)
        return x0.float(), eps.float(), eps.float()

    x = draws(10, (2, 3, 4, 4))(0).float()
    times, logsnrs = Schedule(shift).grid(steps)
    noise = draws(11, (2, 3, 4, 4))
    for step in SAMPLERS[name](denoise, x, times, logsnrs, lambda index: noise(index).float()):
        assert step.x.dtype == torch.float32
        assert step.x.isfinite().all()
        assert step.x.abs().max() < 40
    assert (step.x0 - MEAN).abs().max() < 6 * DEVIATION.max()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_network_that_knows_the_picture_gets_it_exactly(name: str) -> None:
    """The result, x0 of the last step, is exact; x is that picture with the noise of the grid's end."""
    picture = draws(12, (2, 3, 4, 4))(0)

    def knows(x: Tensor, logsnr: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = alpha_sigma(logsnr)
        eps = (x - alpha * picture) / sigma
        return picture, eps, eps

    times, logsnrs = Schedule(2.0).grid(5)
    step = last(
        SAMPLERS[name](knows, draws(13, (2, 3, 4, 4))(0), times, logsnrs.double(), draws(14, (2, 3, 4, 4)))
    )
    assert torch.equal(step.x0, picture)
    alpha, sigma = alpha_sigma(logsnrs[-1].double())
    assert ((step.x - alpha * picture) / sigma).abs().max() < 8


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_may_start_from_a_picture_and_stop_early(name: str) -> None:
    picture = MEAN + DEVIATION * draws(15, (64, 3, 4, 4))(0)
    times, logsnrs = Schedule().grid(8, start=0.4, end=0.2)
    logsnrs = logsnrs.double()
    x = add_noise(picture, draws(16, (64, 3, 4, 4))(0), logsnrs[0])
    steps = list(SAMPLERS[name](ideal, x, times, logsnrs, draws(17, (64, 3, 4, 4))))
    assert [step.index for step in steps] == list(range(8))
    assert {step.steps for step in steps} == {8}
    assert steps[0].t == pytest.approx(0.4)
    if name != "lcm":  # which forgets a little at every step unless the network is a consistency map
        assert float((steps[-1].x0 - picture).abs().mean()) < 0.6
    if name in ("ddim", "euler", "dpmpp_2m"):
        want = exact_flow(x, logsnrs[0], logsnrs[-1])
        torch.testing.assert_close(steps[-1].x, want, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_in_a_batch_equals_the_image_alone(name: str) -> None:
    def predict(x: Tensor, t: Tensor, branches: object) -> list[Tensor]:
        return [torch.sin(2 * x) * t.view(-1, 1, 1, 1) + shift for shift in (0.3, -0.1)]

    denoise = Denoiser(predict, Schedule(2.0), guidance=Guidance(4.0, rescale=0.7))
    noise = draws(18, (3, 3, 4, 4))
    x = noise(999).float()
    grid = Schedule(2.0).grid(6)
    together = last(SAMPLERS[name](denoise, x, *grid, lambda i: noise(i).float()))
    for k in range(3):
        part = slice(k, k + 1)
        alone = last(SAMPLERS[name](denoise, x[part], *grid, lambda i, part=part: noise(i)[part].float()))
        torch.testing.assert_close(together.x0[part], alone.x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_caller_may_replace_the_state_between_steps(name: str) -> None:
    seen: list[Tensor] = []

    def watch(x: Tensor, logsnr: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(x)
        return ideal(x, logsnr, t)

    times, logsnrs = levels(3)
    mine = torch.full((1, 3, 2, 2), 0.25, dtype=torch.float64)
    for step in SAMPLERS[name](watch, mine * 0, times, logsnrs, draws(19, (1, 3, 2, 2))):
        step.x = mine
    assert torch.equal(seen[1], mine)
    assert torch.equal(seen[2], mine)


def test_euler_is_ddim_without_noise() -> None:
    x = draws(20, (2, 3, 4, 4))(0)
    times, logsnrs = levels(9)
    euler = last(sample_euler(ideal, x, times, logsnrs, no_draws))
    torch.testing.assert_close(euler.x, last(sample_ddim(ideal, x, times, logsnrs, no_draws)).x)


def test_grids_of_two_lengths_are_refused() -> None:
    times, logsnrs = levels(4)
    with pytest.raises(ValueError, match=r"times \(4,\) and logsnrs \(5,\)"):
        next(sample_ddpm(ideal, MEAN, times[1:], logsnrs, no_draws))


def test_one_ddpm_step_equals_diffusers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about optional packages of its own
        from diffusers import DDPMWuerstchenScheduler
        from diffusers.utils.torch_utils import randn_tensor

    theirs = DDPMWuerstchenScheduler()
    theirs.set_timesteps(10)
    times, logsnrs = Schedule().grid(10)
    shape = (2, 4, 6, 5)
    for i in range(10):
        generator = torch.Generator().manual_seed(i)
        x, eps = (torch.randn(shape, generator=generator) for _ in range(2))
        state = generator.get_state()
        t = theirs.timesteps[i].expand(2)
        want = theirs.step(eps, t, x, generator=generator).prev_sample
        generator.set_state(state)
        draw = randn_tensor(shape, generator=generator) * (i < 9)  # theirs adds no noise in the last step

        def denoise(x: Tensor, logsnr: Tensor, t: float, eps: Tensor = eps) -> tuple[Tensor, Tensor, Tensor]:
            alpha, sigma = alpha_sigma(logsnr)
            return (x - sigma * eps) / alpha, eps, eps

        pair = (times[i : i + 2], logsnrs[i : i + 2])
        got = last(sample_ddpm(denoise, x, *pair, lambda index, draw=draw: draw)).x
        torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-5)


def test_every_sampler_is_a_denoise_consumer_of_the_same_shape() -> None:
    denoise: Denoise = ideal
    times, logsnrs = levels(2)
    for name, sampler in SAMPLERS.items():
        steps = list(sampler(denoise, MEAN, times, logsnrs, draws(21, (1, 3, 1, 1))))
        assert len(steps) == 2, name
