"""Where training pictures come from, all seen alike: numbered, sized, readable in any order.

A `Source` is anything with these methods; `ShardIndex` is one. `DrawnShapes` draws its pictures when
they are read, and `Joined` puts several sources one behind the other, some more than once to give them more
weight.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from triptych.data.shapes import BASE, PUBLISHED, Mix, draw_shapes
from triptych.data.shards import Sample
from triptych.errors import DataError

PLAIN_TOLERANCE = 8  # of 255, about what lossy compression leaves of a plain colour
PLAIN_SHARE = 0.98  # of the rim


class Source(Protocol):
    """Numbered samples. `read` gives None, and `size` too, for one that cannot be read."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def size(self, index: int) -> tuple[int, int] | None: ...

    def read(self, index: int) -> Sample | None: ...

    def captions(self, index: int) -> tuple[str, ...]: ...

    def prototype(self, index: int) -> Image.Image | None:
        """The picture whose key the sample's metadata names as `prototype`; None where it names none."""
        ...

    def mark(self) -> str:
        """A text that changes when the samples do."""
        ...


class DrawnShapes:
    """`count` procedural pictures: number i is `draw_shapes(first_seed + i)`, canvases taken in turn.

    `canvases` are (height, width); drawing straight on the canvas of a bucket keeps every object inside.
    """

    def __init__(
        self,
        count: int,
        first_seed: int = 0,
        canvases: Sequence[tuple[int, int]] = ((BASE, BASE),),
        mix: Mix = PUBLISHED,
    ) -> None:
        if count < 1 or not canvases:
            raise DataError(f"Drawn shapes need a count of at least 1 and a canvas, got {count}.")
        self.count = count
        self.first_seed = first_seed
        self.canvases = tuple(canvases)
        self.mix = mix

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        mixed = "" if self.mix == PUBLISHED else f"_{self.mix.large}_{dict(self.mix.kinds)}"
        return f"shapes_{self.first_seed + index:08d}{mixed}"

    def size(self, index: int) -> tuple[int, int]:
        return self.canvases[index % len(self.canvases)]

    def read(self, index: int) -> Sample:
        height, width = self.size(index)
        return draw_shapes(self.first_seed + index, width, height, mix=self.mix)

    def captions(self, index: int) -> tuple[str, ...]:
        return self.read(index).captions

    def prototype(self, index: int) -> None:
        """Every drawn picture is its own."""

    def mark(self) -> str:
        return f"{self.count} {self.canvases} {self.key(0)}"


class OnCanvases:
    """The pictures of another source on canvases (height, width) taken in turn, by number.

    A drawing on a plain background is scaled to fit and its background extended, so nothing of it is lost;
    any other picture is cropped.
    """

    def __init__(self, source: Source, canvases: Sequence[tuple[int, int]]) -> None:
        self.source = source
        self.canvases = tuple(canvases)

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        height, width = self.canvases[index % len(self.canvases)]
        return f"{self.source.key(index)}@{width}x{height}"

    def size(self, index: int) -> tuple[int, int] | None:
        readable = self.source.size(index) is not None
        return self.canvases[index % len(self.canvases)] if readable else None

    def read(self, index: int) -> Sample | None:
        sample = self.source.read(index)
        if sample is None:
            return None
        height, width = self.canvases[index % len(self.canvases)]
        if sample.image.size == (width, height):
            return sample
        image = to_canvas(sample.image, height, width)
        if sample.mask is None:
            return replace(sample, image=image)
        framed = plain_background(sample.image) is not None
        place = ImageOps.pad if framed else ImageOps.fit  # as the picture, the rim around it left out
        mask = place(sample.mask, (width, height), Image.Resampling.BILINEAR)
        return replace(sample, image=image, mask=mask)

    def captions(self, index: int) -> tuple[str, ...]:
        return self.source.captions(index)

    def prototype(self, index: int) -> Image.Image | None:
        return self.source.prototype(index)

    def mark(self) -> str:
        return f"{self.canvases} {self.source.mark()}"


def to_canvas(image: Image.Image, height: int, width: int) -> Image.Image:
    """`image` scaled to fit a canvas whose rest has its background's colour; cropped if that is not plain."""
    background = plain_background(image)
    if background is None:
        return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return ImageOps.pad(image, (width, height), Image.Resampling.BICUBIC, color=background)


def plain_background(image: Image.Image) -> tuple[int, int, int] | None:
    """The one colour along the rim of an RGB picture, or None when there are several."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.int16)
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = np.median(rim, axis=0)
    if np.mean(np.abs(rim - colour).max(axis=1) <= PLAIN_TOLERANCE) < PLAIN_SHARE:
        return None
    red, green, blue = (int(value) for value in colour)
    return red, green, blue


class Joined:
    """Several sources as one. `repeats[k]` says how often source k appears (default once each)."""

    def __init__(self, sources: Sequence[Source], repeats: Sequence[int] | None = None) -> None:
        repeats = repeats or [1] * len(sources)
        if len(repeats) != len(sources) or not sources or min(repeats) < 1:
            raise DataError(
                f"{len(sources)} sources need as many repeats of at least 1, got {list(repeats)}."
            )
        self._parts = [source for source, times in zip(sources, repeats, strict=True) for _ in range(times)]
        self._ends = list(accumulate(len(part) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)

    def original(self, index: int) -> int:
        """The number under which the sample appears first: another one for those of a source that is
        repeated."""
        source, inner = self._find(index)
        first = next(k for k, part in enumerate(self._parts) if part is source)
        return inner + (self._ends[first - 1] if first else 0)

    def key(self, index: int) -> str:
        source, inner = self._find(index)
        return source.key(inner)

    def size(self, index: int) -> tuple[int, int] | None:
        source, inner = self._find(index)
        return source.size(inner)

    def read(self, index: int) -> Sample | None:
        source, inner = self._find(index)
        return source.read(inner)

    def captions(self, index: int) -> tuple[str, ...]:
        source, inner = self._find(index)
        return source.captions(inner)

    def prototype(self, index: int) -> Image.Image | None:
        source, inner = self._find(index)
        return source.prototype(inner)

    def mark(self) -> str:
        return "\n".join(part.mark() for part in self._parts)
