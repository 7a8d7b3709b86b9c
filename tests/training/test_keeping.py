"""Never lose work: a test for every row of the table in docs/training.md."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_task import small_settings, small_task

from triptych.checkpoints.files import read_tensors
from triptych.data.batches import load_batch, order_of
from triptych.data.buckets import Bucket
from triptych.data.shards import ShardIndex
from triptych.errors import CapacityError, CheckpointError, TrainingError
from triptych.training.changes import FIXED, FREE, flat, within
from triptych.training.config import RunSettings, read_settings
from triptych.training.loop import Progress, train, train_task
from triptych.training.state import stored
from triptych.training.stopping import Stop, stop_on_signals

SQUARE = [Bucket(64, 64, 1.0)]
RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
TINY = (
    "data.size=64", "batch=2", "save_every=1", "sample_every=1000", "log_every=1", "tensorboard=false",
    "ema.start=2",
)  # fmt: skip


def run_small(settings: RunSettings, spoilt_steps=(), watch=lambda progress: None, stop=None) -> list[str]:
    """Train the small task; returns what it told."""
    told: list[str] = []
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    task = small_task(settings, spoilt_steps)
    train_task(settings, task, torch.device("cpu"), watch, stop or Stop(), told.append)
    return told


def same_state(first: Path, second: Path) -> bool:
    one, two = (read_tensors(folder / "state.safetensors") for folder in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def log_lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def train_quietly(settings: RunSettings) -> None:
    torch.set_num_threads(1)
    train(settings, tell=lambda text: None)


def kill_and_continue(settings: RunSettings, train: Callable[[RunSettings], object], kills: int) -> int:
    """Kill -9 a run at random moments, each process going on where the last one fell; gives the last step."""
    begun = multiprocessing.get_context("forkserver")
    begun.set_forkserver_preload(["triptych.training.recipes", "triptych.training.loop"])
    out = Path(settings.out)
    moments = random.Random(0)
    for number in range(kills):
        step = stored(out).get("step", 0)
        process = begun.Process(target=train, args=(settings,))
        process.start()
        # Half of the kills may fall while a process starts, the others after it has made some steps.
        limit = time.monotonic() + 120
        while number % 2 and stored(out).get("step", 0) < step + 2:
            assert process.is_alive()
            assert time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.3))
        assert process.is_alive()
        process.kill()
        process.join()
        process.close()
    return int(stored(out)["step"])


def test_a_run_killed_twenty_times_ends_bit_for_bit_like_an_unbroken_one(tmp_path: Path) -> None:
    endless = small_settings(tmp_path / "broken", steps=1_000_000, save_every=1)
    step = kill_and_continue(endless, run_small, 20)
    for name in ("broken", "unbroken"):
        run_small(small_settings(tmp_path / name, steps=step + 1, save_every=1))
    assert step > 20
    assert same_state(tmp_path / "broken", tmp_path / "unbroken")
    assert [line["step"] for line in log_lines(tmp_path / "broken")] == list(range(1, step + 2))


def test_a_recipe_killed_at_random_moments_does_so_too(tmp_path: Path) -> None:
    endless = read_settings(RECIPES / "semantic.toml", [f"out={tmp_path}/broken", "steps=100000", *TINY])
    step = kill_and_continue(endless, train_quietly, 3)
    for name in ("broken", "unbroken"):
        changes = [f"out={tmp_path / name}", f"steps={step + 1}", *TINY]
        train(read_settings(RECIPES / "semantic.toml", changes), tell=lambda text: None)
    assert same_state(tmp_path / "broken", tmp_path / "unbroken")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_update_at_hand_and_the_run_goes_on_from_there(
    number: signal.Signals, tmp_path: Path
) -> None:
    def watch(progress: Progress) -> None:
        if progress.step == 3:
            signal.raise_signal(number)
            signal.raise_signal(number)  # launchers and terminals both send one

    with stop_on_signals() as stop:
        run_small(small_settings(tmp_path / "broken", save_every=100), watch=watch, stop=stop)
    assert stop.step == stored(tmp_path / "broken")["step"] == 3
    for name in ("broken", "unbroken"):
        run_small(small_settings(tmp_path / name, save_every=100))
    assert same_state(tmp_path / "broken", tmp_path / "unbroken")


def test_the_command_ends_with_0_on_sigterm_and_says_how_to_continue(tmp_path: Path) -> None:
    arguments = ["train", str(RECIPES / "semantic.toml"), "--set", f"out={tmp_path}", "--set", "steps=100000"]
    arguments += [part for change in TINY for part in ("--set", change)]
    command = [sys.executable, "-m", "triptych.apps.cli.main", *arguments]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    limit = time.monotonic() + 240
    while not (tmp_path / "state.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0].decode()
    assert process.returncode == 0
    assert f"saved at step {stored(tmp_path)['step']}" in said
    assert f"Continue with: triptych train {RECIPES / 'semantic.toml'} --set out={tmp_path}" in said


class FullDisk:
    """No file may grow beyond a kilobyte from one step to another, as the system enforces it."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.free = resource.getrlimit(resource.RLIMIT_FSIZE)

    def __call__(self, progress: Progress) -> None:
        if progress.step == self.first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, self.free[1]))
        if progress.step == self.last:
            self.end()

    def end(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.free)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_tries_again(tmp_path: Path) -> None:
    seen = []
    full = FullDisk(first=4, last=6)

    def watch(progress: Progress) -> None:
        full(progress)
        seen.append(stored(tmp_path / "run").get("step", 0))

    try:
        told = run_small(small_settings(tmp_path / "run"), watch=watch)
    finally:
        full.end()
    assert seen == [0, 0, 2, 2, 2, 2, 6, 6]  # the saves after updates 4 and 5 failed, that after 6 did not
    assert any("disk is full" in text and "checkpoint of step 2 is kept" in text for text in told)
    run_small(small_settings(tmp_path / "unbroken"))
    assert same_state(tmp_path / "run", tmp_path / "unbroken")


