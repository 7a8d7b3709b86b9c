"""Weights in and out: memory-mapped safetensors reading, atomic writing.

Reading maps the file and hands out views, so a tensor costs memory only when it is touched, and pages that
were not written to can be dropped by the system again. Writing streams one tensor at a time to a temporary
name in the same folder, syncs it, and renames it: a crash leaves the old file or the new one, never half.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from triptych.checkpoints.headers import (
    Header,
    PartInfo,
    TensorEntry,
    part_info,
    read_header,
    read_metadata,
)
from triptych.errors import CapacityError, CheckpointError

__all__ = [
    "DISK_FULL",
    "Header",
    "PartInfo",
    "check_finite",
    "part_info",
    "read_header",
    "read_metadata",
    "read_tensors",
    "write_atomically",
    "write_part",
    "write_tensors",
]

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK_ELEMENTS = 2**22  # how many numbers are looked at together when checking for NaN
STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, over a quota, over a file size limit


def read_tensors(
    path: str | os.PathLike[str], *, finite: bool = False, header: Header | None = None
) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name, as views into a private memory map of it.

    `finite=True` also looks at every number and refuses NaN and infinity, naming the first tensor that has
    one. Raises `CheckpointError` for missing, damaged and foreign files.
    """
    header = read_header(path) if header is None else header
    try:
        # Private mapping: writing into a returned tensor never reaches the file.
        storage = torch.UntypedStorage.from_file(str(header.path), shared=False, nbytes=header.size)
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{header.path} cannot be mapped into memory: {error}.") from None
    everything = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
    tensors = {name: _view(everything, entry) for name, entry in header.entries.items()}
    if finite:
        check_finite(tensors, header.path)
    return tensors


def _view(everything: Tensor, entry: TensorEntry) -> Tensor:
    dtype = DTYPES[entry.dtype]
    raw = everything[entry.start : entry.end]
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    if entry.start % dtype.itemsize:  # rare: a writer that did not pad its header
        raw = raw.clone()
    return raw.view(dtype).reshape(entry.shape)


def check_finite(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise `CheckpointError` if any number of any floating tensor is NaN or infinite.

    Looks at sums, which NaN and infinity pass through: more than ten times as fast as looking at each number.
    """
    for name, tensor in tensors.items():
        if tensor.device.type == "meta" or not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.dtype.itemsize == 1:
            tensor = tensor.to(torch.float16)
        for chunk in tensor.detach().flatten().split(CHUNK_ELEMENTS):
            # Large numbers may have no finite sum, so extremes have the last word.
            if not math.isfinite(chunk.sum()) and not all(map(math.isfinite, torch.aminmax(chunk))):
                raise CheckpointError(
                    f"{path} has numbers that are NaN or infinite, first in {name[:80]!r}: the file is "
                    "damaged or comes from a run that diverged."
                )


def write_part(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    info: PartInfo,
    dtype: torch.dtype | None = None,
) -> None:
    """Write one part of a cascade with its metadata, atomically.

    `dtype` (float32, bfloat16 or float16) is the format floating tensors are stored in; None keeps theirs.
    Integer tensors are never changed. Errors are those of `write_tensors`.
    """
    write_tensors(path, tensors, info.to_metadata(), dtype)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a safetensors file atomically, one tensor in memory at a time.

    Raises `CapacityError` when the disk is too full, and `CheckpointError` when the folder cannot be written
    or a number is too large for `dtype`.
    """
    path = Path(path)
    if dtype is not None and dtype not in STORAGE_DTYPES:
        raise CheckpointError(f"Weights are stored as float32, bfloat16 or float16, not as {dtype}.")
    stored = {
        name: dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        for name, tensor in tensors.items()
    }
    # Wide formats first, so that every tensor is aligned to its own width.
    order = sorted(tensors, key=lambda name: (-stored[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for name in order:
        if stored[name] not in DTYPE_NAMES:
            raise CheckpointError(f"{name!r} is {stored[name]}, which a safetensors file cannot hold.")
        end = position + tensors[name].numel() * stored[name].itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[stored[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with write_atomically(path, len(text) + 8 + position) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            _write_tensor(file, path, name, tensors[name].detach(), stored[name])


def _write_tensor(file: IO[bytes], path: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    narrow = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != torch.float16:
        overflow = torch.isinf(narrow) & torch.isfinite(tensor)
        if bool(overflow.any()):
            raise CheckpointError(
                f"{path.name} cannot be stored as float16: {name!r} has numbers above 65504. Use bfloat16."
            )
    if narrow.numel():
        raw = narrow.contiguous().cpu().reshape(-1).view(torch.uint8)
        file.write(raw.numpy().data)


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike[str], num_bytes: int = 0) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` complete or not at all.

    `num_bytes` is the size it will have, checked against the free space first. On any exception, Ctrl-C
    included, nothing is left behind; what a killed process left is removed by the next write to `path`.
    Raises `CapacityError` (disk full) or `CheckpointError` (folder missing or not writable).
    """
    path = Path(path)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        disk = shutil.disk_usage(path.parent)
        if disk.total and num_bytes > disk.free:
            raise CapacityError(
                f"{path} needs {_megabytes(num_bytes)} and its disk has {_megabytes(disk.free)} free: make "
                "room or choose another folder."
            )
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _write_error(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_error(path: Path, error: OSError) -> CapacityError | CheckpointError:
    if error.errno in DISK_FULL:
        return CapacityError(f"The disk is full: {path} was not written; what was there before is unchanged.")
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} cannot be written: there is no folder {path.parent}.")
    return CheckpointError(f"{path} cannot be written: {error.strerror or error}.")


def _remove_leftovers(path: Path) -> None:
    """Delete temporary files for `path` whose process is gone (it was killed in the middle of writing)."""
    prefix = f".{path.name}.partial-"
    with contextlib.suppress(OSError):
        for leftover in path.parent.iterdir():
            process = leftover.name.removeprefix(prefix)
            if leftover.name.startswith(prefix) and process.isdigit() and not _is_running(int(process)):
                leftover.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is not harmless; keep the file
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system allows opening folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
