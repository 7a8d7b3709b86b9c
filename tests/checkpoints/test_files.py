"""Weights in and out: exact round trips, atomic writing, refusals."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from triptych.checkpoints import files
from triptych.checkpoints.files import (
    PartInfo,
    read_header,
    read_metadata,
    read_tensors,
    write_atomically,
    write_part,
    write_tensors,
)
from triptych.errors import CapacityError, CheckpointError

INFO = PartInfo(
    "stage_c", {"widths": [32, 32]}, {"shift": 2.0}, 7, "recipe.toml", "Apache-2.0", "made of icons", "tiny"
)


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(3, 5, generator=generator),
        "half": torch.randn(7, generator=generator).half(),
        "brain": torch.randn(3, generator=generator).bfloat16(),
        "count": torch.tensor(12),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0, 4),
        "transposed": torch.randn(4, 3, generator=generator).T,
    }


def test_tensors_and_metadata_come_back_exactly(tmp_path):
    path = tmp_path / "part.safetensors"
    tensors = some_tensors()
    write_part(path, tensors, INFO)
    back = read_tensors(path, finite=True)
    assert read_metadata(path) == INFO
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    other = load_file(path)  # the reference reader agrees
    assert all(torch.equal(other[name], tensor) for name, tensor in tensors.items())


def test_files_of_the_reference_writer_are_read(tmp_path):
    path = tmp_path / "other.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    save_file(tensors, path)
    assert all(torch.equal(read_tensors(path)[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(CheckpointError, match="no triptych metadata"):
        read_metadata(path)


def test_a_header_that_is_not_padded_is_read(tmp_path):
    path = tmp_path / "odd.safetensors"
    text = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path.write_bytes((len(text)).to_bytes(8, "little") + text + torch.tensor([1.5, -2.0]).numpy().tobytes())
    assert (8 + len(text)) % 4
    assert read_tensors(path)["x"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_storage_precision_changes_floats_and_nothing_else(tmp_path, dtype):
    write_part(tmp_path / "x.safetensors", some_tensors(), INFO, dtype)
    back = read_tensors(tmp_path / "x.safetensors")
    assert back["matrix"].dtype == back["half"].dtype == dtype
    assert back["count"].dtype == torch.int64
    assert torch.equal(back["matrix"], some_tensors()["matrix"].to(dtype))


def test_numbers_too_large_for_float16_are_an_error_and_leave_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="65504"):
        write_part(tmp_path / "x.safetensors", {"w": torch.tensor([1e6])}, INFO, torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_unknown_storage_precision_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="float32, bfloat16 or float16"):
        write_part(tmp_path / "x.safetensors", {}, INFO, torch.float64)


def test_reading_maps_the_file_and_never_writes_to_it(tmp_path):
    path = tmp_path / "x.safetensors"
    write_part(path, {"w": torch.zeros(1000)}, INFO)
    before = path.read_bytes()
    read_tensors(path)["w"].fill_(3)
    assert path.read_bytes() == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_are_found_and_named(tmp_path, bad, dtype):
    weights = torch.zeros(5000, dtype=dtype)
    weights[4321] = bad
    save_file({"fine": torch.ones(3), "broken.weight": weights}, tmp_path / "x.safetensors")
    read_tensors(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"NaN or infinite, first in 'broken.weight'"):
        read_tensors(tmp_path / "x.safetensors", finite=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("broken", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]])
def test_every_nan_and_infinity_is_found_among_finite_numbers_of_any_size(
    tmp_path: Path, dtype: torch.dtype, broken: list[float]
) -> None:
    large = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)  # no sum of theirs is finite
    tensors = {"large": large, "small": torch.randn(1000).to(dtype), "both": torch.cat([large, -large])}
    path = tmp_path / "part.safetensors"
    save_file(tensors, path)
    read_tensors(path, finite=True)
    for name in tensors:
        damaged = {key: tensor.clone() for key, tensor in tensors.items()}
        damaged[name][500 : 500 + len(broken)] = torch.tensor(broken, dtype=dtype)
        save_file(damaged, path)
        with pytest.raises(CheckpointError, match=f"NaN or infinite, first in '{name}'"):
            read_tensors(path, finite=True)


KILLED = """
import os, signal, sys, torch
from triptych.checkpoints import files
written = files._write_tensor
def kill_in_the_middle(file, path, name, tensor, dtype):
    if name == "b":
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    written(file, path, name, tensor, dtype)
files._write_tensor = kill_in_the_middle
files.write_tensors(sys.argv[1], {"a": torch.ones(1000), "b": torch.ones(1000)})
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_writer_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.zeros(2)})
    old = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 2  # and the half-written one
    write_tensors(path, {"a": torch.ones(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    path = tmp_path / "x.bin"

    def interrupted() -> None:
        with write_atomically(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_disk_too_small_is_said_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 100, 100))
    with pytest.raises(CapacityError, match=r"needs 4\.0 MB and its disk has 0\.0 MB free"):
        write_tensors(tmp_path / "x.safetensors", {"w": torch.zeros(10**6)})
    assert list(tmp_path.iterdir()) == []


def test_disk_full_in_the_middle_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"w": torch.zeros(3)})
    old = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_write_tensor", full)
    with pytest.raises(CapacityError, match="disk is full"):
        write_tensors(path, {"w": torch.ones(3)})
    assert path.read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("place", ["missing/x.safetensors", "file/x.safetensors"])
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_tensors(tmp_path / place, {"w": torch.zeros(1)})


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        write_tensors(tmp_path / "x.safetensors", {"w": torch.zeros(1)})


