"""Collections of pictures as a stream of files: each with its captions and mask, or the reason it has none.

A folder has captions in KEY.txt beside a picture or in metadata.jsonl, and masks in KEY-mask.png. WebDataset
tars are read as they are. Both may lie behind URLs (s3://, gs://, hf://, memory://), which fsspec opens.
Datasets of the hub, parquet files, and folders that the `datasets` library saved are read through it.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from triptych.data.shards import MASK_ENDING, ShardIndex
from triptych.errors import DataError, MissingExtra

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
BESIDE = (".txt", ".caption", ".json", ".jsonl")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description")
PARQUET, TAR = ".parquet", ".tar"
SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # in folders that it wrote


@dataclass(frozen=True)
class Found:
    """One picture of a source: its bytes and those of its mask, or the reason why there are none."""

    key: str
    content: bytes = b""
    captions: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    mask: bytes = b""


@dataclass(frozen=True)
class Files:
    """The files of a folder by name (with slashes), and how to read one."""

    names: Sequence[str]
    read: Callable[[str], bytes]

    @property
    def pictures(self) -> list[str]:
        """All but captions, masks that belong to a picture, and hidden files."""
        stems = {str(PurePosixPath(name).with_suffix("")) for name in self.names}
        return [name for name in self.names if not self._beside(PurePosixPath(name), stems)]

    def _beside(self, name: PurePosixPath, stems: set[str]) -> bool:
        stem = str(name.with_suffix(""))
        masks = stem.endswith(MASK_ENDING) and stem.removesuffix(MASK_ENDING) in stems
        return name.suffix.lower() in BESIDE or masks or any(part.startswith(".") for part in name.parts)

    def mask_of(self, name: str) -> str | None:
        """The mask that belongs to a picture."""
        stem = str(PurePosixPath(name).with_suffix("")) + MASK_ENDING
        return next((stem + suffix for suffix in SUFFIXES if stem + suffix in self._known), None)

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    def text(self, name: str) -> str | None:
        return self.read(name).decode("utf-8", "replace") if name in self._known else None


def open_source(source: str, split: str) -> tuple[Iterator[Found], int | None]:
    """The pictures of a source, and how many there are where that is known. Raises DataError for one that is
    not there, MissingExtra without `datasets` where it is needed."""
    path = Path(source)
    if path.is_dir() and not any(path.glob("*.tar")):
        if any((path / name).exists() for name in SAVED):
            return from_datasets(source, split), None
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        return open_files(Files(names, lambda name: (path / name).read_bytes()), source, split)
    if path.exists():
        index = ShardIndex(path)
        return from_tars(index), len(index)
    if "://" not in source and (path.suffix == TAR or source.startswith((".", "/", "~"))):
        raise DataError(f"There is no file or folder {source}.")
    if "://" not in source or source.endswith(PARQUET):
        return from_datasets(source, split), None
    if source.endswith(TAR):
        return from_remote_tars([source]), None
    return open_files(remote_files(source), source, split)


def open_files(files: Files, source: str, split: str) -> tuple[Iterator[Found], int | None]:
    """The pictures of a folder, or of the tars or parquet files in it where it has no pictures."""
    pictures = files.pictures
    if not any(name.lower().endswith(SUFFIXES) for name in pictures):
        root = source.rstrip("/")
        tars, tables = ([f"{root}/{n}" for n in pictures if n.endswith(ending)] for ending in (TAR, PARQUET))
        if tars:
            return from_remote_tars(tars), None
        if tables:
            return from_datasets(tables, split), None
    return from_files(files, pictures), len(pictures)


def remote_files(url: str) -> Files:
    """The files behind a URL, listed now and read as they are needed."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise MissingExtra("datasets", "train", f"Reading {url}") from None
    try:
        system, root = url_to_fs(url)
        root = root.rstrip("/")
        names = sorted(str(name)[len(root) :].lstrip("/") for name in system.find(root))
    except Exception as error:  # every store has its own errors
        raise DataError(f"{url} cannot be listed: {first_line(error)}.") from None
    if not names:
        raise DataError(f"There are no files behind {url}.")
    return Files(names, lambda name: bytes(system.cat_file(f"{root}/{name}")))


def first_line(error: Exception) -> str:
    """What an error of another library says, in brief."""
    return (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".")


def from_files(files: Files, pictures: Sequence[str]) -> Iterator[Found]:
    """Pictures in name order with their captions; files that are neither are told too."""
    rows = metadata_rows(files)
    for name in pictures:
        path = PurePosixPath(name)
        if path.suffix.lower() not in SUFFIXES:
            yield Found(name, reason="not a picture by its name")
            continue
        try:
            meta = rows.get(name, {})
            captions = captions_of(meta)
            for suffix in (".txt", ".caption"):
                text = files.text(str(path.with_suffix(suffix)))
                if text is not None:
                    captions = tuple(line.strip() for line in text.splitlines() if line.strip()) + captions
            mask = files.mask_of(name)
            beside = files.read(mask) if mask is not None else b""
            yield Found(name, files.read(name), tuple(dict.fromkeys(captions)), meta, mask=beside)
        except OSError as error:
            yield Found(name, reason=f"cannot be read: {error.strerror or first_line(error)}")


