import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.data.buckets import (
    Bucket,
    buckets_of,
    covering_size,
    crop_around,
    crop_corner,
    make_buckets,
    nearest_bucket,
)
from triptych.errors import SettingsError

SIDES = st.integers(1, 5000)


def test_sets_of_buckets_cover_both_orientations() -> None:
    buckets = make_buckets(768)
    assert len(buckets) == 23
    assert buckets[0] == Bucket(768, 768, 1.0)
    assert {(b.width, b.height) for b in buckets} == {(b.height, b.width) for b in buckets}
    assert all(b.height % 32 == 0 and b.width % 32 == 0 for b in buckets)


def test_a_square_picture_goes_to_the_square_bucket_and_ties_to_the_first() -> None:
    assert nearest_bucket(500, 500, make_buckets(256)) == 0
    assert nearest_bucket(10, 15, buckets_of([(10, 10), (10, 20)])) == 0


def test_impossible_sets_are_refused() -> None:
    with pytest.raises(SettingsError, match="leaves no room"):
        make_buckets(64, [1 / 6])


@given(SIDES, SIDES, st.integers(0, 22), st.floats(0, 0.9999), st.floats(0, 0.9999))
def test_the_crop_always_lies_inside_the_resized_picture(
    height: int, width: int, index: int, u: float, v: float
) -> None:
    bucket = make_buckets(768)[index]
    resized = covering_size(height, width, bucket)
    top, left = crop_corner(resized, bucket, (u, v))
    assert 0 <= top <= resized[0] - bucket.height
    assert 0 <= left <= resized[1] - bucket.width


def test_the_centre_crop_is_central() -> None:
    assert crop_corner((100, 61), Bucket(50, 50, 1.0)) == (25, 6)


def test_a_crop_goes_around_its_focus_as_far_as_the_borders_let_it() -> None:
    canvas = Bucket(100, 100, 1.0)
    for focus, left in ((0.5, 50), (0.0, 0), (1.0, 100), (0.4, 30)):
        assert crop_corner((100, 200), canvas, crop_around((100, 200), canvas, (0.5, focus))) == (0, left)