def test_a_disk_that_stays_full_ends_the_run_with_the_last_checkpoint(tmp_path: Path) -> None:
    full = FullDisk(first=4, last=100)
    try:
        with pytest.raises(CapacityError, match="checkpoint of step 2 is kept: make room"):
            run_small(small_settings(tmp_path / "run"), watch=full)
    finally:
        full.end()
    run_small(small_settings(tmp_path / "run"))
    run_small(small_settings(tmp_path / "unbroken"))
    assert same_state(tmp_path / "run", tmp_path / "unbroken")


def test_a_loss_that_is_no_number_ends_the_run_naming_the_batch(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        run_small(small_settings(tmp_path), spoilt_steps=[4])
    names = [f"sample {sample}" for sample in small_task(small_settings(tmp_path)).order.plan(4).samples]
    assert f"at step 5 (pictures {', '.join(names)})" in str(caught.value)
    assert "checkpoint of step 4 is intact" in str(caught.value)
    assert 'not_finite = "skip"' in str(caught.value)
    assert all(tensor.isfinite().all() for tensor in read_tensors(tmp_path / "state.safetensors").values())


def test_such_an_update_is_left_out_and_counted_by_choice(tmp_path: Path) -> None:
    run_small(small_settings(tmp_path, not_finite="skip"), spoilt_steps=[4])
    lines = log_lines(tmp_path)
    assert len(lines) == 8
    assert [line.get("updates_skipped", 0) for line in lines] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert "line.loss" not in lines[4]
    assert all(tensor.isfinite().all() for tensor in read_tensors(tmp_path / "state.safetensors").values())


def test_a_run_that_has_diverged_ends_even_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nor was it in 20 steps before it"):
        run_small(small_settings(tmp_path, not_finite="skip", steps=50), spoilt_steps=range(5, 50))


def test_settings_that_may_change_are_named_and_used(tmp_path: Path) -> None:
    changes = [f"out={tmp_path}", *TINY]
    train(read_settings(RECIPES / "semantic.toml", [*changes, "steps=1"]))
    told: list[str] = []
    more = ["steps=2", "optim.lr=1e-4", "autoencoder.latent_noise=0.1"]
    train(read_settings(RECIPES / "semantic.toml", [*changes, *more]), tell=told.append)
    assert told == [
        "From here on with other settings than before: optim.lr 0.003 -> 0.0001, "
        "autoencoder.latent_noise 0.2 -> 0.1."
    ]
    assert log_lines(tmp_path)[-1]["lr"] == 2e-5  # the second of five updates of warm-up
    more = ["optim.kind=muon", "steps=3"]
    with pytest.raises(TrainingError, match=r'cannot change within a run: optim.kind "adamw" -> "muon"'):
        train(read_settings(RECIPES / "semantic.toml", [*changes, *more]))


def test_what_may_change_is_told_by_names_that_exist() -> None:
    known = flat(RunSettings(recipe="lora", out="").model_dump())
    for name in (*FIXED, *FREE):
        assert any(within(setting, (name,)) for setting in known), name


def test_damaged_pictures_and_tars_are_skipped_counted_and_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((80, 80), 50).convert("RGB").save(buffer, "PNG")
    whole = buffer.getvalue()
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, content in (
            ("good", whole),
            ("cut", whole[:200]),
            ("other", whole),
            ("text", b"no picture"),
        ):
            entry = tarfile.TarInfo(f"{name}.png")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    (tmp_path / "junk.tar").write_bytes(b"not a tar at all" * 100)
    shards = json.dumps([str(tmp_path / "shard.tar"), str(tmp_path / "junk.tar")])
    out = tmp_path / "run"
    train(read_settings(RECIPES / "semantic.toml", [f"out={out}", "steps=3", f"data.shards={shards}", *TINY]))
    skipped = (out / "skipped.txt").read_text().splitlines()
    assert len(skipped) == 3
    for name in ("junk.tar", "cut", "text"):
        assert any(name in line for line in skipped), name
    assert "Skipped pictures (3)" in (out / "report.html").read_text()


def test_a_batch_of_which_nothing_can_be_read_is_replaced_alike(tmp_path: Path) -> None:
    for name in "abcdefgh":
        Image.new("RGB", (64, 64), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    plan = order_of(ShardIndex(tmp_path), SQUARE, 2).plan(0)
    for index in plan.samples:
        spoiled = tmp_path / f"{ShardIndex(tmp_path).key(index)}.png"
        spoiled.write_bytes(spoiled.read_bytes()[:-30])
    batches = [load_batch(ShardIndex(tmp_path), plan, SQUARE, places=[1]) for _ in range(2)]
    assert torch.equal(batches[0].pixels, batches[1].pixels)
    assert len(batches[0].samples) == 1


def test_a_state_that_is_damaged_or_none_is_refused_and_left_alone(tmp_path: Path) -> None:
    run_small(small_settings(tmp_path, steps=2))
    state = tmp_path / "state.safetensors"
    for content, error, message in (
        (state.read_bytes()[:-100], CheckpointError, "state.safetensors"),
        ((tmp_path / "line.safetensors").read_bytes(), TrainingError, "is not the state of a run"),
    ):
        state.write_bytes(content)
        with pytest.raises(error, match=message):
            run_small(small_settings(tmp_path))
        assert state.read_bytes() == content


def test_the_log_shows_how_much_of_the_time_went_into_waiting_for_pictures(tmp_path: Path) -> None:
    run_small(small_settings(tmp_path))
    assert all(0 <= line["wait_fraction"] <= 1 for line in log_lines(tmp_path))


def test_every_row_of_the_documented_table_has_its_test() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    section = text.split("## Never lose work")[1].split("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")][2:]
    assert rows == list(ROWS)


ROWS = {
    "`kill -9`, a power cut": test_a_run_killed_twenty_times_ends_bit_for_bit_like_an_unbroken_one,
    "SIGTERM, Ctrl-C": test_the_command_ends_with_0_on_sigterm_and_says_how_to_continue,
    "the disk is full at a save": test_a_full_disk_keeps_the_last_checkpoint_and_the_run_tries_again,
    "the disk is still full at the end": test_a_disk_that_stays_full_ends_the_run_with_the_last_checkpoint,
    "a picture or a tar is damaged": test_damaged_pictures_and_tars_are_skipped_counted_and_named,
    "no picture of a batch can be read": test_a_batch_of_which_nothing_can_be_read_is_replaced_alike,
    "a loss or gradient is not a finite number": test_a_loss_that_is_no_number_ends_the_run_naming_the_batch,
    'the same with `not_finite = "skip"`': test_such_an_update_is_left_out_and_counted_by_choice,
    "20 such updates in a row": test_a_run_that_has_diverged_ends_even_so,
    "settings differ from those the run was begun with": test_settings_that_may_change_are_named_and_used,
    "`state.safetensors` is damaged or something else": (
        test_a_state_that_is_damaged_or_none_is_refused_and_left_alone
    ),
}
