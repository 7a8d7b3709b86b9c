"""Pictures as voters see them: nothing inside the file tells who made it, and degraded twins for checks."""

from __future__ import annotations

import struct
from pathlib import Path

from PIL import Image

from triptych.images import encode_png, read_picture

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"sRGB", b"gAMA", b"cHRM", b"iCCP"}
MOSAIC = 20  # tiles a side of a degraded twin


def shown_png(path: Path, degraded: bool = False) -> bytes:
    """The PNG of a picture without text chunks, or of its degraded twin. Raises DataError."""
    if degraded:
        return encode_png(degrade(read_picture(path)))
    content = path.read_bytes()
    return bare_png(content) if content.startswith(SIGNATURE) else encode_png(read_picture(path))


def bare_png(content: bytes) -> bytes:
    """A PNG's bytes with only the chunks that pixels and colours need."""
    parts, place = [SIGNATURE], len(SIGNATURE)
    while place + 8 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        end = place + 12 + length  # length, name, content, checksum
        if content[place + 4 : place + 8] in KEPT:
            parts.append(content[place:end])
        place = end
    return b"".join(parts)


def degrade(image: Image.Image) -> Image.Image:
    """A twin that anyone who looks finds worse, in looks and in what it shows: coarse tiles, few greys."""
    scale = MOSAIC / max(image.size)
    small = image.resize((max(2, round(image.width * scale)), max(2, round(image.height * scale))))
    faded = Image.blend(small, Image.new("RGB", small.size, (120, 120, 120)), 0.5)
    return faded.resize(image.size, Image.Resampling.NEAREST)
