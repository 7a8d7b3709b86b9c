"""Sizes that are chosen for pictures people bring."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from triptych.sizes import MAX_ASPECT, fitting_size

SIDES = st.integers(1, 20_000)


@given(SIDES, SIDES, st.sampled_from([(256, 256), (1024, 1024), (768, 1280)]), st.sampled_from([8, 32, 64]))
def test_a_chosen_size_can_be_made_and_is_about_as_large_as_the_model_draws(
    width: int, height: int, default: tuple[int, int], multiple: int
) -> None:
    wide, high = fitting_size((width, height), default, multiple, 64)
    assert wide % multiple == high % multiple == 0
    assert min(wide, high) >= 64
    area = default[0] * default[1]
    assert 0.3 * area < wide * high < 3 * area
    shape = max(1 / MAX_ASPECT, min(MAX_ASPECT, width / height))
    assert abs(wide - high * shape) <= multiple * (1 + shape)


def test_a_size_that_can_be_made_is_kept() -> None:
    assert fitting_size((256, 320), (256, 256)) == (256, 320)
    assert fitting_size((257, 321), (256, 256)) == (256, 320)
    assert fitting_size((2560, 3200), (256, 256)) == (232, 288)
