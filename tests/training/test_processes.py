"""Training in several processes: two gloo processes do what one does with the same global batch."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_task import small_settings, small_task

from triptych.checkpoints.files import read_tensors
from triptych.errors import SettingsError
from triptych.training.config import RunSettings, read_settings
from triptych.training.loop import train, train_task
from triptych.training.processes import check_shares, joined
from triptych.training.state import stored
from triptych.training.stopping import Stop

RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
NO_DROPOUT = "network.dropout=[0.0, 0.0]"  # masks are a process's own


def settings(recipe: str, out: Path, *changes: str) -> RunSettings:
    given = [f"out={out}", "tensorboard=false", "log_every=1", "sample_every=100", "accumulate=1", *changes]
    return read_settings(RECIPES / f"{recipe}.toml", given)


def train_one(settings: RunSettings) -> None:
    train(settings)


def train_small(settings: RunSettings) -> None:
    with joined(settings) as device:
        Path(settings.out).mkdir(parents=True, exist_ok=True)
        train_task(settings, small_task(settings), device, lambda progress: None, Stop())


def one_of(
    rank: int, world: int, port: int, call: Callable[[RunSettings], None], settings: RunSettings
) -> None:
    """What torchrun does for a process."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    call(settings)


def run_together(world: int, call: Callable[[RunSettings], None], settings: RunSettings) -> None:
    port = free_port()
    begun = multiprocessing.get_context("forkserver")
    begun.set_forkserver_preload(["triptych.training.recipes", "triptych.training.loop"])
    processes = [
        begun.Process(target=one_of, args=(rank, world, port, call, settings)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def log_lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def curves(out: Path, player: str) -> torch.Tensor:
    """Loss and gradient norm at every step."""
    return torch.tensor(
        [[line[f"{player}.{name}"] for name in ("loss", "gradient_norm")] for line in log_lines(out)]
    )


@pytest.mark.parametrize(
    ("recipe", "player", "changes"),
    [
        ("stage_c", "stage_c", ("data.size=64", NO_DROPOUT, 'diffusion.weight="adaptive"')),
        (
            "stage_a",
            "autoencoder",
            ("data.size=32", "autoencoder.adversarial_start=1", "autoencoder.restart_codes=2"),
        ),
        ("semantic", "autoencoder", ("data.size=64", "optim.lr=1e-4")),
    ],
)
def test_two_processes_have_the_loss_curve_of_one(
    recipe: str, player: str, changes: tuple[str, ...], tmp_path: Path
) -> None:
    changes = ("steps=4", "batch=4", *changes)
    train(settings(recipe, tmp_path / "one", *changes))
    run_together(2, train_one, settings(recipe, tmp_path / "two", *changes))
    (ours, our_norms), (theirs, their_norms) = (curves(tmp_path / name, player).T for name in ("two", "one"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_norms, their_norms, rtol=1e-3, atol=1e-5)
    assert len(log_lines(tmp_path / "two")) == 4  # only the first process writes


@pytest.mark.parametrize("split", [False, True])
def test_a_run_goes_on_with_another_number_of_processes(split: bool, tmp_path: Path) -> None:
    recipe = "stage_c" if split else "semantic"  # the small task is of any recipe
    common = {"recipe": recipe, "shard": split, "accumulate": 2}
    for world, steps in ((2, 3), (1, 5), (2, 8)):
        run = small_settings(tmp_path / "changing", **common, steps=steps)
        train_small(run) if world == 1 else run_together(world, train_small, run)
        assert stored(tmp_path / "changing")["step"] == steps
        states = [path.name for path in (tmp_path / "changing").glob("state*")]
        assert states == [f"state-{steps:09d}" if split and world == 2 else "state.safetensors"]
    train_small(small_settings(tmp_path / "one", **common))
    torch.testing.assert_close(
        curves(tmp_path / "changing", "line"), curves(tmp_path / "one", "line"), rtol=1e-5, atol=1e-5
    )
    ours, theirs = (read_tensors(tmp_path / name / "line.safetensors") for name in ("changing", "one"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 6}, "to 4 processes: make batch a multiple of 4"),
        ({"shard": True}, "recipe \"semantic\" trains so few weights"),
        ({"optim": {"fused_backward": True, "clip": 0}}, "before other processes have added their gradients"),
        ({"shard": True, "recipe": "stage_c", "optim": {"kind": "muon"}}, "needs whole ones"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_out_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        check_shares(small_settings(tmp_path, **changes), 4)
    assert message in str(caught.value)


PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
ONE_MACHINE, TWO_MACHINES = re.findall(r"^torchrun .*$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", [ONE_MACHINE, TWO_MACHINES], ids=["one machine", "two machines"])
def test_the_commands_of_the_page_train_in_two_processes(command: str, tmp_path: Path) -> None:
    """Two processes in place of eight, or two launchers of one each in place of two machines."""
    machines = 1 if command == ONE_MACHINE else 2
    command = command.replace("--nproc-per-node 8", f"--nproc-per-node {2 // machines}")
    command = command.replace("HOST:29500", f"127.0.0.1:{free_port()}")
    command = command.replace("run.toml", (RECIPES / "stage_c.toml").as_posix())
    changes = ("device=cpu", f"out={tmp_path.as_posix()}", "steps=2", "batch=4", "data.size=64",
               "log_every=1", "sample_every=2", "tensorboard=false")  # fmt: skip
    name, *arguments = shlex.split(command) + [word for change in changes for word in ("--set", change)]
    assert name == "torchrun"
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(machines)
    ]  # fmt: skip
    for launcher in launchers:
        _, said = launcher.communicate(timeout=240)
        assert launcher.returncode == 0, said
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2]
    assert (tmp_path / "stage_c.safetensors").is_file()
