"""Procedural pictures of one to three coloured shapes, with captions and exact ground truth.

`draw_shapes(seed)` is a pure function of its seed: layout, colours, background and captions follow the
rules of the published shapes set, so as many as wanted can be made. Eight (colour, shape) pairs never
appear unless asked for: they show whether a trained model composes what it knows.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw

from triptych.data.shards import Sample

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon")
COLOURS = {
    "red": (220, 38, 38),
    "orange": (245, 130, 32),
    "yellow": (250, 210, 40),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "purple": (130, 60, 190),
    "pink": (245, 130, 180),
    "brown": (125, 78, 42),
    "black": (24, 24, 27),
    "white": (255, 255, 255),
    "gray": (130, 134, 140),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "light gray": (224, 226, 229),
    "pale blue": (214, 232, 250),
    "pale green": (217, 242, 217),
    "pale yellow": (253, 246, 208),
    "pale pink": (252, 220, 230),
    "dark blue": (22, 34, 84),
    "black": (16, 16, 18),
}
CLASHES = {  # colours that would not stand out
    "white": {"white"},
    "light gray": {"white", "gray"},
    "pale blue": {"white"},
    "pale green": {"white"},
    "pale yellow": {"white", "yellow"},
    "pale pink": {"white", "pink"},
    "dark blue": {"black", "blue", "purple"},
    "black": {"black", "brown"},
}
HELDOUT = frozenset(
    {
        ("purple", "circle"),
        ("pink", "square"),
        ("brown", "triangle"),
        ("gray", "star"),
        ("orange", "heart"),
        ("green", "ring"),
        ("yellow", "cross"),
        ("red", "moon"),
    }
)

BASE = 256  # all lengths below are pixels of a 256 x 256 picture
OVERSAMPLING = 4
Kind = Literal["single", "pair", "same", "triple"]
KINDS: dict[Kind, float] = {"single": 0.30, "pair": 0.40, "same": 0.15, "triple": 0.15}  # as published
LARGE_SHARE = 0.5  # of its objects
WHITE_SHARE = 0.4  # of the backgrounds; the other seven are equally likely
RADII = {  # kind -> size word -> range of half the extent
    "single": {"small": (24.0, 34.0), "large": (70.0, 92.0)},
    "pair": {"small": (24.0, 34.0), "large": (45.0, 52.0)},
    "same2": {"small": (24.0, 34.0), "large": (48.0, 48.0)},
    "same3": {"small": (24.0, 26.0), "large": (35.0, 35.0)},
    "triple": {"small": (17.0, 21.0), "large": (33.0, 36.0)},
}
PLACES = {  # kind -> centres along the main axis, jitter along it, jitter across it
    "pair": ((72.0, 184.0), 5.0, 24.0),
    "same2": ((76.0, 180.0), 0.0, 6.0),
    "same3": ((50.0, 128.0, 206.0), 0.0, 6.0),
    "triple": ((48.0, 128.0, 208.0), 0.0, 14.0),
}
SINGLE_JITTER = {"small": 60.0, "large": 20.0}

RING_HOLE, CROSS_ARM, STAR_INNER, SQUARE_HALF = 0.58, 0.34, 0.42, 0.9
MOON_CUT = (0.5, -0.12, 0.82)  # centre and radius of the circle taken away from the unit circle
LEFT_OF, ABOVE = "left of", "above"


@dataclass(frozen=True)
class _Thing:
    """One object before drawing; positions and radius in pixels of the canvas."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Mix:
    """How often what is drawn: `kinds` of picture by share, and the share of large objects among all.

    A small object covers two latents of a 256-pixel picture; a small network learns outlines from large ones.
    """

    kinds: tuple[tuple[str, float], ...] = tuple(KINDS.items())
    large: float = LARGE_SHARE


PUBLISHED = Mix()


