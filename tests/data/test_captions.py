"""Captions are chosen and rearranged by the draws that are given, and by nothing else."""

from __future__ import annotations

from triptych.data.captions import caption_number, count_tags, rearrange


def test_captions_are_chosen_by_the_draw() -> None:
    assert caption_number(3, 0.49) == 0
    assert [caption_number(3, u) for u in (0.5, 0.74, 0.76, 0.999)] == [1, 1, 2, 2]
    assert caption_number(0, 0.9) == -1
    assert caption_number(1, 0.9) == 0


def test_tags_change_places_behind_the_first_ones() -> None:
    order = [0.1, 0.2, 0.9, 0.3]
    assert rearrange("a,b , c, d", order * 2, keep=2) == "a, b, d, c"
    assert rearrange("a, b, c, d", order * 2) == "a, b, d, c"
    assert rearrange("a, b, c, d", [0.4, 0.3, 0.2, 0.1] * 2) == "d, c, b, a"
    assert rearrange("one sentence", [0.0, 0.0]) == "one sentence"
    assert count_tags("a, b, c") == 3


def test_tags_are_dropped_by_their_share_and_never_all() -> None:
    fate = [0.9, 0.0, 0.9, 0.0]
    assert rearrange("a, b, c, d", [*[0.5] * 4, *fate], shuffle=False, drop=0.5) == "a, c"
    assert rearrange("a, b, c, d", [0.5] * 4 + [0.0] * 4, shuffle=False, drop=0.5) == "a"
    assert rearrange("a, b, c, d", [0.5] * 4 + [0.0] * 4, shuffle=False, drop=0.5, keep=3) == "a, b, c"
