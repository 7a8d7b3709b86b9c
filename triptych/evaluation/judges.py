"""What a picture of plain shapes shows, from its pixels alone.

The judge cuts the picture into background and patches by colour, names each patch's colour by the nearest of
eleven, and its shape by the outline: how full it is, whether it has a hole, and how the distance from its
centre varies along the way round. It is told nothing of how the picture was made. Needs scipy (the `eval`
extra).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from triptych.data.shapes import BACKGROUNDS, COLOURS
from triptych.errors import MissingExtra

Array = np.ndarray[Any, np.dtype[Any]]

SIDE = 256  # the shorter side is brought to this; lengths below are pixels of it
CONTRAST = 13.0  # least distance in CIELAB at which a pixel differs from the background
PATCH_CONTRAST = 16.0  # least median distance of a patch
EDGE = 9  # pixels a soft edge may be wide
LEAST_AREA = 110  # smaller patches are specks
LEAST_SHARE = 0.18  # of a patch's core that a second colour needs to count as an object of its own
HOLE = 0.08  # least share of a hole in a ring
RAYS = 64  # directions in which the outline is sampled

# Shape -> the outline's 2nd to 5th harmonic relative to its mean radius, and how much of its convex hull it
# fills. Circles, squares, stars and the like have these values by geometry, hearts and moons in the usual
# drawing.
OUTLINES: dict[str, tuple[float, float, float, float, float]] = {
    "circle": (0.0, 0.0, 0.0, 0.0, 0.98),
    "square": (0.0, 0.0, 0.075, 0.0, 1.0),
    "triangle": (0.01, 0.146, 0.0, 0.006, 0.96),
    "star": (0.0, 0.0, 0.0, 0.175, 0.60),
    "heart": (0.08, 0.102, 0.003, 0.028, 0.92),
    "moon": (0.265, 0.172, 0.06, 0.04, 0.60),
    "cross": (0.0, 0.0, 0.152, 0.0, 0.75),
}
HULL_WEIGHT = 0.3  # of the fullness beside the harmonics
FARTHEST = 0.085  # outlines farther than this from all of the above are "unknown"


@dataclass(frozen=True)
class Seen:
    """One object. `box` is (x0, y0, x1, y1) in pixels; `fit` is 0 for an exact outline, larger for a vague
    one."""

    shape: str
    colour: str
    box: tuple[float, float, float, float]
    fit: float

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Seeing:
    """Everything in a picture; objects in reading order of their centres (left to right)."""

    background: str
    objects: tuple[Seen, ...]


def see_shapes(image: Image.Image) -> Seeing:
    """The objects of a picture, each with shape ("unknown" when none fits), colour and bounding box."""
    try:
        from scipy import ndimage
    except ImportError:
        raise MissingExtra("scipy", "eval", "Judging shapes") from None

    scale = SIDE / min(image.size)
    if scale != 1:
        size = (max(SIDE, round(image.width * scale)), max(SIDE, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BILINEAR)
    rgb = np.asarray(image.convert("RGB"), dtype=np.float32)
    lab = to_lab(np.stack([ndimage.gaussian_filter(rgb[..., c], 0.8) for c in range(3)], axis=-1))
    background = _border_colour(lab)
    distance = np.sqrt(((lab - background) ** 2).sum(-1))
    # A pixel belongs to an object when it is nearer to the strongest colour around it than to the background.
    mask = (distance > CONTRAST) & (distance > 0.5 * ndimage.maximum_filter(distance, EDGE))
    objects = []
    for top, left, patch in _patches(mask, lab, ndimage):
        place = np.s_[top : top + patch.shape[0], left : left + patch.shape[1]]
        if patch.sum() < LEAST_AREA or np.median(distance[place][patch]) < PATCH_CONTRAST:
            continue
        core = ndimage.binary_erosion(patch, iterations=2)
        colour = np.median(lab[place][core if core.sum() >= 20 else patch], axis=0)
        rows, columns = np.flatnonzero(patch.any(1)), np.flatnonzero(patch.any(0))
        box = (
            float(left + columns[0]) / scale,
            float(top + rows[0]) / scale,
            float(left + columns[-1] + 1) / scale,
            float(top + rows[-1] + 1) / scale,
        )
        shape, fit = name_outline(patch)
        objects.append(Seen(shape, nearest_colour(colour, COLOURS), box, fit))
    objects.sort(key=lambda seen: seen.centre)
    return Seeing(nearest_colour(background, BACKGROUNDS), tuple(objects))


def to_lab(rgb: Array) -> Array:
    """sRGB (...,3) in 0..255 -> CIELAB under D65 [CIE 15:2004]; distances are about as the eye sees them."""
    c = np.asarray(rgb, dtype=np.float32) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4).astype(np.float32)
    matrix = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ],
        dtype=np.float32,
    )
    white = matrix.sum(1)
    xyz = linear @ matrix.T / white
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def nearest_colour(lab: Array, names: dict[str, tuple[int, int, int]]) -> str:
    """The name whose colour is nearest to a CIELAB triple."""
    known = to_lab(np.array(list(names.values())))
    return list(names)[int(((known - lab) ** 2).sum(-1).argmin())]


def _border_colour(lab: Array) -> Array:
    """The colour of most of the picture's rim: the median of the rim pixels near its median."""
    rim = np.concatenate(
        [
            lab[:6].reshape(-1, 3),
            lab[-6:].reshape(-1, 3),
            lab[:, :6].reshape(-1, 3),
            lab[:, -6:].reshape(-1, 3),
        ]
    )
    middle = np.median(rim, axis=0)
    near = rim[((rim - middle) ** 2).sum(-1) < 20**2]
    return np.asarray(np.median(near, axis=0) if len(near) else middle)


