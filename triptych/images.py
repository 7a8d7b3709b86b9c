"""Pictures in and out: PIL <-> tensors, PNG files that carry their own request.

`pixels` are (B,3,H,W) float32 in [0,1] everywhere in the package; conversion to bytes rounds to nearest.
A PNG we write holds one text chunk named "triptych": JSON with the version, the request and which picture
of the request it is. Files appear under their final name only when they are complete, and an existing
file is never replaced.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from triptych.errors import DataError

METADATA_KEY = "triptych"
MAX_STEM_BYTES = 80  # file systems allow 255 bytes a name; this leaves room for seed, number and suffix


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> pixels (B,3,H,W) in [0,1]. Transparent parts are laid on white."""
    arrays = [np.asarray(flatten(image), dtype=np.uint8) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().float() / 255


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (B,3,H,W) -> B pictures; values outside [0,1] are clamped, NaN becomes black."""
    values = pixels.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).cpu().numpy()]


def flatten(image: Image.Image) -> Image.Image:
    """An RGB copy of `image`; transparency becomes white, as a viewer would print it."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def read_picture(path: Path | str) -> Image.Image:
    """Read a picture file as RGB, upright. Raises DataError naming the file when it is none."""
    try:
        with Image.open(path) as image:
            return flatten(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise DataError(f"No such picture: {path}.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; a picture file was expected.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture: {error}.") from error


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 0) -> Image.Image:
    """Lay pictures of one size out in rows on white; `columns` defaults to a near-square."""
    columns = columns or max(1, round(len(images) ** 0.5 + 0.49))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


def picture_stem(prompt: str, seed: int) -> str:
    """A file name without suffix: the words of the prompt, safe on every file system, and the seed.

    >>> picture_stem("A red apple!", 7)
    'a-red-apple-7'
    """
    words = re.sub(r"[^\w]+", "-", unicodedata.normalize("NFC", prompt).casefold()).strip("-_")
    short = words.encode("utf-8", "ignore")[:MAX_STEM_BYTES].decode("utf-8", "ignore").rstrip("-_")
    return f"{short or 'picture'}-{seed}"


def encode_png(image: Image.Image, metadata: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a PNG file holding `image` and, as JSON in one text chunk, `metadata`."""
    text = PngImagePlugin.PngInfo()
    if metadata is not None:
        text.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False, sort_keys=True))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=text)
    return buffer.getvalue()


def encode_jpeg(image: Image.Image) -> bytes:
    """The bytes of a JPEG file, for previews."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def write_new(folder: Path, stem: str, suffix: str, content: bytes) -> Path:
    """Write `content` as folder/stem+suffix, or stem-2, stem-3, ... when the name is taken.

    The file is written whole under a temporary name and then linked, so that readers never meet half
    a picture and two processes never take the same name. Returns the path. Raises OSError.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=".triptych-", suffix=".part", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        number = 1
        while True:
            target = folder / (f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}")
            if _place(temporary, target):
                return target
            number += 1
    except OSError as error:
        error.filename = error.filename or str(folder / f"{stem}{suffix}")  # writing itself names no file
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def replace(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step, whatever was there before. Raises OSError."""
    descriptor, temporary = tempfile.mkstemp(prefix=".triptych-", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def save_png(folder: Path, stem: str, image: Image.Image, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write `image` as a new PNG in `folder` (see `write_new`) and return its path."""
    return write_new(folder, stem, ".png", encode_png(image, metadata))


def read_metadata(path: Path | str) -> dict[str, Any]:
    """The metadata `save_png` stored in a PNG. Raises DataError when the file holds none."""
    try:
        with Image.open(path) as image:
            image.load()  # text chunks may stand after the pixels, where other programs put them
            text = getattr(image, "text", {}).get(METADATA_KEY)
    except FileNotFoundError:
        raise DataError(f"No such picture: {path}.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; a picture file was expected.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture: {error}.") from error
    if text is None:
        raise DataError(f"{path} holds no triptych settings; only PNG files written by triptych do.")
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise DataError(f"The settings stored in {path} are damaged: {error}.") from error
    if not isinstance(metadata, dict):
        raise DataError(f"The settings stored in {path} are damaged: an object was expected.")
    return metadata


def _place(temporary: str, target: Path) -> bool:
    """Give the finished file its name unless that is taken; hard links make this one atomic step."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EACCES):
            raise
        # File systems without hard links (FAT, some network folders): reserve the name, then replace it.
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        os.replace(temporary, target)
    return True


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
