"""Noising and its inversions, offset and pyramid noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from triptych.diffusion.prediction import (
    PREDICTIONS,
    Prediction,
    add_noise,
    offset_noise,
    pyramid_noise,
    target,
    to_x0_eps,
)

LOGSNR = st.floats(-9.2102, 9.2101)


def normal(seed: int) -> Callable[[tuple[int, ...]], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


@given(st.sampled_from(PREDICTIONS), st.lists(LOGSNR, min_size=1, max_size=4), st.integers(0, 2**31))
def test_the_right_prediction_gives_back_x0_and_eps(kind: Prediction, levels: list[float], seed: int) -> None:
    draw = normal(seed)
    shape = (len(levels), 3, 4, 5)
    x0, eps = draw(shape).double(), draw(shape).double()
    logsnr = torch.tensor(levels, dtype=torch.float64)
    x = add_noise(x0, eps, logsnr)
    got_x0, got_eps = to_x0_eps(kind, x, target(kind, x0, eps, logsnr), logsnr)
    torch.testing.assert_close(got_x0, x0, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(got_eps, eps, atol=1e-9, rtol=1e-9)


@given(st.sampled_from(PREDICTIONS), LOGSNR, st.integers(0, 2**31))
def test_any_prediction_is_split_consistently(kind: Prediction, level: float, seed: int) -> None:
    """Whatever the network says, x0 and eps noised again give x, and say the same in every kind."""
    draw = normal(seed)
    x, predicted = draw((2, 3, 4, 4)).double(), draw((2, 3, 4, 4)).double()
    logsnr = torch.tensor(level, dtype=torch.float64)
    x0, eps = to_x0_eps(kind, x, predicted, logsnr)
    torch.testing.assert_close(add_noise(x0, eps, logsnr), x, atol=1e-9, rtol=1e-9)
    for other in PREDICTIONS:
        again, _ = to_x0_eps(other, x, target(other, x0, eps, logsnr), logsnr)
        torch.testing.assert_close(again, x0, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_one_level_per_sample_equals_sample_by_sample(kind: Prediction) -> None:
    draw = normal(0)
    x0, eps = draw((3, 4, 6, 5)), draw((3, 4, 6, 5))
    logsnr = torch.tensor([-9.2, 0.3, 9.2])
    whole = add_noise(x0, eps, logsnr)
    for i in range(3):
        assert torch.equal(whole[i : i + 1], add_noise(x0[i : i + 1], eps[i : i + 1], logsnr[i]))


def test_unknown_predictions_list_the_known_ones() -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match='"epsilon"; known: eps, v, x0'):
        target("epsilon", x, x, torch.tensor(0.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="known: eps, v, x0"):
        to_x0_eps("epsilon", x, x, torch.tensor(0.0))  # type: ignore[arg-type]


def test_offset_noise_moves_whole_channels() -> None:
    eps, offset = torch.zeros(2, 3, 4, 4), torch.arange(6.0).view(2, 3, 1, 1)
    got = offset_noise(eps, offset, 0.1)
    assert torch.equal(got, (0.1 * offset).expand_as(eps))
    assert torch.equal(offset_noise(eps, offset, 0.0), eps)


@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 24, 40), (4, 40, 24), (2, 1, 9), (3, 17, 17)])
def test_pyramid_noise_has_unit_variance_and_asks_for_the_published_levels(shape: tuple[int, ...]) -> None:
    asked: list[tuple[int, ...]] = []
    draw = normal(1)

    def record(wanted: tuple[int, ...]) -> Tensor:
        asked.append(wanted)
        return draw(wanted)

    samples = torch.stack([pyramid_noise(shape, record) for _ in range(400)])
    assert samples.shape == (400, *shape)
    assert samples.var().item() == pytest.approx(1.0, abs=0.05)
    height = shape[-2]
    sizes = [n for n in (height // 2**i for i in range(1, 10)) if 1 <= n <= 16]
    levels = asked[: len(asked) // 400]
    assert levels[0] == shape
    assert [level[-2:] for level in levels[1:]] == [(n, n) for n in sizes]


def test_pyramid_noise_of_a_batch_equals_its_samples() -> None:
    shape = (4, 32, 24)
    alone = [pyramid_noise(shape, normal(seed)) for seed in (5, 6)]
    draws = [normal(5), normal(6)]
    batch = pyramid_noise((2, *shape), lambda wanted: torch.stack([draw(wanted[1:]) for draw in draws]))
    assert torch.equal(batch, torch.stack(alone))