def _patches(mask: Array, lab: Array, ndimage: Any) -> Iterator[tuple[int, int, Array]]:
    """Connected parts of the mask, each as (top, left, the part cut out).

    A part with two well separated colours is cut between them.
    """
    labels, _ = ndimage.label(mask)
    known = to_lab(np.array(list(COLOURS.values())))
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        place = (rows, columns)
        patch = labels[place] == number
        if patch.sum() < LEAST_AREA:
            continue
        core = ndimage.binary_erosion(patch, iterations=3)
        names = ((lab[place][core][:, None] - known) ** 2).sum(-1).argmin(-1)
        colours = [n for n, times in Counter(names.tolist()).items() if times >= LEAST_SHARE * len(names)]
        if len(names) < 2 * LEAST_AREA or len(colours) < 2:
            yield rows.start, columns.start, patch
            continue
        seeds = np.zeros(patch.shape, dtype=np.int32)
        for index, name in enumerate(colours, start=1):
            seeds[core] = np.where(names == name, index, seeds[core])
        at_row, at_column = ndimage.distance_transform_edt(seeds == 0, return_indices=True)[1]
        nearest = seeds[at_row, at_column]
        for index in range(1, len(colours) + 1):
            yield rows.start, columns.start, patch & (nearest == index)


def name_outline(mask: Array) -> tuple[str, float]:
    """The shape of a filled region (H,W) of booleans, and how far its outline is from the ideal one."""
    from scipy import ndimage

    mask = np.pad(mask, 1)
    filled = ndimage.binary_fill_holes(mask)
    hole = 1 - mask.sum() / filled.sum()
    measures = measure_outline(filled, ndimage)
    weights = np.array([1, 1, 1, 1, HULL_WEIGHT])
    far = {
        name: float(np.sqrt((((measures - np.array(ideal)) * weights) ** 2).sum()))
        for name, ideal in OUTLINES.items()
    }
    best = min(far, key=lambda name: far[name])
    if far[best] > FARTHEST:
        return "unknown", far[best]
    if hole > HOLE:  # a ring is a circle around a hole; anything else around one is none of the shapes
        return ("ring" if best == "circle" else "unknown"), far[best]
    return best, far[best]


def measure_outline(filled: Array, ndimage: Any) -> Array:
    """Harmonics 2 to 5 of the outermost radius along RAYS directions over its mean, and area over hull
    area."""
    from scipy.spatial import ConvexHull

    area = filled.sum()
    edge = filled & ~ndimage.binary_erosion(filled)
    y, x = np.nonzero(edge)
    corners = np.concatenate([np.stack([x + dx, y + dy], axis=1) for dx in (0, 1) for dy in (0, 1)])
    hull = ConvexHull(corners).volume  # in two dimensions scipy's "volume" is the area
    centre_y, centre_x = ndimage.center_of_mass(filled)
    radius = np.hypot(x - centre_x, y - centre_y)
    ray = ((np.arctan2(y - centre_y, x - centre_x) / (2 * np.pi) + 0.5) * RAYS).astype(int) % RAYS
    profile = np.zeros(RAYS)
    np.maximum.at(profile, ray, radius)
    gaps = profile == 0
    if gaps.any():
        at = np.arange(RAYS)
        profile[gaps] = np.interp(at[gaps], at[~gaps], profile[~gaps], period=RAYS)
    harmonics = np.abs(np.fft.rfft(profile))[2:6] / profile.sum()
    return np.array([*harmonics, min(1.0, area / hull)])


@dataclass(frozen=True)
class ShapesVerdict:
    """How a picture agrees with what was asked for."""

    right: bool  # exactly the objects asked for, and their relations
    objects: bool  # exactly the objects asked for
    colours: bool  # the colours alone, each as often as asked for
    shapes: bool  # the shapes alone
    count: bool
    relations: bool | None  # None when none was asked for
    background: bool | None  # None when none was asked for
    seen: Seeing


def judge_shapes(
    image: Image.Image,
    objects: Sequence[dict[str, Any]],
    relations: Sequence[dict[str, Any]],
    background: str | None = None,
) -> ShapesVerdict:
    """Compare a picture with what was asked for; `objects` and `relations` as in the shapes' JSON."""
    seeing = see_shapes(image)
    seen = seeing.objects
    same = Counter((s.colour, s.shape) for s in seen) == Counter((o["colour"], o["shape"]) for o in objects)
    in_order = None
    if relations:
        in_order = same and all(_holds(relation, objects, seen) for relation in relations)
    return ShapesVerdict(
        right=same and in_order is not False,
        objects=same,
        colours=Counter(s.colour for s in seen) == Counter(o["colour"] for o in objects),
        shapes=Counter(s.shape for s in seen) == Counter(o["shape"] for o in objects),
        count=len(seen) == len(objects),
        relations=in_order,
        background=None if background is None else seeing.background == background,
        seen=seeing,
    )


def _holds(relation: dict[str, Any], objects: Sequence[dict[str, Any]], seen: Sequence[Seen]) -> bool:
    """Whether objects that look like subject and object stand in the relation (alike objects in any
    order)."""
    axis = 0 if relation["relation"] == "left of" else 1

    def places(index: int) -> list[tuple[float, float]]:
        look = objects[index]["colour"], objects[index]["shape"]
        alike = [s.centre for s in seen if (s.colour, s.shape) == look]
        rank = sum((o["colour"], o["shape"]) == look for o in objects[:index])
        return sorted(alike, key=lambda centre: centre[axis])[rank : rank + 1]

    first, second = places(relation["subject"]), places(relation["object"])
    if not first or not second:
        return False
    (ax, ay), (bx, by) = first[0], second[0]
    along, across = (bx - ax, by - ay) if axis == 0 else (by - ay, bx - ax)
    return along > 0 and along > abs(across)
