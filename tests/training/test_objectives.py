"""What Stages B and C learn from: masks, captions, dropped conditions, long prompts; cached or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_cascade import write_tiny_cascade
from torch import Tensor

from triptych.conditioning.encode import condition, load_text_encoder
from triptych.data.batches import Batch
from triptych.diffusion.loss import AdaptiveWeight
from triptych.training.config import RunSettings, check_settings
from triptych.training.draws import Draws
from triptych.training.encoders import Encoded, Encoders, load_encoders, shrink_mask
from triptych.training.loop import train
from triptych.training.recipes import DiffusionBatch, encode_batch, masked, stage_c_loss
from triptych.training.sources import Pictures

FROZEN = ("stage_a", "semantic", "previewer", "text_encoder")
LONG = "a red apple on the white sky with a blue star and the green square on a circle " * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_cascade(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of tags; two of them have a mask, one of those as opacity."""
    root = tmp_path_factory.mktemp("pictures")
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    for number, colour in enumerate(("red", "green", "blue", "white")):
        image = Image.new("RGB", (64, 64), colour)
        if number == 0:
            half.save(root / "0-mask.png")
        if number == 1:
            image.putalpha(half)
        image.save(root / f"{number}.png")
        (root / f"{number}.txt").write_text("a star, red, blue, green, white")
    return root


def settings(model: Path, pictures: Path, out: Path, **changes: object) -> RunSettings:
    raw: dict[str, object] = {
        "recipe": "stage_c", "out": str(out), "steps": 3, "batch": 2, "tensorboard": False, "log_every": 1,
        "sample_every": 100, "network": {"dropout": [0.0, 0.0]}, "optim": {"warmup": 1},
        "parts": {part: str(model / f"{part}.safetensors") for part in FROZEN},
        **changes,
    }  # fmt: skip
    data = {"shards": [str(pictures)], "size": 64, "random_crop": False}
    return check_settings(raw | {"data": data | dict(raw.get("data", {}))}, "test")  # type: ignore[call-overload]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["stage_c.loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("what", ["masks", "tags"])
def test_masks_and_rearranged_captions_are_the_same_from_a_cache(
    what: str, model: Path, pictures: Path, tmp_path: Path
) -> None:
    data = {"shuffle_tags": True, "keep_tags": 1, "drop_tags": 0.3} if what == "tags" else {}
    diffusion = {"masked": what == "masks", "unmasked": 0.1, "weight": "p2"}
    train(settings(model, pictures, tmp_path / "live", data=data, diffusion=diffusion))
    data["cache"] = str(tmp_path / "cache")
    train(settings(model, pictures, tmp_path / "cached", data=data, diffusion=diffusion))
    assert losses(tmp_path / "live") == pytest.approx(losses(tmp_path / "cached"), rel=3e-3)


def test_a_cache_follows_captions_and_masks_that_change(model: Path, pictures: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pictures, tmp_path / "pictures")
    marks = []
    for change in (None, None, "0.txt", "0-mask.png"):
        if change is not None:
            (copy / change).unlink()
        data = {"cache": str(tmp_path / "cache")}
        train(settings(model, copy, tmp_path / f"out{len(marks)}", data=data, steps=1))
        marks.append((tmp_path / "cache" / "made_from.json").read_text())
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3


def test_tags_differ_from_step_to_step_and_not_from_run_to_run(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    data = {"shuffle_tags": True, "keep_tags": 1}
    first, again = (Pictures(settings(model, pictures, tmp_path, data=data)) for _ in range(2))
    told = []
    for source in (first, again):
        plans = [source.order().plan(step) for step in range(6)]
        told.append([caption for plan in plans for caption in source.captions(source.load(plan, (0, 1)))])
    assert told[0] == told[1]
    assert len(set(told[0])) > 4
    assert all(caption.startswith("a star, ") for caption in told[0])
    assert {frozenset(caption.split(", ")) for caption in told[0]} == {
        frozenset(("a star", "red", "blue", "green", "white"))
    }


def test_a_mask_shrinks_to_the_latents_and_a_floor_lies_under_it() -> None:
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :48] = 1
    diffusion = check_settings(
        {"recipe": "stage_c", "out": "x", "diffusion": {"masked": True, "unmasked": 0.2}}, "test"
    ).diffusion
    weigh = masked(shrink_mask(mask), torch.zeros(1, 16, 4, 4), diffusion)
    assert weigh is not None
    torch.testing.assert_close(weigh[0, 0, 0], torch.tensor([1.0, 0.6, 0.2, 0.2]))
    assert masked(None, torch.zeros(1, 16, 4, 4), diffusion) is None


