"""ControlNets train on any kind of hint, leave Stage C alone, resume exactly, and load in the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from triptych.checkpoints.files import read_tensors
from triptych.checkpoints.load import load_part
from triptych.data.batches import BatchPlan
from triptych.errors import SettingsError
from triptych.training.config import RunSettings, read_settings
from triptych.training.loop import Progress, train
from triptych.training.sources import Pictures

TINY = Path(__file__).parents[2] / "recipes" / "tiny"


def settings(out: Path, *changes: str, recipe: str = "canny") -> RunSettings:
    return read_settings(TINY / f"controlnet_{recipe}.toml", [f"out={out}", "tensorboard=false", *changes])


class Stopped(Exception):
    """What a test raises in place of a power cut."""


def stop_at(step: int):
    def watch(progress: Progress) -> None:
        if progress.what == "train" and progress.step == step:
            raise Stopped

    return watch


def same(first: Path, second: Path) -> bool:
    one, two = read_tensors(first), read_tensors(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("recipe", ["canny", "palette"])
def test_a_recipe_runs_by_itself_and_its_weights_say_what_they_follow(recipe: str, tmp_path: Path) -> None:
    train(settings(tmp_path, "steps=2", "save_every=2", "sample_every=2", recipe=recipe))
    network, info = load_part(tmp_path / "controlnet.safetensors", "controlnet")
    assert info.settings == {"hint": recipe}
    assert info.step == 2
    assert network.config.blocks == (0, 1, 2, 3)
    assert (tmp_path / "samples" / "0000002.png").exists()


@pytest.mark.parametrize("hint", ["inpainting", "super_resolution", "pixel_super_resolution", "qr"])
def test_every_kind_trains_by_its_name(hint: str, tmp_path: Path) -> None:
    changes = [f"control.hint={hint}", "steps=2", "sample_every=99", "log_every=1", "optim.warmup=1"]
    train(settings(tmp_path, *changes, "control.box_share=0.5"))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(line["controlnet.gradient_norm"] > 0 for line in lines)


def test_a_stopped_run_continues_bit_for_bit(tmp_path: Path) -> None:
    changes = ("steps=5", "save_every=2", "sample_every=100", "control.hint=inpainting", "accumulate=1")
    train(settings(tmp_path / "unbroken", *changes))
    with pytest.raises(Stopped):
        train(settings(tmp_path / "broken", *changes), stop_at(3))
    train(settings(tmp_path / "broken", *changes))
    assert same(tmp_path / "unbroken" / "state.safetensors", tmp_path / "broken" / "state.safetensors")


def test_it_learns_one_batch_and_its_batch_norms_stay(tmp_path: Path) -> None:
    changes = [
        "steps=40", "log_every=1", "sample_every=1000", "save_every=1000", "optim.lr=1e-2", "batch=4",
        "accumulate=1", "data.random_crop=false", "data.size=64", "ema.start=0", "ema.beta=0.5",
    ]  # fmt: skip
    train(settings(tmp_path, *changes))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["controlnet.loss"] for line in lines]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    trained = read_tensors(tmp_path / "controlnet.safetensors")
    encoder = read_tensors(TINY / "parts" / "semantic.safetensors")
    mean = "backbone.3.0.block.0.1.running_mean"
    assert torch.equal(trained[mean].float(), encoder[mean].float())


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_cached_latents_give_the_same_losses(share: float, tmp_path: Path) -> None:
    changes = ("steps=2", "log_every=1", "sample_every=99", "data.random_crop=false", "diffusion.weight=p2",
               f"control.other_caption={share}")  # fmt: skip
    train(settings(tmp_path / "live", *changes))
    train(settings(tmp_path / "cached", *changes, f"data.cache={tmp_path}/cache"))
    losses = [
        [
            json.loads(line)["controlnet.loss"]
            for line in (tmp_path / run / "log.jsonl").read_text().splitlines()
        ]
        for run in ("live", "cached")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("control.hint=cany", 'control.hint "cany": did you mean "canny"'),
        ("network.width=64", "does not fit a Stage C of width 32"),
        ("network.blocks=[0, 9]", "this Stage C has blocks 0 to 3"),
        ("control.hint=identity", "needs an ONNX file that reads faces"),
        ("control.hint=soft_edges", "need the edge network PiDiNet"),
        ("data.cache=somewhere", "needs data.random_crop = false"),
    ],
)
def test_what_cannot_be_trained_has_its_sentence(change: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said.replace("[", r"\[")):
        train(settings(tmp_path, change))


@pytest.mark.parametrize(("share", "others"), [(0.0, 0), (0.5, 40), (1.0, 80)])
def test_a_share_of_pictures_is_told_the_caption_of_another(
    share: float, others: int, tmp_path: Path
) -> None:
    pictures = Pictures(settings(tmp_path, f"control.other_caption={share}"))
    told = 0
    for step in range(10):
        plan = BatchPlan(step, 0, 0, tuple(range(8)), 8 * step)
        for place in range(8):
            sample = pictures.told_of(plan, place)
            assert sample in (place, (place + 1) % 8)
            told += sample != place
    assert abs(told - others) <= 15 * (0 < share < 1)


def test_a_picture_in_place_of_a_broken_one_is_told_its_own_caption_and_none_is_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = Pictures(settings(tmp_path))
    plan, read, asked = BatchPlan(0, 0, 0, tuple(range(8)), 0), pictures.source.read, []
    monkeypatch.setattr(pictures.source, "read", lambda index: None if index == 3 else read(index))
    monkeypatch.setattr(pictures.source, "captions", asked.append)
    batch = pictures.load(plan, range(8))
    told = pictures.captions(batch, [pictures.told_of(plan, place) for place in range(8)])
    assert all(caption in sample.captions for caption, sample in zip(told, batch.samples, strict=True))
    assert batch.samples[3].key == batch.samples[4].key
    assert asked == []
