"""Any collection of captioned pictures into tar shards that training reads by index.

Sources are a folder (captions in KEY.txt beside a picture or in metadata.jsonl), WebDataset tars, and
whatever the `datasets` library opens: a dataset's name on the hub, or files behind hf://, s3:// and the like.
Every picture is looked at once: read, turned upright, shrunk to what its aspect bucket needs. What is left
out is listed with the reason; nothing is dropped silently.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from triptych.checkpoints.files import write_atomically
from triptych.data.buckets import RATIOS, Bucket, covering_size, make_buckets, nearest_bucket
from triptych.data.shards import ShardIndex
from triptych.errors import DataError, MissingExtra
from triptych.images import decode_picture

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
BESIDE = (".txt", ".caption", ".json", ".jsonl")
KEPT = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}  # formats stored as they come
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description")
INDEX = "prepared.json"
SHARD_BYTES = 256 * 2**20
QUALITY = 95  # of WebP, for pictures that had to change


@dataclass(frozen=True)
class Found:
    """One picture of a source: its bytes, or the reason why there are none."""

    key: str
    content: bytes = b""
    captions: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass
class Prepared:
    """What was made: pictures by bucket, and what was left out and why (key, reason)."""

    out: Path
    shards: list[str] = field(default_factory=list)
    buckets: Counter[str] = field(default_factory=Counter)
    without_caption: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def pictures(self) -> int:
        return sum(self.buckets.values())


def prepare(
    source: str,
    out: Path,
    *,
    size: int = 1024,
    ratios: Sequence[float] = RATIOS,
    caption: str = "",
    min_side: int = 64,
    split: str = "train",
    force: bool = False,
    progress: Callable[[int, int | None], None] = lambda done, of: None,
) -> Prepared:
    """Write the pictures of `source` to tar shards in `out`.

    `size` is the side of the square whose area canvases have; larger pictures are shrunk to cover theirs.
    `caption` is for pictures without one. `force` replaces what `out` holds from an earlier time. Raises
    DataError for a source that cannot be opened or has no readable picture, MissingExtra without `datasets`
    for sources that need it.
    """
    found, total = open_source(source, split)
    _make_room(out, force)
    buckets = make_buckets(size, ratios)
    made = Prepared(out)
    seen: dict[str, str] = {}
    with ShardWriter(out, made) as writer:
        for number, one in enumerate(found, 1):
            progress(number, total)
            reason = one.reason or _add(one, buckets, caption, min_side, seen, writer, made)
            if reason:
                made.skipped.append((one.key, reason))
    if not made.pictures:
        why = f" ({made.skipped[0][0]}: {made.skipped[0][1]})" if made.skipped else ""
        raise DataError(f"There is no readable picture in {source}{why}.")
    _write_index(made, source, size)
    return made


def _add(
    one: Found,
    buckets: Sequence[Bucket],
    caption: str,
    min_side: int,
    seen: dict[str, str],
    writer: ShardWriter,
    made: Prepared,
) -> str:
    """Put one picture into the shards; the reason if it is left out."""
    digest = hashlib.sha256(one.content).hexdigest()
    if digest in seen:
        return f"the same file as {seen[digest]}"
    try:
        image = decode_picture(one.content, one.key)
    except DataError as error:
        return str(error)
    if min(image.size) < min_side:
        return f"{image.width}x{image.height} pixels are less than {min_side} a side"
    seen[digest] = one.key
    bucket = buckets[nearest_bucket(image.height, image.width, buckets)]
    content, suffix = stored(one.content, image, bucket)
    captions = one.captions or ((caption,) if caption else ())
    made.without_caption += not captions
    canvas = f"{bucket.width}x{bucket.height}"
    made.buckets[canvas] += 1
    meta = {**one.meta, "captions": list(captions), "bucket": canvas, "source": one.key}
    writer.write(f"{made.pictures:08d}", content, suffix, captions[0] if captions else "", meta)
    return ""


def stored(content: bytes, image: Image.Image, bucket: Bucket) -> tuple[bytes, str]:
    """The bytes to keep: the file's own where they are of a known format, upright, and not too large."""
    height, width = covering_size(image.height, image.width, bucket)
    smaller = width < image.width
    with Image.open(io.BytesIO(content)) as opened:
        upright = opened.getexif().get(0x0112, 1) == 1  # the EXIF orientation
        if opened.format in KEPT and upright and not smaller and getattr(opened, "n_frames", 1) == 1:
            return content, KEPT[opened.format]
    if smaller:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return buffer.getvalue(), ".webp"