def told_to_stage_c(settings: RunSettings, encoded: Encoded, encoders: Encoders) -> tuple[Tensor, ...]:
    """What the network is given for one batch."""
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, *beside: Tensor) -> Tensor:
        seen.extend((x, t, *beside))
        return x

    draws = Draws(0, 0, range(len(encoded.latents_c)))
    stage_c_loss(settings, network, encoded, draws, AdaptiveWeight(), encoders, torch.device("cpu"))
    return tuple(seen)


def test_times_crowd_towards_noise_by_their_power(model: Path, pictures: Path, tmp_path: Path) -> None:
    text = load_text_encoder(model / "text_encoder.safetensors")
    encoded = Encoded(torch.zeros(64, 16, 1, 1), None, *text.encode(["a star"] * 64), None)
    published, crowded = (
        told_to_stage_c(
            settings(model, pictures, tmp_path, diffusion={"time_power": power}), encoded, Encoders(text=text)
        )[1]
        for power in (1.0, 0.15)
    )
    torch.testing.assert_close(
        crowded, published**0.15, rtol=0, atol=0.01
    )  # the schedule ends before 0 and 1
    assert published.median() < 0.6 < 0.85 < crowded.median()


def test_conditions_are_left_out_by_their_shares(model: Path, pictures: Path, tmp_path: Path) -> None:
    text = load_text_encoder(model / "text_encoder.safetensors")
    hidden, pooled = text.encode(["a red star"] * 400)
    encoded = Encoded(torch.zeros(400, 16, 1, 1), None, hidden, pooled, torch.ones(400, 384))
    encoders = Encoders(text=text)
    for drop, keep in ((0.05, 0.1), (0.4, 0.7)):
        diffusion = {"drop_text": drop, "keep_image": keep}
        own = settings(model, pictures, tmp_path, diffusion=diffusion)
        _, _, told, _, image = told_to_stage_c(own, encoded, encoders)
        empty = text.encode([""])[0]
        share = (told - empty).flatten(1).abs().sum(1).lt(1e-6).float().mean()
        assert float(share) == pytest.approx(drop, abs=0.06)
        assert float(image[:, 0].mean()) == pytest.approx(keep, abs=0.07)


def test_long_captions_are_read_in_training_as_in_generation(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    """Beyond one window: joined windows, the pooled vector of the first, the empty caption equally long."""
    text = load_text_encoder(model / "text_encoder.safetensors")
    own = Pictures(settings(model, pictures, tmp_path))
    plan = own.order().plan(0)
    read = own.load(plan, (0,))
    encoders = load_encoders(own.settings.parts, ["semantic", "text_encoder"], torch.device("cpu"))
    batch = DiffusionBatch(plan, (0,), Batch(plan, (0,), read.pixels, read.samples), [LONG])
    encoded = encode_batch(own.settings, encoders, batch, torch.device("cpu"))
    wanted = condition(text, [LONG])
    assert text.count_windows(LONG) > 2
    torch.testing.assert_close(encoded.text_hidden, wanted.text_hidden)
    torch.testing.assert_close(encoded.text_pooled, wanted.text_pooled[:, 0])
    dropped = settings(model, pictures, tmp_path, diffusion={"drop_text": 1.0})
    _, _, hidden, pooled, *_ = told_to_stage_c(dropped, encoded, encoders)
    nothing = condition(text, [""], windows=text.count_windows(LONG))
    torch.testing.assert_close(hidden, nothing.text_hidden)
    torch.testing.assert_close(pooled, nothing.text_pooled[:, 0])
