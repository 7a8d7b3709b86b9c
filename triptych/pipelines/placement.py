"""Where and how precisely each block computes, and where its weights live: the one seam for memory.

Weights of a network live in one of four places:

    resident   on the device, in the precision they compute in
    narrow     on the device, as the file stores them (bfloat16, say); each block is widened while it runs
    int8       on the device, matrices as int8 rows with a scale each (see `int8.py`), widened likewise
    streamed   in the memory-mapped file; each block is brought to the device and widened while it runs

A block is a child of a list of blocks (`nn.ModuleList`): the unit in which the trunk of Stages B and C and
the layers of a text tower run. Everything outside such lists is small and always resident. Widening from
bfloat16 or float16 to float32 is exact, so all places but int8 give the same numbers. int8 rows are widened
here rather than by torchao, whose tensors replace linear layers by subclasses: blocks that work in place and
other devices than its own would lose their way, for the same memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from triptych.checkpoints.int8 import narrow_matrix
from triptych.errors import RequestError
from triptych.pipelines.heap import keep_heap_small

Weights = Literal["resident", "narrow", "int8", "streamed"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE_SIDE = 192  # a matmul of this side takes 0.2 ms in float32, and 10 ms where bfloat16 is emulated
PRODUCT_SIDE = 512  # of a matmul as long as a network's own, for which units of a processor are made
PROBE_RUNS = 6  # the first one also pays for starting the library
LINE = 32  # numbers: one cache line, or two
PROBE_GAIN = 1.3  # how much faster bfloat16 must be before its rounding is worth it


@dataclass(frozen=True)
class Placement:
    """Device and precision of the computation, and where the weights live."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    weights: Weights = "resident"


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes the first of CUDA, MPS, CPU that is there.

    Raises RequestError naming the devices of this machine when the named one is missing.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{index}" for index in range(1, torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(available[0])
    if name.replace("cuda:0", "cuda") not in available:
        raise RequestError(f'There is no device "{name}" here; this machine has {", ".join(available)}.')
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision called `name`; "auto" takes bfloat16 where a short trial shows that it is faster.

    Many CPUs emulate bfloat16 at a small fraction of float32's speed, which no feature flag tells
    reliably; and float16, where it is faster at all, has no room for a residual stream that grows.
    """
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if _bfloat16_gain(device.type) > PROBE_GAIN else torch.float32


def bfloat16_gain(device: torch.device) -> float:
    """How many times faster than float32 the device multiplies matrices of a network's size in bfloat16.

    Tried for some milliseconds, and where the gain of small ones is none, with small ones alone: emulated
    products take a second. 0 where bfloat16 does not run.
    """
    small = _bfloat16_gain(device.type)
    return small if small <= PROBE_GAIN else _measure_gain(device.type, PRODUCT_SIDE)


@lru_cache(maxsize=8)
def _bfloat16_gain(device_type: str) -> float:
    return _measure_gain(device_type, PROBE_SIDE)


def _measure_gain(device_type: str, side: int) -> float:
    """How many times faster than float32 a bfloat16 matmul of this side runs; 0 where it does not run.

    On a CPU one thread is measured: several wait for each other, and on a busy machine that wait can make
    float32, the one that uses them all, look slower than an emulation that does not.
    """
    threads = torch.get_num_threads()
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    try:
        if device_type == "cpu":
            torch.set_num_threads(1)
        for _ in range(PROBE_RUNS):  # in turn, so that a pause of the machine hits both
            for dtype in best:
                best[dtype] = min(best[dtype], _matmul_seconds(dtype, device_type, side))
    except (RuntimeError, TypeError):
        return 0.0
    finally:
        torch.set_num_threads(threads)
    return best[torch.float32] / best[torch.bfloat16]


def _matmul_seconds(dtype: torch.dtype, device_type: str, side: int) -> float:
    side = side if device_type == "cpu" else 8 * side
    matrix = torch.ones(side, side, dtype=dtype, device=device_type)
    start = time.perf_counter()
    total = (matrix @ matrix)[0, 0].item()  # reading a number waits for an accelerator
    seconds = time.perf_counter() - start
    if total != side:
        raise RuntimeError(f"{dtype} matmul is wrong on {device_type}")
    return seconds


def place(module: nn.Module, placement: Placement) -> nn.Module:
    """Put a network whose weights are mapped from a file where `placement` says, and return it.

    The network is switched to eval mode and its parameters stop asking for gradients. Resident weights
    that the file stores in the right precision stay mapped on a CPU: nothing is copied.
    """
    module.eval().requires_grad_(False)
    if placement.weights == "resident":
        return _to_memory(module, placement)
    keep_heap_small(placement.device)
    blocks = list(blocks_of(module))
    inside = {id(tensor) for block in blocks for tensor in _tensors_of(block)}
    for name, owner, tensor in _slots(module):
        if id(tensor) not in inside:
            _fill(owner, name, _moved(tensor, placement.device, placement.dtype))
    wide = _Wide(placement)
    for block in blocks:
        scales: dict[int, Tensor] = {}
        for name, owner, tensor in list(_slots(block)) if placement.weights != "streamed" else ():
            if placement.weights == "int8" and tensor.ndim == 2 and tensor.is_floating_point():
                kept, scale = narrow_matrix(tensor)
                kept = nn.Parameter(kept.to(placement.device), requires_grad=False)
                scales[id(kept)] = scale.to(placement.device)
            else:
                kept = tensor.to(placement.device, copy=True)
            _fill(owner, name, kept)
        visit = _Visit(block, placement, scales, wide)
        block.register_forward_pre_hook(visit.enter)
        block.register_forward_hook(visit.leave, always_call=True)
    return module


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks: children of a ModuleList that are no lists themselves."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            for block in child:
                if isinstance(block, nn.ModuleList):
                    yield from blocks_of(nn.ModuleList([block]))
                else:
                    yield block
        else:
            yield from blocks_of(child)


class _Wide:
    """Memory for the wide weights of one block, which the blocks of a network use in turn.

    Fresh memory for each would cost the system's work for its pages at every step, and holes between what
    is freed and what stays.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.most = 0
        self._memory: Tensor | None = None

    def make_room(self, tensors: Iterable[Tensor]) -> None:
        self.most = max(self.most, sum(_padded(tensor) for tensor in tensors))

    def take(self, start: int, like: Tensor) -> Tensor:
        """Uninitialised memory from number `start` on, in the shape of `like`."""
        if self._memory is None:
            place = self.placement
            self._memory = torch.empty(self.most, dtype=place.dtype, device=place.device)
        return self._memory[start : start + like.numel()].view(like.shape)


