"""What a safetensors file says about itself, read without touching the weights and without torch.

A safetensors file is eight bytes (length of the header, little endian), a JSON header that gives every
tensor's name, number format, shape and place, and then the bytes. Files written by triptych carry one
metadata entry, `"triptych"`, whose JSON is a `PartInfo`: which part of the cascade the file holds, the
configuration that rebuilds its network, and the settings it was made for.

Nothing here ever unpickles: pickled files (`.pt`, `.ckpt`, `.bin`) are recognised by their first bytes
and refused by name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from triptych.errors import CheckpointError

METADATA_KEY = "triptych"
METADATA_FORMAT = 1
PARTS = (
    "stage_a",
    "stage_b",
    "stage_c",
    "semantic",
    "previewer",
    "text_encoder",
    "image_encoder",
    "judge",
    "lora",
    "controlnet",
    "saliency",
    "pidinet",
    "latents",
)
MAX_HEADER_BYTES = 32 * 2**20  # the largest published header has 1,726 names and takes 0.2 MB
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**53

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}

FOREIGN_BEGINNINGS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes (a pickled checkpoint)"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull` for it"),
    (b"<!", "a web page; the download probably failed"),
    (b"<html", "a web page; the download probably failed"),
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its number format ("F32", "BF16", ...), shape, and bytes [start, end)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file: `entries` by name (offsets from the file's beginning)."""

    path: Path
    size: int
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the file's order."""
        return {name: entry.shape for name, entry in self.entries.items()}


@dataclass(frozen=True)
class PartInfo:
    """What a weight file holds, stored in its metadata and carried into every file derived from it.

    `part` is one of `PARTS`; `config` holds the fields of the network's configuration dataclass; `settings`
    what a pipeline needs to know beside it (prediction, schedule shift, default size and steps, ...).
    `licence` and `notice` travel with the weights. `size` is the published size's name, or None.
    """

    part: str
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    recipe: str = ""
    licence: str = ""
    notice: str = ""
    size: str | None = None

    def to_metadata(self) -> dict[str, str]:
        """The safetensors metadata entries that store this."""
        text = json.dumps({"format": METADATA_FORMAT, **asdict(self)}, sort_keys=True)
        return {"format": "pt", METADATA_KEY: text}


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check a safetensors header. Raises `CheckpointError` with the reason for anything else."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            beginning = file.read(64)
            _refuse_foreign(path, beginning, size)
            length = int.from_bytes(beginning[:8], "little")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is not a safetensors file: its first bytes are not the length of a header."
                )
            if 8 + length > size:
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file: the header should take {length} bytes "
                    f"and the whole file has {size}. Copy or download it again."
                )
            file.seek(8)
            raw = file.read(length)
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder; a weight file was expected.") from None
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:  # a path with a null character
        raise CheckpointError(f"{str(path)!r} is not a file name: {error}.") from None
    return _parse_header(path, size, raw)


def _refuse_foreign(path: Path, beginning: bytes, size: int) -> None:
    """Name the usual strangers; pickles above all, which must never be opened."""
    if size == 0:
        raise CheckpointError(f"{path} is empty. Copy or download it again.")
    for magic, what in FOREIGN_BEGINNINGS:
        # A header whose length happens to begin with a magic's bytes has "{" at position 8.
        if beginning.startswith(magic) and beginning[8:9] != b"{":
            advice = (
                " Pickled files can run code when opened, so triptych never opens them: "
                "use the .safetensors version of these weights."
                if "pickle" in what
                else " A .safetensors file was expected."
            )
            raise CheckpointError(f"{path} is {what}.{advice}")
    if size < 10:
        raise CheckpointError(f"{path} has only {size} bytes: truncated, or not a safetensors file.")


def _parse_header(path: Path, size: int, raw: bytes) -> Header:
    damaged = f"{path} is damaged or not a safetensors file"
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{damaged}: its header is not readable.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{damaged}: its header is not a table of tensors.")
    metadata = content.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{damaged}: its metadata is not a table of texts.")
    data_start = 8 + len(raw)
    entries: dict[str, TensorEntry] = {}
    for name, fields in content.items():
        entry = _parse_entry(fields, data_start)
        if entry is None:
            raise CheckpointError(f"{damaged}: the header's entry for {name[:80]!r} makes no sense.")
        if entry.end > size:
            raise CheckpointError(
                f"{path} is truncated: {name[:80]!r} should end at byte {entry.end} and the file has {size}. "
                "Copy or download it again."
            )
        entries[name] = entry
    if not entries:
        raise CheckpointError(f"{path} holds no tensors.")
    return Header(path, size, entries, metadata)


def _parse_entry(fields: Any, data_start: int) -> TensorEntry | None:
    """A checked header entry, or None when anything about it is impossible."""
    if not isinstance(fields, dict):
        return None
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return None
    if not _is_counts(shape) or not _is_counts(offsets):
        return None
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        return None
    if math.prod(max(side, 1) for side in shape) > MAX_ELEMENTS:
        return None
    start, end = offsets
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        return None
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + end)


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def part_info(header: Header, part: str | None = None) -> PartInfo | None:
    """The `PartInfo` in a header, None for files that triptych did not write.

    Files with several parts have a further entry for each, `triptych.<part>`, which `part` asks for first.
    Raises `CheckpointError` when the entry is there and damaged or of a newer format.
    """
    text = header.metadata.get(f"{METADATA_KEY}.{part}", header.metadata.get(METADATA_KEY))
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{header.path} has damaged triptych metadata.")
    if content.get("format") != METADATA_FORMAT:
        raise CheckpointError(
            f"{header.path} has metadata of format {str(content.get('format'))[:40]}; this version reads "
            f"format {METADATA_FORMAT}. Update triptych."
        )
    return _checked_info(header.path, content)


def _checked_info(path: Path, content: Mapping[str, Any]) -> PartInfo:
    expected: dict[str, type | tuple[type, ...]] = {
        "part": str,
        "config": dict,
        "settings": dict,
        "step": int,
        "recipe": str,
        "licence": str,
        "notice": str,
        "size": (str, type(None)),
    }
    known = {name: content[name] for name in expected if name in content}
    wrong = [name for name, value in known.items() if not isinstance(value, expected[name])]
    if wrong or known.get("part") not in PARTS:
        what = ", ".join(wrong) or "part"
        raise CheckpointError(f"{path} has damaged triptych metadata: {what} makes no sense.")
    return PartInfo(**known)


def read_metadata(path: str | os.PathLike[str]) -> PartInfo:
    """The `PartInfo` of a file triptych wrote. Raises `CheckpointError` for every other file."""
    info = part_info(read_header(path))
    if info is None:
        raise CheckpointError(f"{path} carries no triptych metadata; `triptych info {path}` says what it is.")
    return info