class ShardWriter:
    """Tar shards of about SHARD_BYTES, each of which appears under its name when it is whole."""

    def __init__(self, out: Path, made: Prepared) -> None:
        self.out, self.made = out, made
        self.tar: tarfile.TarFile | None = None
        self.path, self.bytes = Path(), 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._close(whole=error[0] is None)

    def write(self, key: str, content: bytes, suffix: str, caption: str, meta: dict[str, Any]) -> None:
        if self.tar is None:
            name = f"shard-{len(self.made.shards):05d}.tar"
            self.path = self.out / f".{name}.partial"
            self.tar = tarfile.open(self.path, "w")  # noqa: SIM115  closed by _close
            self.made.shards.append(name)
        self._member(key + suffix, content)
        if caption:
            self._member(key + ".txt", caption.encode("utf-8"))
        self._member(key + ".json", json.dumps(meta, ensure_ascii=False, default=str).encode("utf-8"))
        if self.bytes > SHARD_BYTES:
            self._close(whole=True)

    def _member(self, name: str, content: bytes) -> None:
        assert self.tar is not None
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self.tar.addfile(member, io.BytesIO(content))
        self.bytes += len(content)

    def _close(self, whole: bool) -> None:
        if self.tar is None:
            return
        self.tar.close()
        self.tar, self.bytes = None, 0
        if whole:
            os.replace(self.path, self.out / self.made.shards[-1])
        else:
            self.path.unlink(missing_ok=True)


def _make_room(out: Path, force: bool) -> None:
    """An empty folder `out`; only what `prepare` wrote before is ever removed from it."""
    if out.is_file():
        raise DataError(f"{out} is a file; name a folder for the shards.")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise DataError(f"{out} is not empty: name another folder, or use --force to write it anew.")
        ours = [*out.glob("shard-*.tar"), *out.glob(".shard-*.partial"), out / INDEX, out / "skipped.txt"]
        for path in ours:
            path.unlink(missing_ok=True)
        if any(out.iterdir()):
            raise DataError(f"{out} holds files that `prepare` did not write: name another folder.")
    out.mkdir(parents=True, exist_ok=True)


def _write_index(made: Prepared, source: str, size: int) -> None:
    """prepared.json says what is there; skipped.txt what is not. The first appears last."""
    if made.skipped:
        lines = "".join(f"{key}: {reason}\n" for key, reason in made.skipped)
        (made.out / "skipped.txt").write_text(lines, encoding="utf-8")
    content = {
        "source": source, "size": size, "pictures": made.pictures, "shards": made.shards,
        "buckets": dict(made.buckets.most_common()), "without_caption": made.without_caption,
        "skipped": [{"key": key, "reason": reason} for key, reason in made.skipped],
    }  # fmt: skip
    with write_atomically(made.out / INDEX) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8"))


# Sources.


def open_source(source: str, split: str) -> tuple[Iterator[Found], int | None]:
    """The pictures of a source, and how many there are where that is known."""
    path = Path(source)
    if path.is_dir() and not any(path.glob("*.tar")):
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        pictures = [file for file in files if file.suffix.lower() not in BESIDE]
        return from_folder(path, pictures), len(pictures)
    if path.exists():
        index = ShardIndex(path)
        return from_tars(index), len(index)
    if path.suffix == ".tar" or source.startswith((".", "/", "~")):
        raise DataError(f"There is no file or folder {source}.")
    return from_datasets(source, split), None


