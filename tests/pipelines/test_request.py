"""A request is complete, checked, and survives the PNG it is stored in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from triptych.errors import RequestError
from triptych.pipelines.request import MAX_SEED, Picture, Request, check_size, picture_metadata, recall

STAGE_C: dict[str, Any] = {
    "default_size": [256, 256],
    "size_multiple": 8,
    "steps": 20,
    "guidance": 4.0,
    "sampler": "ddpm",
}
STAGE_B: dict[str, Any] = {"steps": 10, "guidance": 1.1, "sampler": "ddpm"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"promt": "x"}, 'There is no setting "promt": did you mean "prompt"?'),
        ({"sampler": "eular"}, 'There is no sampler "eular": did you mean "euler"?'),
        ({"decoder_sampler": "heun"}, "Known: ddpm, ddim, euler, dpmpp_2m, lcm"),
        ({"size": "big"}, "write width x height"),
        ({"size": "0x64"}, "greater than or equal to 1"),
        ({"steps": 0}, "steps = 0"),
        ({"steps": 2.5}, "steps = 2.5"),
        ({"guidance": float("nan")}, "finite"),
        ({"guidance": -1}, "guidance = -1"),
        ({"count": 0}, "count = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": MAX_SEED, "count": 2}, "leaves no room"),
        ({"device": "gpu"}, "device = 'gpu'"),
        ({"dtype": "fp8"}, "dtype = 'fp8'"),
        ({"prompt": ["a", "b"], "seeds": [1]}, "1 seeds were given for 2 pictures"),
        ({"prompt": []}, "at least one prompt"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
    ],
)
def test_mistakes_are_named_in_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request(**{"prompt": "x", **wrong})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def outcome(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call returns, or the sentence it refuses with; any other exception is a failure."""
    try:
        return call(), ""
    except RequestError as error:
        return None, str(error)


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=())),
    st.binary(),
    st.lists(st.one_of(st.integers(), st.text(), st.none()), max_size=3),
    st.sampled_from(["64x64", "ddpm", "auto", "cpu", "float32"]),
)
names = st.one_of(st.sampled_from(list(Request.model_fields)), st.text(max_size=12))


@example({"size": "\ud800"})
@example({"guidance_interval": "\ud800"})
@example({"max_memory": "\ud800"})
@settings(max_examples=1000, deadline=None)
@given(st.dictionaries(names, anything, max_size=6))
def test_any_settings_are_a_request_or_one_sentence(values: dict[str, Any]) -> None:
    resolved, sentence = outcome(lambda: Request(**values).resolve(STAGE_C, STAGE_B, 16))
    if resolved is None:
        assert sentence
        assert "\n" not in sentence
        return
    assert resolved.resolve(STAGE_C, STAGE_B, 16) == resolved
    pictures = resolved.pictures() if resolved.count < 50 else []
    for picture in pictures:
        assert 0 <= picture.seed <= MAX_SEED
    if pictures:
        again, picture = recall(picture_metadata(resolved, pictures, len(pictures) - 1), "x.png")
        assert [(p.prompt, p.seed) for p in again.pictures()] == [(p.prompt, p.seed) for p in pictures]
        assert picture == pictures[-1]


@settings(max_examples=500, deadline=None)
@given(st.recursive(anything, lambda inner: st.dictionaries(st.text(max_size=8), inner, max_size=3)))
def test_damaged_metadata_is_one_sentence(content: Any) -> None:
    for metadata in ({"request": content}, {"request": {"prompt": "x", "seed": 1}, "index": content}):
        recalled, sentence = outcome(lambda metadata=metadata: recall(metadata, "x.png"))
        assert recalled is not None or "x.png" in sentence


def test_defaults_come_from_the_model_and_settings_win() -> None:
    resolved = Request(prompt="x", steps=3, decoder_guidance=0).resolve(STAGE_C, STAGE_B, 16)
    assert (resolved.steps, resolved.guidance, resolved.decoder_steps) == (3, 4.0, 10)
    assert resolved.decoder_guidance == 0
    assert resolved.size == (256, 256)
    assert resolved.seed is not None


def test_pictures_of_one_prompt_count_up_from_the_seed() -> None:
    pictures = Request(prompt=("a", "b"), count=2, seed=5).pictures()
    assert pictures == [Picture(0, "a", 5), Picture(1, "a", 6), Picture(2, "b", 5), Picture(3, "b", 6)]


def test_pictures_may_have_seeds_of_their_own() -> None:
    assert [p.seed for p in Request(prompt=("a", "b"), seeds=(9, 3)).pictures()] == [9, 3]


def test_a_size_out_of_reach_names_its_neighbours() -> None:
    with pytest.raises(RequestError, match="nearest sizes are 496x296 and 504x304"):
        check_size(500, 300, 8, 64)
    with pytest.raises(RequestError, match="nearest size is 64x64"):
        check_size(8, 8, 8, 64)


def test_metadata_of_a_newer_version_is_refused_by_name() -> None:
    stored = {"version": "9.0", "request": {"prompt": "x", "seed": 1, "aura": 3}, "index": 0}
    with pytest.raises(RequestError, match=r"triptych 9\.0.*aura"):
        recall(stored, "p.png")
