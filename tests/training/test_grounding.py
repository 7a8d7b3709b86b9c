"""What stands where: maps of drawn shapes against their truth, and a loss that only known places enter."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from test_objectives import FROZEN
from tiny_cascade import write_tiny_cascade

from triptych.checkpoints.files import read_tensors
from triptych.data.shapes import COLOURS, SHAPES, draw_shapes
from triptych.training.config import RunSettings, check_settings
from triptych.training.grounding import NAMES, UNKNOWN, Grounding, grounding_loss, object_map
from triptych.training.loop import train

BACKGROUND = torch.tensor([len(SHAPES), len(COLOURS)])


@pytest.mark.parametrize("size", [(256, 256), (384, 256), (192, 320)])
def test_a_map_names_every_object_at_its_middle_and_background_elsewhere(size: tuple[int, int]) -> None:
    width, height = size
    for seed in range(40):
        sample = draw_shapes(seed, width, height)
        found = object_map(sample.meta, sample.image.size, (height // 32, width // 32))
        assert found is not None
        assert found.shape == (2, height // 32, width // 32)
        shown = set()
        for thing in sample.meta["objects"]:
            x, y = (int(place // 32) for place in thing["center"])
            near = found[:, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].flatten(1).T.tolist()
            named = [SHAPES.index(thing["shape"]), list(COLOURS).index(thing["colour"])]
            assert named in near
            shown.add(tuple(named))
        others = {tuple(column) for column in found.flatten(1).T.tolist()} - shown
        assert others == {tuple(BACKGROUND.tolist())}


def test_pictures_without_truth_have_no_map_and_no_loss() -> None:
    assert object_map({"licence": "CC0-1.0"}, (256, 256), (8, 8)) is None
    assert object_map({"objects": [{"category_id": 3}]}, (256, 256), (8, 8)) is None
    logits = torch.randn(2, sum(NAMES), 8, 8, requires_grad=True)
    unknown = torch.full((2, 2, 8, 8), UNKNOWN)
    loss = grounding_loss(logits, unknown)
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) == 0


def test_the_loss_is_the_entropy_of_a_guess_and_ignores_unknown_rows() -> None:
    maps = torch.stack([torch.stack([torch.full((4, 4), 3), torch.full((4, 4), 5)])] * 2)
    guess = torch.zeros(2, sum(NAMES), 4, 4)
    guess[1] = 100 * torch.randn(sum(NAMES), 4, 4)
    maps[1] = UNKNOWN
    assert float(grounding_loss(guess, maps)) == pytest.approx(math.log(NAMES[0]) + math.log(NAMES[1]))


def test_places_are_named_independently_of_each_other() -> None:
    head, x = Grounding(16), torch.randn(2, 16, 3, 5)
    whole = head(x)
    assert whole.shape == (2, sum(NAMES), 3, 5)
    torch.testing.assert_close(head(x[:, :, 1:2, 2:3]), whole[:, :, 1:2, 2:3])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_cascade(tmp_path_factory.mktemp("model"))


def settings(model: Path, out: Path, steps: int, **data: object) -> RunSettings:
    return check_settings(
        {
            "recipe": "stage_c", "out": str(out), "steps": steps, "batch": 4, "tensorboard": False,
            "log_every": 1, "sample_every": 1000, "network": {"dropout": [0.0, 0.0]},
            "optim": {"lr": 3e-3, "warmup": 1}, "diffusion": {"grounding": 1.0},
            "parts": {part: str(model / f"{part}.safetensors") for part in FROZEN},
            "data": {"shapes": 8, "size": 64, "random_crop": False, "ratios": [1.0], **data},
        }, "test",
    )  # fmt: skip


def logged(out: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines]


def test_a_run_learns_to_name_what_it_is_shown_and_writes_only_the_network(
    model: Path, tmp_path: Path
) -> None:
    train(settings(model, tmp_path, 60, cache=str(tmp_path / "cache")))
    named = logged(tmp_path, "stage_c.grounding")
    assert sum(named[-5:]) < 0.6 * sum(named[:5])
    assert not any("name" in tensor for tensor in read_tensors(tmp_path / "stage_c.safetensors"))


def test_a_cache_keeps_what_stands_where(model: Path, tmp_path: Path) -> None:
    train(settings(model, tmp_path, 1, cache=str(tmp_path / "cache")))
    kept = read_tensors(tmp_path / "cache" / "samples-00000.safetensors")
    for number in range(8):
        sample = draw_shapes(number, 64, 64)
        wanted = object_map(sample.meta, sample.image.size, (2, 2))
        assert wanted is not None
        assert torch.equal(kept[f"o.{number}"], wanted)


def test_the_same_run_with_and_without_a_cache_is_told_the_same(model: Path, tmp_path: Path) -> None:
    train(settings(model, tmp_path / "live", 3, captions=6))
    train(settings(model, tmp_path / "cached", 3, captions=6, cache=str(tmp_path / "cache")))
    live, cached = (logged(tmp_path / name, "stage_c.grounding") for name in ("live", "cached"))
    assert live == pytest.approx(cached, rel=1e-2)  # a cache rounds latents to float16
