"""Captioned pictures in tar shards or plain folders, read by index without unpacking.

A shard is a tar file whose members share a key per sample: `KEY.webp` (or png, jpg), `KEY.txt` with the
main caption, `KEY.json` with a `captions` list and anything else, `KEY-mask.png` with a mask, white where the
picture matters. A folder holds the same files unpacked. Pictures are turned upright as their EXIF data says.
The headers of a tar are scanned once; after that every read is a positioned read of its own, so one
`ShardIndex` serves any number of threads, and processes that inherit or unpickle it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from triptych.errors import DataError
from triptych.images import flatten, transparency, upright

PICTURE_SUFFIXES = (".webp", ".png", ".jpg", ".jpeg")
MASK_ENDING = "-mask"  # of the name of a mask beside its picture
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
ORIENTATION = 0x0112
SHARE_ALIKE = "CC-BY-SA-4.0"


@dataclass(frozen=True)
class Sample:
    """One captioned picture. `image` is RGB; `captions` holds the main caption first (possibly "").

    `mask` ("L", as large as the picture) is 255 where the picture matters: its mask file, or else how opaque
    it is; None where it has neither.
    """

    key: str
    image: Image.Image
    captions: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    shard: str = ""
    mask: Image.Image | None = None

    @property
    def focus(self) -> tuple[float, float]:
        """The place (down, across) in [0, 1] that a crop should keep: what `prepare` found, or the middle."""
        stated = self.meta.get("focus")
        if (
            isinstance(stated, list)
            and len(stated) == 2
            and all(isinstance(at, int | float) for at in stated)
        ):
            return min(max(float(stated[0]), 0.0), 1.0), min(max(float(stated[1]), 0.0), 1.0)
        return 0.5, 0.5

    @property
    def caption(self) -> str:
        """The main caption."""
        return self.captions[0] if self.captions else ""


@dataclass(frozen=True)
class Broken:
    """A sample that could not be read, and why."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class _Span:
    """A stretch of bytes in a file."""

    path: str
    start: int
    length: int


@dataclass
class _Entry:
    """Where the members of one sample lie."""

    key: str
    shard: str
    picture: _Span | None = None
    text: _Span | None = None
    json: _Span | None = None
    mask: _Span | None = None

    @property
    def spans(self) -> list[_Span]:
        return [span for span in (self.picture, self.text, self.json, self.mask) if span is not None]