def from_folder(folder: Path, pictures: Sequence[Path]) -> Iterator[Found]:
    """Pictures in name order with their captions; files that are neither are told too."""
    rows = _metadata_rows(folder)
    for path in pictures:
        key = path.relative_to(folder).as_posix()
        if path.suffix.lower() not in SUFFIXES:
            yield Found(key, reason="not a picture by its name")
            continue
        meta = rows.get(key, {})
        captions = captions_of(meta)
        for suffix in (".txt", ".caption"):
            beside = path.with_suffix(suffix)
            if beside.is_file():
                text = beside.read_text(encoding="utf-8", errors="replace")
                captions = tuple(line.strip() for line in text.splitlines() if line.strip()) + captions
        try:
            yield Found(key, path.read_bytes(), tuple(dict.fromkeys(captions)), meta)
        except OSError as error:
            yield Found(key, reason=f"cannot be read: {error.strerror}")


def _metadata_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of every metadata.jsonl by the picture's path in the folder."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("metadata.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = row.pop("file_name")
            except (ValueError, KeyError, AttributeError, TypeError):
                raise DataError(f'{path}, line {number}: expected a JSON object with "file_name".') from None
            rows[(path.parent / name).relative_to(folder).as_posix()] = row
    return rows


def captions_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The captions in a row: a text, or a list of texts, under one of the usual names."""
    for name in CAPTION_COLUMNS:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return (value.strip(),)
        if isinstance(value, list) and any(isinstance(item, str) for item in value):
            return tuple(item.strip() for item in value if isinstance(item, str) and item.strip())
    return ()


def from_tars(index: ShardIndex) -> Iterator[Found]:
    """The samples of WebDataset tars with all their captions and JSON."""
    for number in range(len(index)):
        key = index.key(number)
        try:
            meta = index.meta(number)
            content, text = index.content(number)
        except DataError as error:
            yield Found(key, reason=str(error))
            continue
        captions = ((text,) if text else ()) + captions_of(meta)
        yield Found(key, content, tuple(dict.fromkeys(captions)), meta)
    for broken in index.broken:
        yield Found(broken.key, reason=broken.reason)


def from_datasets(name: str, split: str) -> Iterator[Found]:
    """A dataset of the hub, or files behind a URL, read as a stream: nothing of it is kept on disk."""
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "train", f"Reading {name}") from None
    try:
        if "://" in name:
            kind = "webdataset" if ".tar" in name else "parquet"
            table = datasets.load_dataset(kind, data_files=name, split=split, streaming=True)
        else:
            table = datasets.load_dataset(name, split=split, streaming=True)
        features = table.features or {}
        column = next((c for c, kind in features.items() if isinstance(kind, datasets.Image)), None)
        if column is None:
            raise DataError(f"{name} has no column of pictures; its columns are {', '.join(features)}.")
        table = table.cast_column(column, datasets.Image(decode=False))
        yield from _from_rows(table, column)
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its readers raise
        raise DataError(f"{name} cannot be read as a dataset: {str(error).splitlines()[0][:200]}") from None


def _from_rows(table: Any, column: str) -> Iterator[Found]:
    for number, row in enumerate(table):
        picture = row.pop(column) or {}
        key = str(row.get("__key__") or picture.get("path") or f"row {number}")
        content = picture.get("bytes")
        if content is None and picture.get("path") and Path(picture["path"]).is_file():
            content = Path(picture["path"]).read_bytes()
        inside = row.get("json") if isinstance(row.get("json"), dict) else {}
        captions = captions_of({**inside, **row, **({"text": row["txt"]} if "txt" in row else {})})
        plain = {name: value for name, value in row.items() if isinstance(value, str | int | float | bool)}
        if content is None:
            yield Found(key, reason="the row has no picture")
        else:
            yield Found(key, content, captions, plain)