FOREIGN = {
    "empty": (b"", "is empty"),
    "zip": (b"PK\x03\x04" + b"\0" * 60, "never opens them"),
    "pickle": (b"\x80\x02}q\x00." + b"\0" * 60, "Python pickle.*never opens them"),
    "gguf": (b"GGUF" + b"\x03\0\0\0" * 9, "GGUF"),
    "html": (b"<!doctype html><html><body>Not found</body></html>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 60, "PNG picture"),
    "text": (b"just some text, longer than a header", "not a safetensors file"),
    "short": (b"abc", "only 3 bytes"),
    "huge header": ((2**40).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "long header": ((1000).to_bytes(8, "little") + b"{}" + b" " * 90, "truncated"),
    "no table": ((2).to_bytes(8, "little") + b"[]", "not a table"),
    "no tensors": ((2).to_bytes(8, "little") + b"{}", "no tensors"),
    "no json": ((4).to_bytes(8, "little") + b"{{{{", "not readable"),
    "deep json": ((40000).to_bytes(8, "little") + b"[" * 40000, "not readable"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_named(tmp_path, kind):
    content, message = FOREIGN[kind]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path / "x.safetensors")


def test_a_pickled_checkpoint_is_refused_without_running_it(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"pickled checkpoint.*never opens"):
        read_header(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ('{"dtype":"F32","shape":[2],"data_offsets":[0,4]}', "wrong length"),
        ('{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}', "negative side"),
        ('{"dtype":"F32","shape":[true],"data_offsets":[0,4]}', "boolean side"),
        ('{"dtype":"F32","shape":[0,1e3],"data_offsets":[0,0]}', "float side"),
        (f'{{"dtype":"F32","shape":[0,{2**62},{2**62}],"data_offsets":[0,0]}}', "sides that overflow"),
        ('{"dtype":"X32","shape":[1],"data_offsets":[0,4]}', "unknown format"),
        ('{"dtype":"F32","shape":[1],"data_offsets":[4,0]}', "reversed"),
        ('{"dtype":"F32","shape":[1]}', "no place"),
        ("3", "no table"),
    ],
)
def test_impossible_entries_are_refused(tmp_path, entry, why):
    text = f'{{"w":{entry}}}'.encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(CheckpointError, match="makes no sense"):
        read_tensors(tmp_path / "x.safetensors")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="There is no file"):
        read_tensors(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 2, "part": "stage_c"}', "Update triptych"),
        ('{"format": 1, "part": "stage_d"}', "part makes no sense"),
        ('{"format": 1, "part": "stage_c", "step": "ten"}', "step makes no sense"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, text, message):
    save_file({"w": torch.zeros(1)}, tmp_path / "x.safetensors", {"triptych": text})
    with pytest.raises(CheckpointError, match=message):
        read_metadata(tmp_path / "x.safetensors")


def test_a_truncated_file_is_named_at_every_length(tmp_path):
    path = Path(tmp_path / "x.safetensors")
    write_tensors(path, {"a": torch.ones(3, 3), "b": torch.ones(2)})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_tensors(path)
