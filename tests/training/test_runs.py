"""Training runs: every tiny recipe works by itself, learns, and continues exactly where it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from triptych.checkpoints.files import read_tensors, write_part
from triptych.checkpoints.load import load_part
from triptych.conditioning.encode import load_image_encoder
from triptych.training.config import RunSettings, read_settings
from triptych.training.loop import Progress, train
from triptych.training.sources import Pictures

RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
PARTS = {
    "stage_a": ["stage_a"],
    "semantic": ["semantic", "previewer"],
    "stage_b": ["stage_b"],
    "stage_c": ["stage_c"],
}


def settings(recipe: str, out: Path, *changes: str) -> RunSettings:
    return read_settings(RECIPES / f"{recipe}.toml", [f"out={out}", "tensorboard=false", *changes])


def same_tensors(first: Path, second: Path) -> bool:
    one, two = read_tensors(first), read_tensors(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Stopped(Exception):
    """What a test raises in place of a power cut."""


def stop_at(step: int):
    def watch(progress: Progress) -> None:
        if progress.what == "train" and progress.step == step:
            raise Stopped

    return watch


@pytest.mark.parametrize("recipe", PARTS)
def test_a_tiny_recipe_runs_by_itself_and_writes_parts_that_load(recipe: str, tmp_path: Path) -> None:
    train(settings(recipe, tmp_path, "steps=4", "save_every=4", "sample_every=4"))
    for part in PARTS[recipe]:
        _, info = load_part(tmp_path / f"{part}.safetensors", part)
        assert info.step == 4
        assert info.recipe == settings(recipe, tmp_path).name
    assert (tmp_path / "samples" / "0000004.png").exists()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4


@pytest.mark.parametrize("recipe", PARTS)
def test_a_stopped_run_continues_bit_for_bit(recipe: str, tmp_path: Path) -> None:
    changes = ("steps=7", "save_every=3", "sample_every=100", "autoencoder.adversarial_start=2")
    train(settings(recipe, tmp_path / "unbroken", *changes))
    with pytest.raises(Stopped):
        train(settings(recipe, tmp_path / "broken", *changes), stop_at(5))
    train(settings(recipe, tmp_path / "broken", *changes))
    assert same_tensors(
        tmp_path / "unbroken" / "state.safetensors", tmp_path / "broken" / "state.safetensors"
    )
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps))


def test_a_killed_process_leaves_a_state_that_continues_exactly(tmp_path: Path) -> None:
    changes = ["steps=8", "save_every=1", "sample_every=100", "log_every=1", "tensorboard=false"]
    flags = [flag for change in changes for flag in ("--set", change)]
    command = [sys.executable, "-m", "triptych.apps.cli.main", "train", str(RECIPES / "stage_c.toml"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [*command, "--set", f"out={broken}"], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (broken / "state.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for out in (broken, tmp_path / "unbroken"):
        subprocess.run([*command, "--set", f"out={out}"], env=environment, check=True, capture_output=True)
    assert same_tensors(tmp_path / "unbroken" / "state.safetensors", broken / "state.safetensors")


def test_the_image_encoder_comes_nearer_to_the_captions(tmp_path: Path) -> None:
    train(settings("image_encoder", tmp_path, "log_every=1"))
    encoder = load_image_encoder(tmp_path / "image_encoder.safetensors")
    vectors = encoder.encode(torch.rand(2, 3, 70, 90))
    assert vectors.shape == (2, 384)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    losses = [
        json.loads(line)["image_encoder.loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    changes = ("steps=3", "diffusion.weight=p2", "data.ratios=[1.0]", "network.dropout=[0.0, 0.0]")
    train(settings("stage_c", tmp_path / "whole", *changes, "accumulate=1"))
    train(settings("stage_c", tmp_path / "parts", *changes, "accumulate=4"))
    whole = read_tensors(tmp_path / "whole" / "stage_c.safetensors")
    parts = read_tensors(tmp_path / "parts" / "stage_c.safetensors")
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("recipe", ["stage_b", "stage_c"])
def test_training_from_a_cache_gives_the_same_losses(recipe: str, tmp_path: Path) -> None:
    changes = (
        "steps=4", "log_every=1", "data.ratios=[1.0]", "data.random_crop=false", "diffusion.weight=p2",
        "diffusion.semantic_scale=[1.0, 1.0]", "network.dropout=[0.0, 0.0]",
    )  # fmt: skip
    train(settings(recipe, tmp_path / "live", *changes))
    train(settings(recipe, tmp_path / "cached", *changes, f"data.cache={tmp_path}/cache"))
    losses = [
        [
            json.loads(line)[f"{recipe}.loss"]
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("live", "cached")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_cache_holds_repeated_pictures_once_and_is_told_the_same(tmp_path: Path) -> None:
    changes = ("steps=4", "log_every=1", "data.ratios=[1.0]", "data.random_crop=false", "data.repeat=3")
    train(settings("stage_c", tmp_path / "live", *changes))
    train(settings("stage_c", tmp_path / "cached", *changes, f"data.cache={tmp_path}/cache"))
    live, cached = (
        [
            json.loads(line)["stage_c.loss"]
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("live", "cached")
    )
    assert live == pytest.approx(cached, rel=2e-3)
    kept = [name for path in (tmp_path / "cache").glob("samples-*") for name in read_tensors(path)]
    pictures = len(Pictures(settings("stage_c", tmp_path, *changes[:-1])).source)
    assert sum(name.startswith("c.") for name in kept) == pictures


def test_a_cache_is_made_again_when_what_made_it_changes(tmp_path: Path) -> None:
    seen: list[str] = []
    for changes in ((), (), ("data.size=64",)):
        run = settings(
            "stage_c", tmp_path, "steps=1", f"data.cache={tmp_path}/cache", "data.ratios=[1.0]", *changes
        )
        (tmp_path / "state.safetensors").unlink(missing_ok=True)
        train(run)
        mark = (tmp_path / "cache" / "samples-00000.safetensors").stat().st_mtime_ns
        seen.append(str(mark))
    assert seen[0] == seen[1]
    assert seen[1] != seen[2]


def test_stage_c_reads_the_cache_of_stage_b_whatever_stage_a_is_now(tmp_path: Path) -> None:
    common = ("steps=1", f"data.cache={tmp_path}/cache", "data.ratios=[1.0]")
    train(settings("stage_b", tmp_path / "b", *common, "diffusion.semantic_scale=[1.0, 1.0]"))
    file = tmp_path / "cache" / "samples-00000.safetensors"
    made = file.stat().st_mtime_ns
    other = tmp_path / "stage_a.safetensors"
    network, info = load_part(RECIPES / "parts" / "stage_a.safetensors", "stage_a")
    write_part(other, {name: 1.01 * t for name, t in network.state_dict().items()}, info)
    train(settings("stage_c", tmp_path / "c", *common, f"parts.stage_a={other}"))
    assert file.stat().st_mtime_ns == made
    train(
        settings(
            "stage_b",
            tmp_path / "b2",
            *common,
            f"parts.stage_a={other}",
            "diffusion.semantic_scale=[1.0, 1.0]",
        )
    )
    assert file.stat().st_mtime_ns != made


def test_a_run_can_start_from_averaged_weights_alone(tmp_path: Path) -> None:
    train(settings("stage_c", tmp_path / "first", "steps=2", "ema.start=0"))
    changes = (f"init={tmp_path / 'first'}", "steps=1", "optim.warmup=1")  # the first update has rate 0
    train(settings("stage_c", tmp_path / "second", *changes))
    assert same_tensors(
        tmp_path / "first" / "stage_c.safetensors", tmp_path / "second" / "stage_c.safetensors"
    )


@pytest.mark.parametrize("recipe", PARTS)
def test_every_recipe_overfits_one_batch(recipe: str, tmp_path: Path) -> None:
    changes = [
        "steps=60", "log_every=1", "sample_every=1000", "save_every=1000", "optim.lr=3e-3", "batch=4",
        "accumulate=1", "data.ratios=[1.0]", "data.random_crop=false", "autoencoder.adversarial=0.0",
        "autoencoder.latent_noise=0.0", "autoencoder.quantised=0.0",
    ]  # fmt: skip
    if recipe == "semantic":
        changes.append("data.size=64")
    train(settings(recipe, tmp_path, *changes))
    player = "autoencoder" if recipe in ("stage_a", "semantic") else recipe
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line[f"{player}.loss"] for line in lines]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_weights_written_as_int8_are_small_and_near_those_of_the_run(tmp_path: Path) -> None:
    changes = ("steps=2", "save_every=2", "sample_every=100")
    train(settings("stage_c", tmp_path / "wide", *changes))
    train(settings("stage_c", tmp_path / "narrow", *changes, "store=int8"))
    files = [tmp_path / name / "stage_c.safetensors" for name in ("wide", "narrow")]
    assert files[1].stat().st_size < 0.5 * files[0].stat().st_size
    wide, narrow = (load_part(file, "stage_c")[0].state_dict() for file in files)
    for name, tensor in wide.items():
        rows = tensor.flatten(1) if tensor.ndim > 1 else tensor[None]
        step = rows.abs().amax(1, keepdim=True) / 127
        assert ((narrow[name].view_as(rows) - rows).abs() <= 0.51 * step).all(), name
