"""AdamW whose two running averages take a byte a number each, in plain tensor operations for any device.

torchao's compiles every update, for which a CPU needs a C++ compiler at hand, widens a parameter and both
averages whole, and keeps them in tensors of its own class. Here they are plain tensors, which a checkpoint
holds as they are, and pieces of a parameter are widened in turn, as the plan counts on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # numbers that share a scale
SMALLEST = 4096  # parameters with fewer numbers keep float32 averages
CHUNK = 2**22  # numbers updated at once, a multiple of BLOCK: what is widened meanwhile stays small


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with block-wise 8-bit states [Dettmers 2022, "8-bit optimizers via block-wise quantization"].

    State of a large parameter: `step`, and `exp_avg`, `exp_avg_sq` as uint8 (blocks, 256) with a float32
    scale for each block; small parameters have float32 averages. The arithmetic is in float32.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Parameters without a gradient stay where they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)
        return loss

    def _move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(empty_state(p))
        state["step"] += 1
        values = p.detach().reshape(-1)  # a copy where the parameter is not contiguous
        gradient = grad.reshape(-1)
        for first in range(0, values.numel(), CHUNK):
            place = slice(first, min(first + CHUNK, values.numel()))
            move_chunk(values[place], gradient[place].float(), state, place, group)
        if values.data_ptr() != p.data_ptr():
            p.copy_(values.view(p.shape))


def empty_state(p: Tensor) -> dict[str, Tensor]:
    """Averages of zero."""
    step = torch.zeros((), dtype=torch.int64)
    if p.numel() < SMALLEST:
        zeros = torch.zeros(p.numel(), device=p.device)
        return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    state = {"step": step}
    blocks = -(-p.numel() // BLOCK)
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        zero = int(code_book(signed).eq(0).nonzero()[0])
        state[name] = torch.full((blocks, BLOCK), zero, dtype=torch.uint8, device=p.device)
        state[f"{name}_scale"] = torch.zeros(blocks, device=p.device)
    return state


def move_chunk(
    values: Tensor, grad: Tensor, state: dict[str, Tensor], place: slice, group: dict[str, Any]
) -> None:
    """AdamW [Loshchilov and Hutter 2019] on some numbers of a parameter, in place."""
    beta1, beta2 = group["betas"]
    step = float(state["step"])
    mean = read_state(state, "exp_avg", place).lerp_(grad, 1 - beta1)
    square = read_state(state, "exp_avg_sq", place).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    write_state(state, "exp_avg", place, mean)
    write_state(state, "exp_avg_sq", place, square)
    denominator = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
    values.mul_(1 - group["lr"] * group["weight_decay"])
    values.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))


def read_state(state: dict[str, Tensor], name: str, place: slice) -> Tensor:
    """An average at some numbers of a parameter, float32 (n,), not shared with the state."""
    if state[name].dtype != torch.uint8:
        return state[name][place].clone()
    rows = slice(place.start // BLOCK, -(-place.stop // BLOCK))
    book = code_book(name == "exp_avg").to(state[name].device)
    wide = book[state[name][rows].int()] * state[f"{name}_scale"][rows, None]
    return wide.flatten()[: place.stop - place.start]


def write_state(state: dict[str, Tensor], name: str, place: slice, values: Tensor) -> None:
    """Store an average at some numbers of a parameter."""
    if state[name].dtype != torch.uint8:
        state[name][place] = values
        return
    rows = slice(place.start // BLOCK, -(-place.stop // BLOCK))
    blocks = F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    codes, scale = quantize(blocks, name == "exp_avg")
    state[name][rows] = codes
    state[f"{name}_scale"][rows] = scale


def quantize(blocks: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Blocks (n, 256) as the nearest codes, uint8, and the largest magnitude of each block (n,)."""
    book = code_book(signed).to(blocks.device)
    scale = blocks.abs().amax(1)
    middles = (book[1:] + book[:-1]) / 2
    codes = torch.bucketize(blocks / scale.clamp(min=1e-38)[:, None], middles, out_int32=True)
    return codes.to(torch.uint8), scale


@lru_cache(maxsize=2)
def code_book(signed: bool) -> Tensor:
    """The 256 numbers a code can mean, rising, within [-1, 1] or [0, 1] [Dettmers 2016, dynamic tree].

    Seven decades; each finer one has half as many steps, so that numbers far below the largest of their
    block keep a sign and a size.
    """
    numbers = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
        numbers += middles
        if signed:
            numbers += [-middle for middle in middles]
    return torch.tensor(sorted(numbers))
