"""What a training step of Stage B or C keeps in memory, found by running the network without numbers.

The network is built on the meta device and run once; what autograd would keep is counted, block by block. The
backward pass is then played through: maps go as gradients come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triptych.pipelines.placement import blocks_of
from triptych.training.checkpointing import is_matrix

WIDE = 4  # bytes of a float32
MAPS_IN_BACKWARD = 2.0  # gradients of the widest map alive at once, found by measuring


@dataclass
class BlockCost:
    """Bytes of one run of a block at its batch size, and numbers of its weights."""

    entry: int = 0  # its inputs that no earlier block has kept
    kept: int = 0  # what autograd keeps inside
    widest: int = 0  # its largest map
    learned: int = 0  # numbers that get gradients
    matrices: int = 0  # numbers of its matrices, which are widened while it runs if stored narrow
    largest: int = 0  # numbers of the largest weight that gets a gradient


def trace(network: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[BlockCost], BlockCost]:
    """The costs of all blocks in the order they run, and of what is outside of them.

    `network` and `inputs` are on the meta device; parameters that learn require gradients.
    """
    counter = _Counter(network)
    outside, runs = counter.current, counter.runs
    handles = []
    for block in blocks_of(network):
        handles.append(block.register_forward_pre_hook(counter.enter))
        handles.append(block.register_forward_hook(counter.leave))
    try:
        with torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda kept: kept):
            network.train()(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    inside = {id(p) for block in blocks_of(network) for p in block.parameters()}
    _count_weights(outside, (p for p in network.parameters() if id(p) not in inside))
    return runs, outside


def trace_whole(network: nn.Module, run: Callable[[], object]) -> BlockCost:
    """The cost of `run`, a forward pass of modules of `network`, as if it were one block."""
    counter = _Counter(network)
    with torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda kept: kept):
        run()
    _count_weights(counter.outside, network.parameters())
    return counter.outside


class _Counter:
    """Adds up what autograd keeps, each storage once, under the block that runs."""

    def __init__(self, network: nn.Module) -> None:
        self.seen: dict[int, Tensor] = {_storage(p): p for p in network.parameters()}
        self.entries: dict[int, Tensor] = {}
        self.current = self.outside = BlockCost()
        self.runs: list[BlockCost] = []

    def enter(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.current = BlockCost()
        self.runs.append(self.current)
        for tensor in inputs:
            if isinstance(tensor, Tensor) and _storage(tensor) not in self.entries:
                self.entries[_storage(tensor)] = tensor  # held, so that no other gets its number
                self.current.entry += tensor.untyped_storage().nbytes()
        _count_weights(self.current, block.parameters())

    def leave(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self.current = self.outside

    def keep(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self.seen:
            self.seen[_storage(tensor)] = tensor
            size = tensor.untyped_storage().nbytes()
            self.current.kept += size
            self.current.widest = max(self.current.widest, size)
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _count_weights(cost: BlockCost, parameters: Iterable[nn.Parameter]) -> None:
    for p in parameters:
        if p.requires_grad:
            cost.learned += p.numel()
            cost.largest = max(cost.largest, p.numel())
        if is_matrix(p):
            cost.matrices += p.numel()


def backward_peak(
    runs: list[BlockCost], outside: BlockCost, recomputed: bool, narrow: bool, held: float, update: int
) -> tuple[int, int]:
    """The fullest moment of forward and backward: (bytes of maps and widened weights, bytes of gradients).

    narrow: weights are stored narrow. held: bytes a gradient takes until the update, 0 where it is used and
    freed at once. update: copies of the largest weight that such an update makes, float32.
    """
    best = (outside.kept, 0)
    waiting = sum(run.entry if recomputed else run.kept for run in runs)
    gradients = 0.0
    for run in reversed(runs):
        inside = run.kept if recomputed else 0
        working = MAPS_IN_BACKWARD * run.widest + WIDE * narrow * run.matrices
        fresh = WIDE * run.learned if narrow or not held else held * run.learned
        applied = 0 if held else WIDE * update * run.largest
        running = (int(outside.kept + waiting + inside + working), int(gradients + fresh))
        moving = (int(outside.kept + waiting), int(gradients + fresh + applied))  # its maps are gone by then
        best = max(best, running, moving, key=sum)
        waiting -= run.entry if recomputed else run.kept
        gradients += held * run.learned
    end = (outside.kept, int(gradients + held * outside.learned))
    return max(best, end, key=sum)
