"""Loss weights: P2 and the adaptive table."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triptych.diffusion.loss import AdaptiveWeight, p2_weight, per_sample_loss
from triptych.diffusion.schedule import alpha_sigma


def test_per_sample_loss_is_a_float32_mean_over_each_sample() -> None:
    predicted = torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16)
    target = torch.ones(2, 3, 4, 5) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    loss = per_sample_loss(predicted, target)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [1.0, 9.0]


@given(st.floats(-9.21, 9.21))
def test_p2_with_default_constants_is_sigma_squared(logsnr: float) -> None:
    level = torch.tensor(logsnr, dtype=torch.float64)
    assert p2_weight(level).item() == pytest.approx(alpha_sigma(level)[1].item() ** 2, rel=1e-9)


def test_adaptive_weights_start_at_one_and_follow_the_loss() -> None:
    adaptive = AdaptiveWeight()
    logsnr = torch.tensor([-3.0, 4.0])
    assert adaptive(logsnr).tolist() == [1.0, 1.0]
    for _ in range(1000):
        adaptive.update(logsnr, torch.tensor([0.5, 0.01]))
    torch.testing.assert_close(adaptive(logsnr), torch.tensor([2.0, 100.0]), rtol=0.01, atol=0)
    assert adaptive(torch.tensor([0.0])).item() == 1.0


def test_losses_that_share_a_bucket_are_averaged() -> None:
    together, once = AdaptiveWeight(), AdaptiveWeight()
    together.update(torch.tensor([0.01, 0.02, 0.03]), torch.tensor([1.0, 2.0, 6.0]))
    once.update(torch.tensor([0.02]), torch.tensor([3.0]))
    assert torch.equal(together.losses, once.losses)
    assert (together.losses != 1).sum() == 1


def test_processes_that_reduce_hold_the_table_of_the_whole_batch() -> None:
    logsnr, loss = torch.tensor([0.01, 0.02, 5.0, -9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    whole = AdaptiveWeight()
    whole.update(logsnr, loss)
    sums: list[torch.Tensor] = []

    def collect(mine: torch.Tensor) -> torch.Tensor:
        sums.append(mine)
        return mine

    for half in (slice(0, 2), slice(2, 4)):
        AdaptiveWeight().update(logsnr[half], loss[half], reduce=collect)
    for half in (slice(0, 2), slice(2, 4)):
        worker = AdaptiveWeight()
        worker.update(logsnr[half], loss[half], reduce=lambda mine: sums[0] + sums[1])
        assert torch.equal(worker.losses, whole.losses)


def test_weights_stay_bounded() -> None:
    adaptive = AdaptiveWeight()
    level = torch.tensor([1.0])
    for _ in range(3000):
        adaptive.update(level, torch.tensor([0.0]))
    assert adaptive(level).item() == pytest.approx(1e7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_table_alone(bad: float) -> None:
    adaptive = AdaptiveWeight()
    adaptive.update(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([bad, 3.0, bad]))
    assert adaptive(torch.tensor([1.0])).item() == pytest.approx(1 / 1.02)
    assert adaptive(torch.tensor([2.0])).item() == 1.0


def test_levels_beyond_the_edges_fall_into_the_outer_buckets() -> None:
    adaptive = AdaptiveWeight()
    adaptive.update(torch.tensor([-50.0, 50.0]), torch.tensor([2.0, 3.0]))
    assert adaptive.losses[0].item() == pytest.approx(1.01)
    assert adaptive.losses[-1].item() == pytest.approx(1.02)


def test_state_moves_to_another_table() -> None:
    first, second = AdaptiveWeight(), AdaptiveWeight()
    first.update(torch.tensor([0.0, 3.0]), torch.tensor([0.3, 0.7]))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.losses, second.losses)
    second.update(torch.tensor([0.0]), torch.tensor([9.0]))
    assert not torch.equal(first.losses, second.losses)
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \(300,\)"):
        second.load_state_dict({"losses": torch.ones(3)})


def test_a_weighted_loss_is_that_of_the_places_that_count() -> None:
    predicted, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    weigh = torch.zeros(2, 1, 4, 4)
    weigh[0, :, :2] = 1
    weighted = per_sample_loss(predicted, target, weigh)
    torch.testing.assert_close(weighted[:1], per_sample_loss(predicted[:1, :, :2], target[:1, :, :2]))
    assert weighted[1] == 0
    torch.testing.assert_close(
        per_sample_loss(predicted, target, torch.full((2, 1, 4, 4), 0.3)), per_sample_loss(predicted, target)
    )