def draw_shapes(
    seed: int, width: int = BASE, height: int = BASE, heldout: bool = False, mix: Mix = PUBLISHED
) -> Sample:
    """The picture of `seed`: a `Sample` of `width` x `height` with 5 or 6 captions and its truth in `meta`.

    With `heldout` exactly one kind of object carries a held-out (colour, shape) pair; otherwise none does.
    That is for evaluation prompts and tests only, never for training.
    """
    rng = random.Random(f"shapes:{seed}:{int(heldout)}")
    background = "white" if rng.random() < WHITE_SHARE else _pick(rng, tuple(BACKGROUNDS)[1:])
    kind = _weighted(rng, mix.kinds)
    count = {"single": 1, "pair": 2, "triple": 3}.get(kind) or 2 + _below(rng, 2)
    axis = "" if kind == "single" else LEFT_OF if rng.random() < (0.6 if kind == "triple" else 0.5) else ABOVE
    looks = _choose_looks(rng, background, 1 if kind == "same" else count, heldout)
    if kind == "same":
        looks = looks * count
    things = _lay_out(rng, kind, axis, looks, width, height, mix.large)
    image, boxes = _render(things, background, width, height)
    captions = _captions(rng, kind, axis, things, background)
    meta = _ground_truth(kind, axis, things, boxes, background, captions, heldout)
    return Sample(f"shapes_{seed:08d}", image, tuple(captions), meta, "CC0-1.0", "procedural")


def write_shapes(
    path: str | os.PathLike[str], count: int, seed: int = 0, width: int = BASE, height: int = BASE
) -> None:
    """Write a shard of `count` pictures of seeds `seed`, `seed + 1`, ...; always the same bytes."""
    partial = Path(f"{path}.partial")
    with tarfile.open(partial, "w") as tar:
        for number in range(seed, seed + count):
            sample = draw_shapes(number, width, height)
            buffer = io.BytesIO()
            sample.image.save(buffer, "WEBP", lossless=True, method=1)
            _add(tar, f"{sample.key}.webp", buffer.getvalue())
            _add(tar, f"{sample.key}.txt", sample.caption.encode())
            _add(tar, f"{sample.key}.json", json.dumps(sample.meta, separators=(",", ":")).encode())
    os.replace(partial, path)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


# Chance. Only `random.Random.random` is promised to stay the same between Python versions.


def _below(rng: random.Random, count: int) -> int:
    return int(rng.random() * count)


def _pick(rng: random.Random, options: tuple[str, ...]) -> str:
    return options[_below(rng, len(options))]


def _between(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _weighted(rng: random.Random, options: tuple[tuple[str, float], ...]) -> str:
    level = rng.random()
    for name, share in options:
        level -= share
        if level < 0:
            return name
    return options[-1][0]


def _size(rng: random.Random, large: float) -> str:
    return "small" if rng.random() < 1 - large else "large"


def _choose_looks(rng: random.Random, background: str, count: int, heldout: bool) -> list[tuple[str, str]]:
    """`count` different (colour, shape) pairs that stand out from the background."""
    colours = tuple(c for c in COLOURS if c not in CLASHES[background])
    looks: list[tuple[str, str]] = []
    if heldout:
        pairs = sorted(p for p in HELDOUT if p[0] in colours)
        looks.append(pairs[_below(rng, len(pairs))])
    while len(looks) < count:
        look = (_pick(rng, colours), _pick(rng, SHAPES))
        if look not in HELDOUT and look not in looks:
            looks.append(look)
    if heldout and count > 1:  # the odd one stands anywhere
        place = _below(rng, count)
        looks[0], looks[place] = looks[place], looks[0]
    return looks


def _lay_out(
    rng: random.Random,
    kind: str,
    axis: str,
    looks: list[tuple[str, str]],
    width: int,
    height: int,
    large: float,
) -> list[_Thing]:
    """Sizes and places. Lengths follow the shorter side; places spread over the whole canvas."""
    unit = min(width, height) / BASE
    if kind == "single":
        size = _size(rng, large)
        jitter = SINGLE_JITTER[size]
        x, y = (BASE / 2 + _between(rng, -jitter, jitter) for _ in range(2))
        radius = _between(rng, *RADII[kind][size])
        colour, shape = looks[0]
        return [_Thing(shape, colour, size, x * width / BASE, y * height / BASE, radius * unit)]

    layout = f"same{len(looks)}" if kind == "same" else kind
    centres, along, across = PLACES[layout]
    alike = (_size(rng, large), rng.random()) if kind == "same" else None
    things = []
    for (colour, shape), centre in zip(looks, centres, strict=True):
        size, level = alike or (_size(rng, large), rng.random())
        low, high = RADII[layout][size]
        main = centre + _between(rng, -along, along)
        cross = BASE / 2 + _between(rng, -across, across)
        x, y = (main, cross) if axis == LEFT_OF else (cross, main)
        radius = (low + (high - low) * level) * unit
        things.append(_Thing(shape, colour, size, x * width / BASE, y * height / BASE, radius))
    return things


# Drawing: outlines in units of the radius, y downwards.


def _circle(radius: float, x: float = 0.0, y: float = 0.0, points: int = 180) -> list[tuple[float, float]]:
    step = 2 * math.pi / points
    return [(x + radius * math.cos(i * step), y + radius * math.sin(i * step)) for i in range(points)]


def _star() -> list[tuple[float, float]]:
    turns = [(i, 1.0 if i % 2 == 0 else STAR_INNER) for i in range(10)]
    return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in turns]


