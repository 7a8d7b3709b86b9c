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
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from triptych.errors import DataError

METADATA_KEY = "triptych"
MAX_PIXELS = 178_956_970  # of a picture that is read: Pillow's own limit
MAX_FILE_BYTES = 512 * 2**20
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
    """An sRGB copy of `image`; transparency becomes white, as a viewer would print it.

    Deep greys are scaled to 8 bits; colours with a profile of their own (CMYK, wide gamuts) are converted.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        flat = Image.alpha_composite(white, layered).convert("RGB")
    else:
        flat = image if image.mode == "CMYK" else image.convert("RGB")
    return _to_srgb(flat, image.info.get("icc_profile"))


def _eight_bits(image: Image.Image) -> np.ndarray:
    """The levels of a 16-bit, 32-bit or floating-point grey picture in 0 to 255."""
    levels = np.nan_to_num(np.asarray(image).astype(np.float32))
    highest = float(levels.max(initial=0))
    peak = 65535.0 if image.mode.startswith("I;16") or highest > 255 else 255.0
    if image.mode == "F" and highest <= 1:
        peak = 1.0
    return (levels * (255 / peak)).round().clip(0, 255).astype(np.uint8)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours of the ICC `profile` as sRGB; without one, or with a damaged one, the plain conversion."""
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
            stored = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(stored).lower():
                screen = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(image, stored, screen, outputMode="RGB")
                if converted is not None:
                    return converted
    return image.convert("RGB")


def read_picture(path: Path | str) -> Image.Image:
    """Read a picture file as RGB, upright. Raises DataError naming the file when it is none or too large."""
    return decode_picture(read_bytes(path), path)


def read_bytes(path: Path | str) -> bytes:
    """The content of a picture file. Raises DataError when it is missing, a folder or too large."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(
                f"{path} has {size / 1e6:,.0f} MB; pictures of up to {MAX_FILE_BYTES / 1e6:,.0f} MB are read."
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"No such picture: {path}.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; a picture file was expected.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a picture: {error}.") from error


def decode_picture(content: bytes, name: object) -> Image.Image:
    """The bytes of a picture file as RGB, turned upright, the first frame of several.

    `name` is what errors call it. Raises DataError for anything that cannot be shown, and above MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF data, and of large pictures, which are checked here
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{width}x{height}")
                image.load()
                return flatten(upright(image))
    except Image.DecompressionBombError:
        raise DataError(
            f"{name} is too large: pictures of up to {MAX_PIXELS / 1e6:.0f} million pixels are read; "
            "scale it down first."
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise whatever their loops trip over
        reason = str(error).replace(f"{io.BytesIO.__module__}.BytesIO", "file").rstrip(".")
        if isinstance(error, UnidentifiedImageError):
            reason = "its format is not known; save it as PNG or JPEG"
        raise DataError(f"{name} cannot be read as a picture: {reason}.") from error


def transparency(image: Image.Image) -> Image.Image | None:
    """How opaque a picture is, 255 where it is wholly (mode "L"); None when nothing of it is transparent."""
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == 255 else alpha


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data says; damaged EXIF data says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever a parser of damaged tags trips over
        return image


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image` at `size` (width, height): scaled until it covers that, the middle kept."""
    if image.size == size:
        return image
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


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
        os.chmod(temporary, 0o666 & ~_umask())
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
