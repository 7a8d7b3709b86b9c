"""The cosine schedule: its limits, its inverse, its shift, and the grids made of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triptych.diffusion.schedule import Schedule, alpha_sigma, training_times


def test_limits_are_the_float32_ends_of_the_unshifted_curve() -> None:
    low, high = Schedule().logsnr(torch.tensor([1.0, 0.0])).tolist()
    assert low == pytest.approx(-9.2102404, abs=1e-6)
    assert high == pytest.approx(9.2100744, abs=1e-6)


@pytest.mark.parametrize(
    ("shift", "at_noise", "at_data"), [(2.0, -9.2102, 7.8238), (0.5, -7.8239, 9.2101), (1.0, -9.2102, 9.2101)]
)
def test_limits_apply_after_the_shift(shift: float, at_noise: float, at_data: float) -> None:
    got = Schedule(shift).logsnr(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(got, torch.tensor([at_noise, at_data]), atol=2e-4, rtol=0)


def test_the_network_is_told_the_published_times() -> None:
    t, logsnr = Schedule(2.0).grid(4)
    assert t.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    want = torch.tensor([0.99358, 0.87007, 0.70564, 0.44414, 0.00712])
    torch.testing.assert_close(Schedule(2.0).time(logsnr), want, atol=1e-5, rtol=0)
    assert Schedule().time(Schedule().logsnr(torch.tensor(0.0))).item() == pytest.approx(0.0022568, abs=1e-6)


@given(st.floats(0.01, 0.99))
def test_time_inverts_logsnr(t: float) -> None:
    schedule = Schedule()
    assert schedule.time(schedule.logsnr(torch.tensor(t))).item() == pytest.approx(t, abs=2e-4)


@given(st.floats(-9.2, 7.8), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_logsnr_inverts_time_up_to_the_shift(logsnr: float, shift: float) -> None:
    schedule = Schedule(shift)
    back = schedule.logsnr(schedule.time(torch.tensor(logsnr)))
    want = min(max(logsnr - 2 * math.log(shift), -9.21024), 9.21007)
    assert back.item() == pytest.approx(want, abs=0.01)


@given(st.floats(-30, 30))
def test_alpha_and_sigma_preserve_variance(logsnr: float) -> None:
    alpha, sigma = alpha_sigma(torch.tensor(logsnr))
    assert (alpha**2 + sigma**2).item() == pytest.approx(1.0, abs=1e-6)


@given(st.lists(st.floats(-0.5, 1.5), min_size=2, max_size=8), st.floats(0.25, 4.0))
def test_logsnr_never_rises_with_t_and_stays_within_the_limits(times: list[float], shift: float) -> None:
    logsnr = Schedule(shift).logsnr(torch.tensor(sorted(times)))
    assert (logsnr.diff() <= 0).all()
    assert logsnr.abs().max() <= 9.2103


def test_low_precision_times_are_widened_first() -> None:
    logsnr = Schedule().logsnr(torch.tensor([0.5], dtype=torch.bfloat16))
    assert logsnr.dtype == torch.float32
    assert alpha_sigma(torch.tensor([9.21], dtype=torch.bfloat16))[1].item() == pytest.approx(0.01, rel=0.1)


def test_training_times_cover_the_published_range() -> None:
    got = training_times(torch.tensor([0.0, 0.0005, 0.5, 1 - 2**-24]))
    torch.testing.assert_close(got, torch.tensor([1.0, 1.0, 0.501, 0.001]), atol=1e-6, rtol=0)


def test_grids_start_and_stop_where_asked() -> None:
    t, logsnr = Schedule().grid(16, start=0.8, end=0.3)
    assert (len(t), len(logsnr)) == (17, 17)
    assert (t[0].item(), t[-1].item()) == pytest.approx((0.8, 0.3))


@pytest.mark.parametrize(
    ("steps", "start", "end", "complaint"),
    [
        (0, 1.0, 0.0, "at least one step"),
        (4, 0.3, 0.3, "0 <= end < start <= 1"),
        (4, 0.2, 0.8, "0 <= end < start <= 1"),
        (4, 1.1, 0.0, "0 <= end < start <= 1"),
        (4, 1.0, -0.1, "0 <= end < start <= 1"),
    ],
)
def test_impossible_grids_are_refused(steps: int, start: float, end: float, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Schedule().grid(steps, start, end)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_impossible_shifts_are_refused(shift: float) -> None:
    with pytest.raises(ValueError, match="shift"):
        Schedule(shift)