def _padded(tensor: Tensor) -> int:
    """Numbers a tensor takes up in `_Wide`, where each begins at the start of a cache line."""
    return -(-tensor.numel() // LINE) * LINE


class _Visit:
    """Brings a block's weights to where they compute when it runs and puts the stored ones back after."""

    def __init__(
        self, block: nn.Module, placement: Placement, scales: dict[int, Tensor], wide: _Wide
    ) -> None:
        self.slots = list(_slots(block))
        self.placement = placement
        self.scales = scales  # of int8 rows, by the identity of their matrix
        self.wide = wide
        wide.make_room({id(stored): stored for _, _, stored in self.slots if self._changes(stored)}.values())

    def _changes(self, stored: Tensor) -> bool:
        if not stored.is_floating_point():
            return id(stored) in self.scales
        return (stored.dtype, stored.device) != (self.placement.dtype, self.placement.device)

    def enter(self, block: nn.Module, inputs: Any) -> None:
        moved: dict[int, Tensor] = {}  # a weight that a block uses twice is moved once
        start = 0
        for name, owner, stored in self.slots:
            if id(stored) not in moved:
                moved[id(stored)] = self._widened(stored, start)
                start += _padded(stored) if self._changes(stored) else 0
            _fill(owner, name, moved[id(stored)])

    def _widened(self, stored: Tensor, start: int) -> Tensor:
        if not self._changes(stored):
            return _moved(stored, self.placement.device, self.placement.dtype)
        target = self.wide.take(start, stored).copy_(stored)
        scale = self.scales.get(id(stored))
        return target if scale is None else target.mul_(scale[:, None])  # multiplied in float32

    def leave(self, block: nn.Module, inputs: Any, output: Any) -> None:
        for name, owner, stored in self.slots:
            _fill(owner, name, stored)


def _to_memory(module: nn.Module, placement: Placement) -> nn.Module:
    for name, owner, tensor in _slots(module):
        _fill(owner, name, _moved(tensor, placement.device, placement.dtype))
    return module


def _slots(module: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, module that owns it, tensor) for every parameter and buffer below `module`."""
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield name, owner, tensor


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    for _, _, tensor in _slots(module):
        yield tensor


def _fill(owner: nn.Module, name: str, tensor: Tensor) -> None:
    if name in owner._parameters:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        owner._parameters[name] = tensor
    else:
        owner._buffers[name] = tensor


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """On the device, floating numbers in `dtype`; whole numbers keep their type."""
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
