"""Any collection of captioned pictures into tar shards that training reads by index.

Where they come from is the business of readers.py. Every picture is looked at once: read, turned upright,
shrunk to what its aspect bucket needs; if asked, the place is found that a crop should keep. What is left out
is listed with the reason; nothing is dropped silently.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from triptych.checkpoints.files import write_atomically
from triptych.conditioning.masks import Saliency, salient_place
from triptych.data.buckets import RATIOS, Bucket, covering_size, make_buckets, nearest_bucket
from triptych.data.shards import MASK_ENDING
from triptych.errors import DataError
from triptych.images import decode_picture, to_pixels, transparency, upright
from triptych.models.saliency import SHORT_SIDE
from triptych.training.readers import Found, open_source

KEPT = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}  # formats stored as they come
INDEX = "prepared.json"
SHARD_BYTES = 256 * 2**20
QUALITY = 95  # of WebP, for pictures that had to change


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
    look: Saliency | None = None,
    force: bool = False,
    progress: Callable[[int, int | None], None] = lambda done, of: None,
) -> Prepared:
    """Write the pictures of `source` to tar shards in `out`.

    `size` is the side of the square whose area canvases have; larger pictures are shrunk to cover theirs.
    `caption` is for pictures without one. `look` finds what stands out in a picture; crops in training are
    then laid around it. `force` replaces what `out` holds from an earlier time. Raises DataError for a source
    that cannot be opened or has no readable picture, MissingExtra without `datasets` where that is needed.
    """
    found, total = open_source(source, split)
    _make_room(out, force)
    buckets = make_buckets(size, ratios)
    made = Prepared(out)
    seen: dict[str, str] = {}
    with ShardWriter(out, made) as writer:
        for number, one in enumerate(found, 1):
            progress(number, total)
            reason = one.reason or _add(one, buckets, caption, min_side, look, seen, writer, made)
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
    look: Saliency | None,
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
        mask = None if not one.mask else decode_picture(one.mask, f"the mask of {one.key}").convert("L")
    except DataError as error:
        return str(error)
    if min(image.size) < min_side:
        return f"{image.width}x{image.height} pixels are less than {min_side} a side"
    seen[digest] = one.key
    bucket = buckets[nearest_bucket(image.height, image.width, buckets)]
    content, suffix = stored(one.content, image, bucket)
    if mask is None and content is not one.content:  # opacity is lost with the bytes
        mask = opacity(one.content)
    captions = one.captions or ((caption,) if caption else ())
    made.without_caption += not captions
    canvas = f"{bucket.width}x{bucket.height}"
    made.buckets[canvas] += 1
    meta = {**one.meta, "captions": list(captions), "bucket": canvas, "source": one.key}
    if look is not None:
        meta["focus"] = [round(at, 4) for at in salient_place(look(looked_at(image))[0, 0])]
    key = f"{made.pictures:08d}"
    writer.write(key, content, suffix, captions[0] if captions else "", meta, mask)
    return ""


def looked_at(image: Image.Image) -> Tensor:
    """A picture as saliency is found in it: pixels (1,3,h,w), its shorter side SHORT_SIDE at most."""
    scale = min(1.0, SHORT_SIDE / min(image.size))
    return to_pixels(
        [image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))]
    )


def opacity(content: bytes) -> Image.Image | None:
    """How opaque a picture file is, upright; None when it is wholly so."""
    with Image.open(io.BytesIO(content)) as opened:
        return transparency(upright(opened))


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

    def write(
        self,
        key: str,
        content: bytes,
        suffix: str,
        caption: str,
        meta: dict[str, Any],
        mask: Image.Image | None = None,
    ) -> None:
        if self.tar is None:
            name = f"shard-{len(self.made.shards):05d}.tar"
            self.path = self.out / f".{name}.partial"
            self.tar = tarfile.open(self.path, "w")  # noqa: SIM115  closed by _close
            self.made.shards.append(name)
        self._member(key + suffix, content)
        if caption:
            self._member(key + ".txt", caption.encode("utf-8"))
        self._member(key + ".json", json.dumps(meta, ensure_ascii=False, default=str).encode("utf-8"))
        if mask is not None:
            buffer = io.BytesIO()
            mask.save(buffer, "PNG")
            self._member(key + MASK_ENDING + ".png", buffer.getvalue())
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