def _heart(points: int = 180) -> list[tuple[float, float]]:
    outline = []
    for i in range(points):
        a = 2 * math.pi * i / points
        x = 16 * math.sin(a) ** 3
        y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        outline.append((x / 17, -(y + 2) / 17))
    return outline


def _cross() -> list[tuple[float, float]]:
    a = CROSS_ARM
    return [
        *((-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)),
        *((a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)),
    ]


_S = SQUARE_HALF
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _circle(1.0),
    "ring": _circle(1.0),
    "moon": _circle(1.0),
    "square": [(-_S, -_S), (_S, -_S), (_S, _S), (-_S, _S)],
    "triangle": [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)],
    "star": _star(),
    "heart": _heart(),
    "cross": _cross(),
}
CUTS: dict[str, list[tuple[float, float]]] = {
    "ring": _circle(RING_HOLE),
    "moon": _circle(MOON_CUT[2], MOON_CUT[0], MOON_CUT[1]),
}

Box = tuple[float, float, float, float]


def _render(things: list[_Thing], background: str, width: int, height: int) -> tuple[Image.Image, list[Box]]:
    """The picture and the exact extents (x0, y0, x1, y1) of each object."""
    image = Image.new("RGB", (width, height), BACKGROUNDS[background])
    boxes = []
    for thing in things:
        left = max(0, math.floor(thing.x - thing.radius) - 1)
        top = max(0, math.floor(thing.y - thing.radius) - 1)
        right = min(width, math.ceil(thing.x + thing.radius) + 1)
        bottom = min(height, math.ceil(thing.y + thing.radius) + 1)
        fine = Image.new("L", ((right - left) * OVERSAMPLING, (bottom - top) * OVERSAMPLING), 0)
        draw = ImageDraw.Draw(fine)
        for outline, level in ((OUTLINES[thing.shape], 255), (CUTS.get(thing.shape), 0)):
            if outline is not None:
                points = [
                    (
                        (thing.x + thing.radius * x - left) * OVERSAMPLING,
                        (thing.y + thing.radius * y - top) * OVERSAMPLING,
                    )
                    for x, y in outline
                ]
                draw.polygon(points, fill=level)
        extent = fine.getbbox() or (0, 0, 0, 0)
        x0, y0, x1, y1 = (value / OVERSAMPLING for value in extent)
        boxes.append((left + x0, top + y0, left + x1, top + y1))
        image.paste(COLOURS[thing.colour], (left, top), fine.reduce(OVERSAMPLING))
    return image, boxes


