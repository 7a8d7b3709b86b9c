"""Blocks that keep little for the backward pass: recomputed there, their weights wide only while they run.

A block is what `placement.blocks_of` says. Its forward pass is run anew in the backward pass, so that between
the two only its input is kept; and weights stored narrow (bfloat16, or int8 rows with a scale) are widened
each time it runs, forward or backward, one block at a time. Biases, gains and all that is outside of blocks,
which is small, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triptych.checkpoints.int8 import LARGEST
from triptych.pipelines.heap import keep_heap_small
from triptych.pipelines.placement import blocks_of

if TYPE_CHECKING:
    from triptych.training.config import RunSettings

Storage = Literal["float32", "bfloat16", "int8"]


def save_memory(settings: RunSettings, trunks: Iterable[nn.Module]) -> None:
    """Do to networks what the settings of a run ask for."""
    for trunk in trunks:
        if settings.weights != "float32":
            store_blocks(trunk, settings.weights)
        if settings.checkpointing:
            checkpoint_blocks(trunk)


def build_network(
    build: Callable[[Any], nn.Module], config: Any, settings: RunSettings, device: torch.device
) -> nn.Module:
    """A network to train; its values follow where `init` names them, so that of bfloat16 weights float32
    copies never exist."""
    if settings.init is None or settings.weights == "float32":
        return build(config).to(device)
    with torch.device("meta"):
        network = build(config)
    for block in blocks_of(network):
        for parameter in block.parameters():
            if is_matrix(parameter):
                parameter.data = parameter.data.to(getattr(torch, settings.weights))
    return network.to_empty(device=device)


def checkpoint_blocks(network: nn.Module) -> None:
    """Recompute every block in the backward pass: the same gradients, bit for bit, for a third more time."""
    for device in {parameter.device for parameter in network.parameters()}:
        keep_heap_small(device)
    for block in blocks_of(network):
        block.forward = partial(_recomputed, block.forward)


def store_base(network: nn.Module, storage: Storage) -> None:
    """Hold a frozen network in `storage` below adapters, which are float32, as is all outside of blocks."""
    inside = {id(p) for block in blocks_of(network) for p in block.parameters()}
    for parameter in network.parameters():
        if parameter.requires_grad or id(parameter) not in inside:
            parameter.data = parameter.data.float()
    store_blocks(network, storage, frozen_only=True)


def store_blocks(network: nn.Module, storage: Storage, frozen_only: bool = False) -> None:
    """Hold the matrices of all blocks in `storage` and widen them while their block runs.

    Gradients of bfloat16 weights are bfloat16; int8 is for frozen weights. Call it before
    `checkpoint_blocks`, without which the widened weights stay for the backward pass.
    """
    for block in blocks_of(network):
        scales: dict[int, Tensor] = {}
        for parameter in block.parameters():
            if is_matrix(parameter) and not (frozen_only and parameter.requires_grad):
                narrow(parameter, storage, scales)
        if storage != "float32":
            block.forward = partial(_widened, block, scales, block.forward)


def is_matrix(parameter: Tensor) -> bool:
    """Whether more than one side is longer than 1: no bias, and no gain of a response norm (1,1,1,c)."""
    return sum(side > 1 for side in parameter.shape) > 1


def narrow(parameter: nn.Parameter, storage: Storage, scales: dict[int, Tensor]) -> None:
    """Store one matrix narrow, in place; the scales of int8 rows go to `scales`, by the parameter's id."""
    if storage != "int8":
        parameter.data = parameter.data.to(getattr(torch, storage))
        return
    rows = parameter.data.flatten(1).float()
    scale = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    scales[id(parameter)] = scale.view(-1, *[1] * (parameter.ndim - 1))
    parameter.data = (rows / scale[:, None]).round_().to(torch.int8).view(parameter.shape)


def _recomputed(forward: Callable[..., Tensor], *inputs: Any, **named: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, **named)


def _widened(
    block: nn.Module, scales: dict[int, Tensor], forward: Callable[..., Tensor], *inputs: Any, **named: Any
) -> Tensor:
    with widened(block, scales, inputs[0].device.type):
        return forward(*inputs, **named)


@contextmanager
def widened(block: nn.Module, scales: dict[int, Tensor], device: str) -> Iterator[None]:
    """Wide weights in a block while it runs: float32, or under autocast what its matrix products take.

    Widening is part of the graph, so gradients arrive at the stored weights.
    """
    mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if mixed else torch.float32
    stored: list[tuple[nn.Module, str, nn.Parameter]] = []
    wide: dict[int, Tensor] = {}
    for owner in block.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or parameter.dtype == torch.float32:
                continue
            if id(parameter) not in wide:
                scale = scales.get(id(parameter))
                value = parameter.to(dtype)
                wide[id(parameter)] = value if scale is None else value.mul_(scale.to(dtype))
            stored.append((owner, name, parameter))
    try:
        for owner, name, parameter in stored:
            owner._parameters[name] = wide[id(parameter)]  # type: ignore[assignment]
        wide.clear()
        yield
    finally:
        for owner, name, parameter in stored:
            owner._parameters[name] = parameter
