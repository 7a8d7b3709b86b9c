"""Prompt to pictures: seeds, batches, streams, and trouble on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import triptych
from triptych import Cascade, CheckpointError, Request, RequestError
from triptych.checkpoints.files import read_tensors, write_part
from triptych.checkpoints.headers import read_metadata
from triptych.errors import CapacityError
from triptych.pipelines import capacity, planning
from triptych.pipelines.noise import START, draw


@pytest.fixture(scope="module")
def cascade(tiny_cascade: Path) -> Cascade:
    return Cascade.load(tiny_cascade, dtype="float32")


def difference(first: Image.Image, second: Image.Image) -> int:
    return int(np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int)).max())


def test_a_picture_has_the_size_that_was_asked_for(cascade: Cascade) -> None:
    result = cascade.generate("a red apple", size="72x40", seed=1)
    assert result.images[0].size == (72, 40)
    assert result.latents_c.shape == (1, 16, 2, 3)
    assert result.latents_b.shape == (1, 4, 10, 18)
    assert set(result.timings) >= {"load", "text", "stage_c", "stage_b", "stage_a"}


def test_the_picture_depends_on_prompt_negative_and_seed(cascade: Cascade) -> None:
    def latents(prompt: str, **settings: object) -> torch.Tensor:
        return cascade.generate(prompt, **{"seed": 1, **settings}).latents_c

    first = latents("a red apple")
    assert torch.equal(first, latents("a red apple"))
    for other in (
        latents("a blue star"),
        latents("a red apple", seed=2),
        latents("a red apple", negative="sky"),
    ):
        assert not torch.equal(first, other)


def test_stage_b_listens_to_text_and_to_stage_c(cascade: Cascade) -> None:
    first = cascade.generate("a red apple", seed=1, steps=1)
    second = cascade.generate("a red apple", seed=1, steps=2)
    assert not torch.equal(first.latents_b, second.latents_b)


def test_each_picture_of_a_batch_equals_its_seed_alone(cascade: Cascade) -> None:
    together = cascade.generate("a red apple", count=3, seed=7)
    for index in range(3):
        alone = cascade.generate("a red apple", seed=7 + index)
        assert difference(alone.images[0], together.images[index]) <= 1


def test_pictures_of_equal_batches_are_equal_bit_for_bit(cascade: Cascade) -> None:
    first = cascade.generate("a red apple", count=3, seed=7, batch=3)
    second = cascade.generate("a red apple", seeds=(7, 90, 9), count=3, batch=3)
    for index in (0, 2):
        assert torch.equal(first.latents_b[index], second.latents_b[index])
        assert difference(first.images[index], second.images[index]) == 0


def test_prompts_of_unequal_length_do_not_touch_each_other(cascade: Cascade) -> None:
    long = "a red apple on the white sky with a blue star and the green square"  # two windows of 8 tokens
    mixed = cascade.generate([long, "a star", long], seeds=[1, 2, 3])
    for index, (prompt, seed) in enumerate([(long, 1), ("a star", 2), (long, 3)]):
        alone = cascade.generate(prompt, seed=seed)
        assert difference(alone.images[0], mixed.images[index]) <= 1


def test_a_word_in_the_second_window_counts(cascade: Cascade) -> None:
    start = "a red apple on the white sky with the "
    first, second = (cascade.generate(start + word, seed=1).latents_c for word in ("star", "circle"))
    assert not torch.equal(first, second)


def test_many_pairs_come_back_in_order(cascade: Cascade) -> None:
    result = cascade.generate(["a", "b", "a"], seeds=[1, 2, 3], batch=2)
    assert [(m["prompt"], m["seed"]) for m in result.metadata] == [("a", 1), ("b", 2), ("a", 3)]
    assert len(result.images) == len(result.latents_c) == 3


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler", "dpmpp_2m", "lcm"])
def test_every_sampler_runs_in_both_stages(cascade: Cascade, sampler: str) -> None:
    result = cascade.generate("a", seed=1, sampler=sampler, decoder_sampler=sampler)
    assert result.latents_b.isfinite().all()


def test_guidance_of_one_asks_the_network_once(cascade: Cascade) -> None:
    sizes: list[int] = []
    with cascade.parts.turn("stage_c") as network:
        handle = network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[2])))
    cascade.generate("a", seed=1, guidance=1, steps=1)
    cascade.generate("a", seed=1, guidance=2, steps=1)
    handle.remove()
    assert sizes == [1, 2]


def test_the_stream_tells_every_step_and_ends_with_the_result(cascade: Cascade) -> None:
    events = list(cascade.stream("a", seed=1, steps=3, decoder_steps=2, count=2))
    told = [(event.stage, event.step, event.steps) for event in events]
    assert told == [
        ("text", 0, 1),
        ("text", 1, 1),
        ("stage_c", 1, 3),
        ("stage_c", 2, 3),
        ("stage_c", 3, 3),
        ("stage_b", 1, 2),
        ("stage_b", 2, 2),
        ("stage_a", 1, 2),
        ("stage_a", 2, 2),
        ("done", 1, 1),
    ]
    assert all(event.previews is None for event in events)
    assert events[-1].result is not None
    assert events[-1].result.images == [event.image for event in events if event.image is not None]


def test_previews_come_when_asked_for(cascade: Cascade) -> None:
    previews = [
        e.previews for e in cascade.stream("a", seed=1, count=2, preview=True) if e.stage == "stage_c"
    ]
    assert all(shown is not None and len(shown) == 2 for shown in previews)
    assert previews[0] is not None
    assert previews[0][0].size == (16, 16)


def test_closing_the_stream_stops_the_work(tiny_cascade: Path) -> None:
    cascade = Cascade.load(tiny_cascade, dtype="float32", low_memory=True)
    calls: list[int] = []
    stream = cascade.stream("a", seed=1, steps=50)
    for event in stream:
        if event.stage == "stage_c" and event.step == 2:
            calls.append(event.step)
            break
    stream.close()
    assert not cascade.parts._loaded  # released although the stage was in the middle of its turn
    assert "stage_b" not in cascade.parts.timings


def test_low_memory_gives_the_same_picture_from_narrow_weights(narrow_cascade: Path) -> None:
    usual = Cascade.load(narrow_cascade, dtype="float32").generate("a star", seed=3)
    spare = Cascade.load(narrow_cascade, dtype="float32", low_memory=True)
    frugal = spare.generate("a star", seed=3)
    assert torch.equal(usual.latents_b, frugal.latents_b)
    assert not spare.parts._loaded
    assert set(spare.parts.weights.values()) == {"streamed"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precisions_stay_near(tiny_cascade: Path, cascade: Cascade, dtype: str) -> None:
    exact = cascade.generate("a star", seed=3).latents_c
    rough = Cascade.load(tiny_cascade, dtype=dtype).generate("a star", seed=3).latents_c
    assert 0 < (exact - rough).abs().max() < 0.1 * exact.abs().max()


def test_a_bad_request_loads_nothing(tiny_cascade: Path) -> None:
    cascade = Cascade.load(tiny_cascade)
    for wrong in ({"size": "500x300"}, {"sampler": "best"}, {"stpes": 3}):
        with pytest.raises(RequestError):
            cascade.stream("a", **wrong)
    assert not cascade.parts._loaded


def least_at(cascade: Cascade, size: str) -> int:
    request = cascade.resolve(Request(prompt="a", size=size, batch=1))
    return capacity.least(planning.needs_of(cascade.parts, request))


def test_too_large_a_picture_is_refused_before_loading(
    tiny_cascade: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = Cascade.load(tiny_cascade)
    least = least_at(cascade, "1024x1024")
    monkeypatch.setattr(planning, "room_on", lambda device, limit: least)
    with pytest.raises(
        CapacityError, match=r"needs at least .* can be used on cpu.*would fit with --batch 1 --size"
    ):
        cascade.stream("a", size="2048x2048")
    assert not cascade.parts._loaded


def test_a_request_for_another_model_is_refused(cascade: Cascade) -> None:
    with pytest.raises(RequestError, match="loaded with"):
        cascade.generate(Request(prompt="a", model="cascade"))


def test_a_resolved_request_can_be_made_again(cascade: Cascade) -> None:
    first = cascade.generate("a")  # the seed is drawn
    again = cascade.generate(first.request)
    assert again.request == first.request
    assert torch.equal(first.latents_b, again.latents_b)


def spoil(source: Path, target: Path, name: str) -> Path:
    """A copy of a tiny part with NaN as the last number of the tensor `name`."""
    tensors = {name: tensor.clone() for name, tensor in read_tensors(source).items()}
    tensors[name].view(-1)[-1] = float("nan")
    write_part(target / source.name, tensors, read_metadata(source))
    (target / "tokenizer.json").write_bytes((source.parent / "tokenizer.json").read_bytes())
    return target / source.name


NAN = [
    ("text_encoder", "norm.weight", {"text"}),
    ("text_encoder", "tokens.weight", {"text"}),  # of a word that is not in the prompt: no output shows it
    ("stage_c", "clf.1.weight", {"text"}),
    ("stage_b", "clf.1.weight", {"text", "stage_c"}),
    ("stage_a", "up_blocks.0.0.weight", {"text", "stage_c", "stage_b"}),
    ("stage_a", "vquantizer.codebook.weight", {"text", "stage_c", "stage_b"}),  # decoding does not use it
]


@pytest.mark.parametrize(("part", "name", "before"), NAN)
def test_nan_in_weights_names_file_and_tensor_before_they_run(
    tiny_cascade: Path, tmp_path: Path, part: str, name: str, before: set[str]
) -> None:
    broken = spoil(tiny_cascade / f"{part}.safetensors", tmp_path, name)
    stream = Cascade.load(tiny_cascade, **{part: broken}).stream("a", seed=1)
    seen: set[str] = set()
    with pytest.raises(CheckpointError) as caught:
        seen.update(event.stage for event in stream)
    assert f"{broken} has numbers that are NaN or infinite, first in '{name}'" in str(caught.value)
    assert seen == before


def test_numbers_that_turn_bad_while_computing_are_not_blamed_on_the_file(tiny_cascade: Path) -> None:
    cascade = Cascade.load(tiny_cascade, dtype="float32")
    cascade.generate("a", seed=1)
    with cascade.parts.turn("stage_c") as network, torch.no_grad():
        network.clf[1].bias.fill_(torch.inf)  # a private copy in memory, as a narrow format would make
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float32, although its weights are"):
        cascade.generate("a", seed=1)


def test_memory_running_out_on_the_way_is_said_so(cascade: Cascade) -> None:
    with pytest.raises(CapacityError, match="Memory ran out in stage_b"), cascade.parts.turn("stage_b"):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")


def test_noise_is_a_function_of_seed_stage_and_step() -> None:
    first = draw(1, "stage_c", START, (2, 3))
    assert torch.equal(first, draw(1, "stage_c", START, (2, 3)))
    others = [
        draw(2, "stage_c", START, (2, 3)),
        draw(1, "stage_b", START, (2, 3)),
        draw(1, "stage_c", 0, (2, 3)),
    ]
    others.append(draw(1 + 2**32, "stage_c", START, (2, 3)))  # torch's own generator reads 32 bits of a seed
    assert not any(torch.equal(first, other) for other in others)


def test_public_names_are_there() -> None:
    assert all(getattr(triptych, name) is not None for name in triptych.__all__)
    assert dir(triptych) == triptych.__all__
    with pytest.raises(AttributeError, match="no attribute 'Cascades'"):
        _ = triptych.Cascades