# Words.


def _a(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("ss") else f"{noun}s"


def _captions(rng: random.Random, kind: str, axis: str, things: list[_Thing], background: str) -> list[str]:
    """The main caption, chosen by chance, then the others in a fixed order."""
    on = f"on {_a(background)} background"
    plain = [_a(f"{t.colour} {t.shape}") for t in things]
    sized = [_a(f"{t.size} {t.colour} {t.shape}") for t in things]
    if kind == "single":
        thing = things[0]
        bare = f"{thing.size} {thing.colour} {thing.shape}"
        mains = [f"{plain[0]} {on}", f"{sized[0]} {on}", sized[0]]
        fixed = [
            f"{sized[0]} {on}",
            plain[0],
            bare,
            f"{_a(background)} background with {plain[0]}",
            f"a picture of {sized[0]}",
        ]
    elif kind == "pair":
        there, back = ("to the left of", "to the right of") if axis == LEFT_OF else ("above", "below")
        forward = f"{plain[0]} {there} {plain[1]}"
        backward = f"{plain[1]} {back} {plain[0]}"
        full = f"{sized[0]} {there} {sized[1]} {on}"
        mains = [forward, backward, full, f"{forward} {on}", f"{backward} {on}"]
        fixed = [
            forward,
            backward,
            full,
            f"{plain[0]} and {plain[1]} {on}",
            f"{sized[1]} {back} {sized[0]}",
        ]
    elif kind == "same":
        number = {2: "two", 3: "three"}[len(things)]
        thing = things[0]
        many = f"{number} {thing.colour} {_plural(thing.shape)}"
        many_sized = f"{number} {thing.size} {thing.colour} {_plural(thing.shape)}"
        arranged = {
            (2, LEFT_OF): "side by side",
            (2, ABOVE): "one above the other",
            (3, LEFT_OF): "in a row",
            (3, ABOVE): "in a column",
        }[len(things), axis]
        fixed = [many, many_sized, f"{many} {arranged}", f"{many} {on}", f"{many_sized} {arranged} {on}"]
        mains = fixed
    else:
        order = "from left to right" if axis == LEFT_OF else "from top to bottom"
        listing = "{}, {} and {}"
        fixed = [
            f"{listing.format(*plain)}, {order}",
            f"{listing.format(*plain)} {on}",
            f"{plain[1]} between {plain[0]} and {plain[2]}",
            f"{listing.format(*sized)}, {order} {on}",
            listing.format(plain[2], plain[0], plain[1]),
        ]
        mains = fixed[:4]
    main = mains[_below(rng, len(mains))]
    return [main, *(caption for caption in fixed if caption != main)]


def _ground_truth(
    kind: str,
    axis: str,
    things: list[_Thing],
    boxes: list[Box],
    background: str,
    captions: list[str],
    heldout: bool,
) -> dict[str, Any]:
    objects = [
        {
            "shape": thing.shape,
            "colour": thing.colour,
            "size": thing.size,
            "bbox": [round(value, 1) for value in box],
            "colour_rgb": list(COLOURS[thing.colour]),
            "center": [round(thing.x, 1), round(thing.y, 1)],
        }
        for thing, box in zip(things, boxes, strict=True)
    ]
    counts: dict[tuple[str, str], int] = {}
    for thing in things:
        counts[thing.shape, thing.colour] = counts.get((thing.shape, thing.colour), 0) + 1
    return {
        "captions": captions,
        "kind": kind,
        "subset": "heldout_composition" if heldout else "train",
        "background": background,
        "background_rgb": list(BACKGROUNDS[background]),
        "objects": objects,
        "relations": [{"subject": i, "relation": axis, "object": i + 1} for i in range(len(things) - 1)],
        "counts": [{"shape": s, "colour": c, "n": n} for (s, c), n in counts.items()],
        "license": "CC0-1.0",
        "source": "procedural",
    }
