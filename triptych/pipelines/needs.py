"""How much memory each stage of a generation needs, found out before anything is loaded.

Weights are counted exactly, from the headers of their files. Working memory is estimated from the widths of
the networks: on every level a trunk holds a map, its convolution's, the inside of a perceptron, which is four
times as wide and made for one sample at a time, and beside them the stored outputs of the levels. What a
memory-mapped file takes is not counted: the system takes its pages back whenever it needs them.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from triptych.checkpoints.headers import Header
from triptych.models.scratch import LIMIT, SPAN_BYTES
from triptych.models.stage_a import StageAConfig
from triptych.models.trunk import TrunkConfig
from triptych.pipelines.placement import Weights
from triptych.pipelines.tiles import Tile, widened

GUIDED = 2  # both branches of guidance run as one batch
LIBRARIES = 48 * 2**20  # what matrix and convolution libraries keep for themselves once they have run
DECODE_LIBRARIES = 10 * 2**20  # the same where only Stage A runs, on a CPU
TILE_SIDES = (1024, 512, 256, 128, 64, 32)  # latents; Stage A's tiles are tried in this order
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # float16 is rescaled first, which makes a copy

_BLOCK = re.compile(r"((?:down|up)_blocks\.\d+\.\d+|\blayers\.\d+)\.")


@dataclass(frozen=True)
class Need:
    """What one stage asks for: weights (counted) and working memory (estimated)."""

    stage: str
    numbers: int  # parameters and buffers
    stored: int  # bytes of the weights as the file holds them
    block: int  # numbers of the largest block, outside of which `rest` are always resident
    rest: int
    working: int  # bytes beside the weights
    item: int = 4  # bytes of a number that is computed with
    matrices: int = 0  # numbers that int8 rows can hold: matrices inside blocks
    mapped: bool = False  # computed with as the file has them, on a CPU: no copy is made
    joined: int = 0  # bytes of matrices that the file holds in pieces: joined in memory, wherever the rest is
    kept: int = LIMIT  # bytes of results that hold for all steps, if they are kept
    tiles: tuple[tuple[Tile, int], ...] = ()  # ways to work in less: a tile and its bytes, largest first

    def bytes(self, weights: Weights, tile: Tile | None = None) -> int:
        """Bytes on the device when the weights live so."""
        return self.held(weights) + dict(self.tiles).get(tile or (0, 0), self.working)

    def held(self, weights: Weights) -> int:
        """Bytes of weights: those that stay, and the room in which each block is wide in turn."""
        if self.mapped and weights in ("resident", "streamed"):
            return self.joined
        if weights == "resident":
            return self.numbers * self.item
        per_number = self.stored / max(1, self.numbers)
        blocks = self.numbers - self.rest
        inside = {
            "narrow": blocks * per_number,
            "int8": self.matrices + (blocks - self.matrices) * per_number,
            "streamed": self.joined,
        }
        wide = 0 if self.mapped and weights == "narrow" else self.block
        return (self.rest + wide) * self.item + round(inside[weights])


def measure(
    stage: str,
    shapes: Mapping[str, tuple[int, ...]],
    header: Header,
    working: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tiles: tuple[tuple[Tile, int], ...] = (),
) -> Need:
    """The need of a stage with tensors of these shapes, stored as the file of `header` stores numbers, that
    computes in `dtype`."""
    kept = [(entry.end - entry.start, math.prod(entry.shape)) for entry in header.entries.values()]
    per_number = sum(size for size, _ in kept) / max(1, sum(count for _, count in kept))
    stored_as = {entry.dtype for entry in header.entries.values() if entry.dtype[0] in "BF"}
    mapped = device == "cpu" and stored_as == {NAMES.get(dtype)}
    packed = [math.prod(shape) for name, shape in shapes.items() if "in_proj" in name]
    joined = 0 if any("in_proj" in name for name in header.entries) else round(sum(packed) * per_number)
    return need_of(stage, shapes, per_number, working, dtype.itemsize, mapped, joined, tiles)


def need_of(
    stage: str,
    shapes: Mapping[str, tuple[int, ...]],
    per_number: float,
    working: int,
    item: int = 4,
    mapped: bool = False,
    joined: int = 0,
    tiles: tuple[tuple[Tile, int], ...] = (),
) -> Need:
    """The need of a stage whose file holds `per_number` bytes for each number; see `Need`."""
    blocks: defaultdict[str, int] = defaultdict(int)
    numbers = matrices = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        numbers += count
        match = _BLOCK.search(name)
        if match and stage != "stage_a":  # whose blocks are in no list
            blocks[match[1]] += count
            matrices += count if len(shape) == 2 else 0
    inside = sum(blocks.values())
    largest = max(blocks.values(), default=0)
    stored = round(numbers * per_number)
    return Need(
        stage,
        numbers,
        stored,
        largest,
        numbers - inside,
        working,
        item,
        matrices,
        mapped,
        joined,
        tiles=tiles,
    )


def text_working(shapes: Mapping[str, tuple[int, ...]], item: int) -> int:
    """Bytes a text tower works in: a few windows of at most 77 tokens, in maps four times its width."""
    widest = max((shape[-1] for shape in shapes.values() if shape), default=0)
    return 8 * 77 * 4 * widest * item


def trunk_working(config: TrunkConfig, height: int, width: int, pictures: int, item: int) -> int:
    """Bytes a trunk works in, for latents of `height` x `width` and guidance on."""
    rows, columns = height // config.patch, width // config.patch
    widest = stored = 0
    for level, channels in enumerate(config.widths):
        shrink = 2**level if config.patch > 1 else 1
        positions = (rows // shrink) * (columns // shrink)
        numbers = GUIDED * pictures * positions * channels
        stored += numbers
        # The map, its convolution and one copy; one sample's wide inside.
        widest = max(widest, 3 * numbers + 4 * positions * channels)
    return (stored + widest) * item + spans_of_threads() + LIBRARIES


def trunk_kept(config: TrunkConfig, height: int, width: int, pictures: int, tokens: int, item: int) -> int:
    """Bytes of what a trunk works out once for all steps: keys and values of `tokens`, mapped inputs."""
    branches = GUIDED * pictures
    attentions = 0
    for level, channels in enumerate(config.widths):
        up = config.up_blocks[len(config.widths) - 1 - level]
        attentions += config.patterns[level].count("A") * (config.down_blocks[level] + up) * channels
    inputs = config.widths[0] * (height // config.patch) * (width // config.patch)
    return branches * (2 * tokens * attentions + tokens * config.cond_width + inputs) * item


def decode_working(config: StageAConfig, height: int, width: int, device: str = "cpu") -> int:
    """Bytes Stage A works in to decode `height` x `width` pixels, in float32, the finished pixels included.

    The fullest moment is the last doubling: the inner map and the outer one. Accelerators are counted with
    copies of both, in the layout that the convolution computes in.
    """
    factor = 2**config.levels
    inner = (height // factor) * (width // factor) * config.width
    outer = inner * 2 if config.levels > 1 else 0
    if device != "cpu":
        return (2 * inner + 2 * outer + 4 * height * width * 3) * 4 + LIBRARIES
    return (inner + outer + height * width * 3) * 4 + spans_of_threads() + DECODE_LIBRARIES


def decode_tiles(
    config: StageAConfig, height: int, width: int, device: str = "cpu"
) -> tuple[tuple[Tile, int], ...]:
    """Tiles for the decode of `height` x `width` pixels, each with its bytes, largest first."""
    factor = 2**config.levels
    rows, columns = height // factor, width // factor
    found: dict[Tile, int] = {}
    for side in TILE_SIDES:
        tile = (min(side, rows), min(side, columns))
        if tile != (rows, columns):
            around = widened(config, tile, rows, columns)
            working = decode_working(config, factor * around[0], factor * around[1], device)
            found[tile] = working + 2 * height * width * 3 * 4
    return tuple(found.items())


def spans_of_threads() -> int:
    """Bytes of the spans that fused blocks work through, a few at a time."""
    return 4 * SPAN_BYTES * torch.get_num_threads()
