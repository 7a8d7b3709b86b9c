"""Updates that need little memory: each gradient used and freed inside the backward pass; bfloat16 weights.

The weights of a bfloat16 parameter are widened to float32 for the optimiser and rounded back at random, up or
down in proportion to the distance, so that steps too small for bfloat16 are taken as often as their size
says, and a mean of many updates loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from triptych.training.draws import key

ROUNDING = 7  # what a draw is for, after those of draws.py, data/batches.py, sources.py and lora.py
LOST_BITS = 16  # of a float32 that bfloat16 does not hold


class FusedUpdate:
    """Moves each parameter of an optimiser as soon as its gradient is complete, and frees the gradient.

    Every gradient is clipped by itself to norm `clip` (0 never clips): a joint norm would be known only when
    all gradients have been held. From the first gradient on that is not finite nothing moves, and `norm` is
    not finite. `seed` keys the rounding of bfloat16 weights.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip: float, seed: int) -> None:
        self.optimizer, self.clip, self.seed = optimizer, clip, seed
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.square = 0.0  # of the joint norm, before clipping

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Backward passes inside are update `step`; `norm` afterwards tells their joint gradient norm."""
        self.square = 0.0
        handles = [
            p.register_post_accumulate_grad_hook(self._hook(index, step))
            for index, p in enumerate(self.parameters)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def norm(self) -> float:
        """Of the last update's whole gradient, before clipping."""
        return math.sqrt(self.square)

    def _hook(self, index: int, step: int) -> Callable[[Tensor], None]:
        def move(p: Tensor) -> None:
            assert p.grad is not None
            norm = float(torch.linalg.vector_norm(p.grad, dtype=torch.float32))
            self.square += norm**2
            if not math.isfinite(self.square):  # from here on nothing moves; the norm tells
                p.grad = None
                return
            if 0 < self.clip < norm:
                p.grad.mul_(self.clip / norm)
            move_one(self.optimizer, p, key(self.seed, ROUNDING, step, index))

        return move


def apply_gradients(optimizer: torch.optim.Optimizer, seed: int, step: int) -> None:
    """One update from all gradients at hand; bfloat16 parameters one by one, wide only meanwhile."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for index, p in enumerate(parameters):
        if p.dtype == torch.bfloat16 and p.grad is not None:
            held[index] = (p, p.grad)
            p.grad = None
    if any(p.grad is not None for p in parameters):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    while held:
        index, (p, p.grad) = held.popitem()
        move_one(optimizer, p, key(seed, ROUNDING, step, index))


@torch.no_grad()
def move_one(optimizer: torch.optim.Optimizer, p: Tensor, seed: int) -> None:
    """Let the optimiser move the one parameter that has a gradient, and free the gradient."""
    if p.dtype != torch.bfloat16:
        optimizer.step()
        p.grad = None
        return
    assert p.grad is not None
    stored, gradient = p.data, p.grad.float()
    p.grad = None
    p.data = stored.float()
    p.grad = gradient
    try:
        optimizer.step()
        stored.copy_(round_at_random(p.data, seed))
    finally:
        p.grad = None
        p.data = stored


def round_at_random(x: Tensor, seed: int) -> Tensor:
    """float32 -> bfloat16, to one of the two neighbours, each the likelier the nearer it is; keyed by `seed`.

    Adds noise to the 16 bits that go and cuts them off [Gupta 2015, "Deep learning with limited numerical
    precision", 3]. Numbers that bfloat16 holds stay.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    bits = torch.empty(x.shape, dtype=torch.int32, device=x.device).random_(
        0, 1 << LOST_BITS, generator=generator
    )
    bits.add_(x.contiguous().view(torch.int32)).bitwise_and_(-1 << LOST_BITS)
    return bits.view(torch.float32).bfloat16()
