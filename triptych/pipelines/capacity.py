"""Which plan fits the memory there is: where weights live, and in how large tiles pictures are decoded."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from triptych.errors import CapacityError
from triptych.models.scratch import LIMIT
from triptych.pipelines.needs import Need
from triptych.pipelines.placement import Weights
from triptych.pipelines.tiles import Tile

HEADROOM = 0.9  # of what is free; allocators and libraries take the rest
KEPT_SHARE = 16  # of the room, at most one part in so many goes to results kept between steps
TRUNKS = ("stage_c", "stage_b")


@dataclass(frozen=True)
class Plan:
    """Where each stage's weights live, and whether stages stay loaded after their turn."""

    weights: dict[str, Weights]
    keep: bool
    tile: Tile | None = None  # of Stage A; None decodes pictures whole
    kept_bytes: int = LIMIT  # of results kept between steps, at most

    @property
    def int8(self) -> bool:
        """Whether any weights are rounded."""
        return "int8" in self.weights.values()


def plan(
    needs: Iterable[Need],
    room: int,
    low_memory: bool = False,
    int8: bool | None = False,
    several: bool = False,
) -> Plan | None:
    """The fastest plan that fits `room` bytes, None when there is none.

    Everything resident and kept, if it fits together; else each stage alone, in the first place that fits.
    low_memory: all weights stay on disk. int8: True rounds the trunks' weights in any case, None only where
    they would have to be streamed otherwise, False never. several: batches follow each other, so Stage B
    stays while Stage A decodes.
    """
    needs = list(needs)
    kept = min(LIMIT, room // KEPT_SHARE)
    if low_memory:
        trunks = [need.bytes("streamed") + min(kept, need.kept) for need in needs if need.stage in TRUNKS]
        enough = min(room, max(least(needs), *trunks))  # larger tiles would only raise the peak
        fitting = (_fit(needs, enough, ("streamed",), ("streamed",), most, several) for most in (kept, 0))
        return next((found for found in fitting if found is not None), None)
    if int8:
        return _fit(needs, room, ("int8",), ("resident", "narrow", "streamed"), kept, several)
    together = Plan({need.stage: "resident" for need in needs}, keep=True, kept_bytes=kept)
    if peak(needs, together) <= room:
        return together
    exact: tuple[Weights, ...] = ("resident", "narrow")
    chosen = _fit(needs, room, exact, (*exact, "streamed"), kept, several)
    if chosen is None and int8 is None:
        chosen = _fit(needs, room, ("int8",), (*exact, "streamed"), kept, several)
    for most in (kept, 0):
        chosen = chosen or _fit(needs, room, (*exact, "streamed"), (*exact, "streamed"), most, several)
    return chosen


def _fit(
    needs: Sequence[Need],
    room: int,
    of_trunks: tuple[Weights, ...],
    of_others: tuple[Weights, ...],
    kept: int,
    several: bool,
) -> Plan | None:
    """Each stage alone in the first of the places that fits, Stage A in the largest tile that does."""
    chosen: dict[str, Weights] = {}
    tile: Tile | None = None
    beside = 0
    for need in needs:
        extra = min(kept, need.kept) if need.stage in TRUNKS else 0
        places = of_trunks if need.stage in TRUNKS else of_others
        fitting = [weights for weights in places if need.bytes(weights) + extra <= room]
        if not fitting and need.tiles:
            fitting = [*places[-1:]]
        if not fitting:
            return None
        chosen[need.stage] = fitting[0]
        if need.stage == "stage_b" and several:
            beside = need.held(fitting[0])
        if need.tiles or need.stage == "stage_a":
            sizes: list[Tile | None] = [None, *(tile for tile, _ in need.tiles)]
            smaller = [one for one in sizes if beside + need.bytes(fitting[0], one) <= room]
            if not smaller:
                return None
            tile = smaller[0]
    return Plan(chosen, keep=False, tile=tile, kept_bytes=kept)


def peak(needs: Iterable[Need], chosen: Plan, several: bool = False) -> int:
    """Bytes in use at the fullest moment of a plan."""
    needs = list(needs)
    moments = {}
    for need in needs:
        tile = chosen.tile if need.tiles else None
        extra = min(chosen.kept_bytes, need.kept) if need.stage in TRUNKS else 0
        moments[need.stage] = need.bytes(chosen.weights[need.stage], tile) + extra
    held = {need.stage: need.held(chosen.weights[need.stage]) for need in needs}
    if chosen.keep:
        return sum(held.values()) + max(moments[stage] - held[stage] for stage in moments)
    if several and "stage_b" in held and "stage_a" in moments:
        moments["stage_a"] += held["stage_b"]
    return max(moments.values())


def least(needs: Iterable[Need]) -> int:
    """Bytes below which there is no plan: weights on disk, the smallest tile, nothing kept between steps."""
    return max(
        min(need.bytes("streamed", tile) for tile in (None, *(tile for tile, _ in need.tiles)))
        for need in needs
    )


def refusal(needs: Iterable[Need], free: int, device: str, advice: str) -> CapacityError:
    """The error for needs that no plan meets: the largest stage, what is free, what would fit."""
    needs = list(needs)
    worst = max(needs, key=lambda need: least([need]))
    return CapacityError(
        f"Not enough memory: {worst.stage} needs at least {gigabytes(least(needs))}, even with its "
        f"weights left on disk, and {gigabytes(free)} can be used on {device}. {advice}"
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


def room_on(device: torch.device, limit: int | None = None) -> int:
    """Bytes that pictures may take: most of what is free, and no more than the process's `limit` leaves."""
    free = int(free_memory(device) * HEADROOM)
    if limit is None:
        return free
    return min(free, limit - (empty_process() if device.type == "cpu" else 0))


@lru_cache(maxsize=1)
def empty_process() -> int:
    """Private bytes that the process held when this was first asked, before any weights were there."""
    return private_memory()


def private_memory() -> int:
    """Bytes of this process that no file backs; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        found = re.search(r"^RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0


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