def metadata_rows(files: Files) -> dict[str, dict[str, Any]]:
    """The rows of every metadata.jsonl by the picture's path in the folder."""
    rows: dict[str, dict[str, Any]] = {}
    for path in (PurePosixPath(name) for name in files.names):
        if path.name != "metadata.jsonl":
            continue
        for number, line in enumerate((files.text(str(path)) or "").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = row.pop("file_name")
            except (ValueError, KeyError, AttributeError, TypeError):
                raise DataError(f'{path}, line {number}: expected a JSON object with "file_name".') from None
            rows[str(path.parent / name)] = row
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
            mask = index.mask_content(number)
        except DataError as error:
            yield Found(key, reason=str(error))
            continue
        captions = ((text,) if text else ()) + captions_of(meta)
        yield Found(key, content, tuple(dict.fromkeys(captions)), meta, mask=mask)
    for broken in index.broken:
        yield Found(broken.key, reason=broken.reason)


def from_remote_tars(urls: Sequence[str]) -> Iterator[Found]:
    """The samples of WebDataset tars behind URLs, read once from front to back."""
    try:
        import fsspec
    except ImportError:
        raise MissingExtra("datasets", "train", f"Reading {urls[0]}") from None
    for url in urls:
        try:
            with fsspec.open(url) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
                yield from _grouped(tar)
        except Exception as error:  # every store has its own errors
            yield Found(url, reason=f"cannot be read further: {first_line(error)}")


def _grouped(tar: tarfile.TarFile) -> Iterator[Found]:
    """Neighbours in a tar that share their names up to the first dot, as WebDataset has it."""
    sample: dict[str, bytes] = {}
    before = ""
    for member in tar:
        opened = tar.extractfile(member) if member.isfile() else None
        name = PurePosixPath(member.name)
        if opened is None or name.name.startswith("."):
            continue
        stem, _, ending = name.name.partition(".")
        key, ending = str(name.parent / stem), "." + ending.lower()
        if key == before + MASK_ENDING:
            key, ending = before, MASK_ENDING
        if key != before and sample:
            yield _sample_of(before, sample)
            sample = {}
        before = key
        sample[ending] = opened.read()
    if sample:
        yield _sample_of(before, sample)


def _sample_of(key: str, sample: Mapping[str, bytes]) -> Found:
    """A sample of a tar from its members by ending."""
    content = next((sample[ending] for ending in SUFFIXES if ending in sample), None)
    if content is None:
        return Found(key, reason="has a caption but no picture")
    try:
        meta = json.loads(sample.get(".json", b"{}"))
    except ValueError as error:
        return Found(key, reason=f"its JSON cannot be read ({error})")
    meta = meta if isinstance(meta, dict) else {}
    text = sample.get(".txt", b"").decode("utf-8", "replace").strip()
    captions = ((text,) if text else ()) + captions_of(meta)
    return Found(key, content, tuple(dict.fromkeys(captions)), meta, mask=sample.get(MASK_ENDING, b""))


def from_datasets(source: str | list[str], split: str) -> Iterator[Found]:
    """A dataset of the hub, one that the library saved, or parquet files, read as a stream: nothing is kept
    on disk."""
    shown = source if isinstance(source, str) else source[0]
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "train", f"Reading {shown}") from None
    try:
        table = open_table(datasets, source, split)
        features = table.features or {}
        column = next((c for c, kind in features.items() if isinstance(kind, datasets.Image)), None)
        if column is None:
            raise DataError(f"{shown} has no column of pictures; its columns are {', '.join(features)}.")
        table = table.cast_column(column, datasets.Image(decode=False))
        yield from _from_rows(table, column)
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its readers raise
        raise DataError(f"{shown} cannot be read as a dataset: {first_line(error)}.") from None


def open_table(datasets: Any, source: str | list[str], split: str) -> Any:
    """What the library makes of a source. Raises whatever its readers raise."""
    if isinstance(source, str) and Path(source).is_dir():
        saved = datasets.load_from_disk(source)
        return saved[split] if isinstance(saved, dict) else saved
    first = source if isinstance(source, str) else source[0]
    if first.endswith(PARQUET):
        return datasets.load_dataset("parquet", data_files={split: source}, split=split, streaming=True)
    return datasets.load_dataset(source, split=split, streaming=True)


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
