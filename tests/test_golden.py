"""Recorded numbers are met, and the harness notices when they are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import save_file

RECORDINGS = sorted((Path(__file__).parent / "reference" / "golden").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_recording_is_met(path: Path) -> None:
    failed = [outcome.line() for outcome in golden.check_file(path) if not outcome.passed]
    assert not failed, "\n".join(failed)


def test_recordings_are_there() -> None:
    assert len(RECORDINGS) >= 21


def write_recording(path: Path, kind: str, tensors: dict[str, torch.Tensor], config: object) -> Path:
    metadata = {"kind": kind, "config": json.dumps(config), "tolerance": '{"rtol": 0, "atol": 0.001}'}
    save_file(tensors, path, metadata)
    return path


def times(error: float = 0.0) -> dict[str, torch.Tensor]:
    """A right recording of the time embedding at t = 0, off by `error` in one place."""
    embedding = torch.cat([torch.zeros(2, 8), torch.ones(2, 8)], dim=1)
    embedding[0, 3] += error
    return {"in.t": torch.zeros(2), "out.size_16": embedding}


@pytest.mark.parametrize(
    ("tensors", "kind", "said"),
    [
        (times(), "time_embedding", []),
        (times(0.01), "time_embedding", ["out.size_16"]),
        (times(float("nan")), "time_embedding", ["out.size_16"]),
        (times() | {"out.size_16": torch.zeros(3, 16)}, "time_embedding", ["out.size_16"]),
        (times() | {"out.size_9": torch.zeros(2, 9)}, "time_embedding", ["out.size_9"]),
        (times(), "no_such_kind", ["kind"]),
    ],
    ids=["right", "wrong value", "not a number", "wrong shape", "never computed", "unknown kind"],
)
def test_harness_names_what_fails(
    tmp_path: Path, tensors: dict[str, torch.Tensor], kind: str, said: list[str]
) -> None:
    path = write_recording(tmp_path / "recording.safetensors", kind, tensors, {"sizes": [16]})
    outcomes = golden.check_file(path)
    assert [outcome.name for outcome in outcomes if not outcome.passed] == said


def test_unreadable_file_fails(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(b"\x10\x00\x00")
    (outcome,) = golden.check_file(path)
    assert not outcome.passed
    assert "cannot be read" in outcome.line()


def test_command_ends_with_a_status(tmp_path: Path) -> None:
    right = write_recording(tmp_path / "right.safetensors", "time_embedding", times(), {"sizes": [16]})
    wrong = write_recording(tmp_path / "wrong.safetensors", "time_embedding", times(0.01), {"sizes": [16]})
    command = [sys.executable, golden.__file__]
    done = subprocess.run([*command, right], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "out.size_16  max error" in done.stdout
    done = subprocess.run([*command, right, wrong], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "failed: wrong.safetensors out.size_16"
