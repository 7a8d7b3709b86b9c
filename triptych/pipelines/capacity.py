"""How much memory a generation needs, how much there is, and what to do about it, before anything is loaded.

Weights are counted exactly, from the headers of their files. Working memory is estimated from the widths of
the networks: the widest moment of a trunk is the inside of a convolution block on its outermost level,
where a map of 4 x width channels stands a few times beside the stored outputs of the levels.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from triptych.checkpoints.headers import Header
from triptych.errors import CapacityError
from triptych.models.stage_a import StageAConfig
from triptych.models.trunk import TrunkConfig
from triptych.pipelines.placement import Weights

HEADROOM = 0.9  # of what is free; allocators and libraries take the rest
MAPS_INSIDE = 3  # copies of the 4 x width map alive inside a convolution block
GUIDED = 2  # both branches of guidance run as one batch

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

    def bytes(self, weights: Weights, item: int) -> int:
        """Bytes on the device when the weights live so and compute in `item` bytes a number."""
        if weights == "resident":
            return self.numbers * item + self.working
        wide = (self.rest + self.block) * item
        return wide + self.working + (self.stored if weights == "narrow" else 0)


@dataclass(frozen=True)
class Plan:
    """Where each stage's weights live, and whether stages stay loaded after their turn."""

    weights: dict[str, Weights]
    keep: bool


def measure(stage: str, shapes: Mapping[str, tuple[int, ...]], header: Header, working: int) -> Need:
    """The need of a stage with tensors of these shapes, stored as the file of `header` stores numbers."""
    kept = [(entry.end - entry.start, math.prod(entry.shape)) for entry in header.entries.values()]
    per_number = sum(size for size, _ in kept) / max(1, sum(count for _, count in kept))
    return need_of(stage, shapes, per_number, working)


def need_of(stage: str, shapes: Mapping[str, tuple[int, ...]], per_number: float, working: int) -> Need:
    """The need of a stage whose file holds `per_number` bytes for each number."""
    blocks: defaultdict[str, int] = defaultdict(int)
    numbers = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        numbers += count
        match = _BLOCK.search(name)
        if match:
            blocks[match[1]] += count
    inside = sum(blocks.values())
    largest = max(blocks.values(), default=0)
    return Need(stage, numbers, round(numbers * per_number), largest, numbers - inside, working)


def text_working(shapes: Mapping[str, tuple[int, ...]], item: int) -> int:
    """Bytes a text tower works in: a few windows of at most 77 tokens, in maps four times its width."""
    widest = max(shape[-1] for shape in shapes.values() if shape)
    return 8 * 77 * 4 * widest * item


def trunk_working(config: TrunkConfig, height: int, width: int, pictures: int, item: int) -> int:
    """Bytes a trunk works in, for latents of `height` x `width` and guidance on."""
    positions = GUIDED * pictures * (height // config.patch) * (width // config.patch)
    widest = config.widths[0] * (4 * MAPS_INSIDE + 4)
    deep = 0  # a level's map is at most as large as the outermost one
    for level, channels in enumerate(config.widths):
        deep += channels // (4**level if config.patch > 1 else 1)
    return positions * (widest + deep) * item


def decode_working(config: StageAConfig, height: int, width: int) -> int:
    """Bytes Stage A works in to decode one picture of `height` x `width` pixels, in float32."""
    outermost = config.width // 2 ** (config.levels - 1)
    return (height // 2) * (width // 2) * outermost * (4 * MAPS_INSIDE + 4) * 4


def plan(needs: Iterable[Need], item: int, free: int, low_memory: bool = False) -> Plan | None:
    """The fastest plan that fits `free` bytes, None when there is none.

    Everything resident and kept, if it fits together; else each stage alone, in the first place that fits.
    """
    needs = list(needs)
    room = int(free * HEADROOM)
    together = Plan({need.stage: "resident" for need in needs}, keep=True)
    if not low_memory and peak(needs, together, item) <= room:
        return together
    places: tuple[Weights, ...] = ("streamed",) if low_memory else ("resident", "narrow", "streamed")
    chosen: dict[str, Weights] = {}
    for need in needs:
        fitting = [weights for weights in places if need.bytes(weights, item) <= room]
        if not fitting:
            return None
        chosen[need.stage] = fitting[0]
    return Plan(chosen, keep=False)


def peak(needs: Iterable[Need], chosen: Plan, item: int) -> int:
    """Bytes in use at the fullest moment of a plan."""
    needs = list(needs)
    if chosen.keep:
        return sum(need.numbers * item for need in needs) + max(need.working for need in needs)
    return max(need.bytes(chosen.weights[need.stage], item) for need in needs)


def refusal(needs: Iterable[Need], item: int, free: int, device: str, advice: str) -> CapacityError:
    """The error for needs that no plan meets: the largest stage, what is free, what would fit."""
    worst = max(needs, key=lambda need: need.bytes("streamed", item))
    smallest = worst.bytes("streamed", item)
    return CapacityError(
        f"Not enough memory: {worst.stage} needs about {gigabytes(smallest)} even with its weights left on "
        f"disk, and {gigabytes(free)} are free on {device}. {advice}"
    )


def gigabytes(count: int) -> str:
    """Bytes for people: "3.4 GB", "120 MB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count, 0) / 1e6:.0f} MB"


def free_memory(device: torch.device) -> int:
    """Bytes that can still be used on a device: on a CPU the smallest of the system's, the control group's
    and the process's own limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    limits = [_system_memory(), _group_memory(), _process_memory()]
    return min(limit for limit in limits if limit is not None)


def _system_memory() -> int:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**62  # unknown: let the allocator decide


def _group_memory() -> int | None:
    """What a container's control group leaves; file pages it holds are given back on demand."""
    version2, version1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
    names = (
        (version2, "memory.max", "memory.current", "inactive_file"),
        (version1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder, limit_name, used_name, key in names:
        with contextlib.suppress(OSError, ValueError):
            limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
            pages = re.search(rf"^{key} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            return limit - used + (int(pages[1]) if pages else 0)
    return None


def _process_memory() -> int | None:
    """What `ulimit -v` leaves of the address space; None where there is no such limit."""
    with contextlib.suppress(OSError, ValueError):
        limits = Path("/proc/self/limits").read_text()
        found = re.search(r"^Max address space\s+(\d+)", limits, re.MULTILINE)
        if found:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            return int(found[1]) - pages * os.sysconf("SC_PAGE_SIZE")
    return None