class _Files:
    """Open files with positioned reads; opened on first use in each process, never pickled."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, span: _Span) -> bytes:
        with self._lock:
            handle = self._open.get(span.path)
            if handle is None:
                handle = os.open(span.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                self._open[span.path] = handle
            if not hasattr(os, "pread"):  # Windows: seek and read stay together under the lock
                os.lseek(handle, span.start, os.SEEK_SET)
                data = os.read(handle, span.length)
        if hasattr(os, "pread"):
            data = os.pread(handle, span.length, span.start)
        if len(data) != span.length:
            raise OSError(f"the file ends early: {len(data)} of {span.length} bytes")
        return data

    def close(self) -> None:
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


class ShardIndex:
    """Samples of many shards and folders in one fixed order.

    `paths` are tar files, or folders: one that holds tars stands for those in name order, any other for the
    pictures in it. `keep` is a predicate on the JSON of a sample (all of `keep` when several must hold).
    Samples that cannot be read are in `broken`, not an error; an index without a single sample is.

    >>> index = ShardIndex(["train-00000.tar"])         # doctest: +SKIP
    >>> index[5].caption                                # doctest: +SKIP
    'a red apple, flat icon style'
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
        keep: Callable[[dict[str, Any]], bool] | None = None,
    ) -> None:
        if isinstance(paths, str | os.PathLike):
            paths = [paths]
        self._files = _Files()
        self._entries: list[_Entry] = []
        self._places: dict[str, int] | None = None  # by key, when first asked for
        self.broken: list[Broken] = []
        self.filtered = 0  # samples that `keep` refused
        shards = [shard for path in paths for shard in _expand(Path(path))]
        if not shards:
            raise DataError("No shards were given: name tar files, or folders of pictures.")
        for shard in shards:
            found = _scan_folder(shard) if shard.is_dir() else _scan_tar(shard, self.broken)
            for entry in map(_own_picture, found):
                self._admit(entry, keep)
        if not self._entries:
            names = ", ".join(str(s) for s in shards[:3])
            why = f" ({self.broken[0].key}: {self.broken[0].reason})" if self.broken else ""
            kept = f" The filter dropped {self.filtered}." if self.filtered else ""
            raise DataError(f"No readable pictures in {names}{why}.{kept}")

    def _admit(self, entry: _Entry, keep: Callable[[dict[str, Any]], bool] | None) -> None:
        if entry.picture is None:
            if entry.text or entry.json:
                self.broken.append(Broken(entry.shard, entry.key, "has a caption but no picture"))
            return
        if keep is not None:
            try:
                wanted = keep(self._meta(entry))
            except (OSError, ValueError) as error:
                self.broken.append(Broken(entry.shard, entry.key, str(error)))
                return
            if not wanted:
                self.filtered += 1
                return
        self._entries.append(entry)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` decoded; `DataError` when it cannot be read."""
        entry = self._entries[index]
        try:
            return self._load(entry)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{entry.shard}: sample {entry.key} cannot be read ({error}).") from error

    def read(self, index: int) -> Sample | None:
        """Like `[index]`, but a sample that cannot be read is listed in `broken` and gives None."""
        try:
            return self[index]
        except DataError as error:
            self._note(index, str(error.__cause__ or error))
            return None

    def _note(self, index: int, reason: str) -> None:
        """List a sample that cannot be read, once."""
        entry = self._entries[index]
        if not any(b.key == entry.key and b.shard == entry.shard for b in self.broken):
            self.broken.append(Broken(entry.shard, entry.key, reason))

    def __iter__(self) -> Iterator[Sample]:
        """All readable samples in index order."""
        for index in range(len(self)):
            sample = self.read(index)
            if sample is not None:
                yield sample

    def key(self, index: int) -> str:
        """The key of sample `index`, without reading it."""
        return self._entries[index].key

    def meta(self, index: int) -> dict[str, Any]:
        """The JSON of sample `index` ({} without one), without decoding its picture."""
        try:
            return self._meta(self._entries[index])
        except (OSError, ValueError) as error:
            entry = self._entries[index]
            raise DataError(f"{entry.shard}: {entry.key}.json cannot be read ({error}).") from error

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of sample `index`, without decoding its picture; none where they cannot be read."""
        entry = self._entries[index]
        try:
            return self._captions(entry, self._meta(entry))
        except (OSError, ValueError):
            return ()

    def prototype(self, index: int) -> Image.Image | None:
        """The picture of the sample whose key the JSON of sample `index` names as `prototype`, None where it
        names none. Raises DataError when there is no such sample."""
        named = self.meta(index).get("prototype")
        if named is None:
            return None
        if self._places is None:
            self._places = {entry.key: place for place, entry in enumerate(self._entries)}
        if named not in self._places:
            entry = self._entries[index]
            raise DataError(f"{entry.shard}: {entry.key} names the prototype {named!r}, which is not there.")
        return self[self._places[named]].image

    def mask_content(self, index: int) -> bytes:
        """The bytes of sample `index`'s mask file, none without one."""
        span = self._entries[index].mask
        try:
            return b"" if span is None else self._files.read(span)
        except OSError as error:
            raise DataError(f"{self._entries[index].key}{MASK_ENDING} cannot be read ({error}).") from error

    def mark(self) -> str:
        """A text that changes when any file behind this index, or the choice of samples, does."""
        sha = hashlib.sha256()
        spans = [span for entry in self._entries for span in entry.spans]
        for span in spans:
            sha.update(f"{span.start} {span.length} ".encode())
        for path in sorted({span.path for span in spans}):
            status = os.stat(path)
            sha.update(f"{Path(path).name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return sha.hexdigest()

    def content(self, index: int) -> tuple[bytes, str]:
        """The bytes of sample `index`'s picture file, and its main caption, "" without one."""
        entry = self._entries[index]
        assert entry.picture is not None
        try:
            text = "" if entry.text is None else self._files.read(entry.text).decode("utf-8").strip()
            return self._files.read(entry.picture), text
        except (OSError, ValueError) as error:
            raise DataError(f"{entry.shard}: sample {entry.key} cannot be read ({error}).") from error

    def size(self, index: int) -> tuple[int, int] | None:
        """Height and width, upright, from the picture's header; one without is listed in `broken`: None."""
        entry = self._entries[index]
        assert entry.picture is not None
        try:
            with Image.open(io.BytesIO(self._files.read(entry.picture))) as picture:
                turned = picture.getexif().get(ORIENTATION) in TURNED
                return (picture.width, picture.height) if turned else (picture.height, picture.width)
        except (OSError, ValueError, SyntaxError) as error:
            self._note(index, str(error))
            return None

    def close(self) -> None:
        """Close the shard files; reading opens them again."""
        self._files.close()

    def _meta(self, entry: _Entry) -> dict[str, Any]:
        if entry.json is None:
            return {}
        meta = json.loads(self._files.read(entry.json))
        if not isinstance(meta, dict):
            raise ValueError(f"the JSON is a {type(meta).__name__}, expected an object")
        return meta

    def _load(self, entry: _Entry) -> Sample:
        assert entry.picture is not None
        with Image.open(io.BytesIO(self._files.read(entry.picture))) as opened:
            whole = upright(opened)
            image, mask = flatten(whole), transparency(whole)
        if entry.mask is not None:
            with Image.open(io.BytesIO(self._files.read(entry.mask))) as opened:
                mask = upright(opened).convert("L").resize(image.size, Image.Resampling.BILINEAR)
        meta = self._meta(entry)
        licence = str(meta.get("license", meta.get("licence", "")))
        return Sample(entry.key, image, self._captions(entry, meta), meta, licence, entry.shard, mask)

    def _captions(self, entry: _Entry, meta: dict[str, Any]) -> tuple[str, ...]:
        listed = meta.get("captions", [])
        captions = [c for c in listed if isinstance(c, str)] if isinstance(listed, list) else []
        if entry.text is not None:
            main = self._files.read(entry.text).decode("utf-8").strip()
            captions = [main, *(c for c in captions if c != main)]
        return tuple(captions)


def _expand(path: Path) -> list[Path]:
    """A path itself, or the tars of a folder that holds tars."""
    if not path.exists():
        raise DataError(f"{path} does not exist: expected a tar shard or a folder of pictures.")
    if path.is_dir():
        return sorted(path.glob("*.tar")) or [path]
    return [path]


def _place(entries: dict[str, _Entry], shard: Path, name: str, span: _Span) -> None:
    """File one member under its key; members of other kinds are ignored."""
    pure = PurePosixPath(name)
    suffix = pure.suffix.lower()
    if pure.name.startswith(".") or suffix not in (*PICTURE_SUFFIXES, ".txt", ".json"):
        return
    key = str(pure.with_suffix(""))
    masks = suffix in PICTURE_SUFFIXES and key.endswith(MASK_ENDING)
    key = key.removesuffix(MASK_ENDING) if masks else key
    entry = entries.setdefault(key, _Entry(key, shard.name))
    if masks:
        entry.mask = span
    elif suffix == ".txt":
        entry.text = span
    elif suffix == ".json":
        entry.json = span
    else:
        entry.picture = span


def _own_picture(entry: _Entry) -> _Entry:
    """A picture that is merely called like a mask, with no picture it could belong to, is one of its own."""
    if entry.picture is None and entry.mask is not None and not (entry.text or entry.json):
        return _Entry(entry.key + MASK_ENDING, entry.shard, picture=entry.mask)
    return entry


def _scan_tar(shard: Path, broken: list[Broken]) -> list[_Entry]:
    """The samples of a tar in their order; what lies behind a damaged spot is lost and noted."""
    entries: dict[str, _Entry] = {}
    end = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory
                if not member.isfile():
                    continue
                if member.offset_data + member.size > end:
                    broken.append(Broken(shard.name, member.name, "the shard ends inside it"))
                    break
                span = _Span(str(shard), member.offset_data, member.size)
                _place(entries, shard, member.name, span)
    except (tarfile.TarError, OSError) as error:
        broken.append(Broken(shard.name, "(tar headers)", str(error)))
    return list(entries.values())


def _scan_folder(folder: Path) -> list[_Entry]:
    """The samples of a folder and its subfolders, in name order. A lone caption is none."""
    entries: dict[str, _Entry] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        _place(entries, folder, name, _Span(str(path), 0, path.stat().st_size))
    return [entry for entry in entries.values() if entry.picture is not None or entry.mask is not None]


def without_share_alike(meta: dict[str, Any]) -> bool:
    """A `keep` predicate: every licence but CC-BY-SA, whose duty would pass to a trained model."""
    return meta.get("license") != SHARE_ALIKE
