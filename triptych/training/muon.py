"""Muon: matrices move by their momentum made orthogonal, everything else by AdamW, in one optimiser.

torch's own Muon iterates in bfloat16, which CPUs without it emulate a hundred times slower, and takes
matrices only. Here the iteration has the precision of the run's matrix products, works on all matrices of one
shape at once, and takes 1x1 and other dense convolutions as the matrices they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

STEPS = 5  # of the iteration
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # [Jordan 2024, "Muon"]: singular values go to 0.7 .. 1.2
SMALLEST_SIDE = 32  # below it a direction has too few neighbours for orthogonality to say much
ADAM_SCALE = 0.2  # root mean square of an AdamW update over its rate [Liu 2025, "Muon is scalable", 2.2]
TOGETHER = 2**25  # numbers iterated on at once: 128 MiB a copy


class Muon(torch.optim.Optimizer):
    """Muon [Jordan 2024] for dense matrices, AdamW [Loshchilov and Hutter 2019] for all other parameters.

    The update of a matrix is scaled by 0.2 * sqrt(longer side), so that it is as large as AdamW's would be:
    `lr` and `weight_decay` of an AdamW run carry over. `groups` are parameter groups as in torch.
    State: `momentum` of a matrix; `step`, `exp_avg` and `exp_avg_sq` of the rest. `narrow` iterates in
    bfloat16, for processors that multiply in it.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.01, momentum: float = 0.95, narrow: bool = False,
    ) -> None:  # fmt: skip
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum,
        }  # fmt: skip
        super().__init__(groups, defaults)
        self.narrow = narrow

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Parameters without a gradient stay where they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            for alike in batches([p for p in moved if is_matrix(p)]):
                self._move_matrices(alike, group)
            self._move_others([p for p in moved if not is_matrix(p)], group)
        return loss

    def _move_matrices(self, alike: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Matrices of one shape, together."""
        directions = []
        for p in alike:
            assert p.grad is not None
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(momentum, group["momentum"]).flatten(1))  # Nesterov's look ahead
        updates = orthogonalize(torch.stack(directions), self.narrow)
        scale = ADAM_SCALE * max(directions[0].shape) ** 0.5
        for p, update in zip(alike, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.view(p.shape).to(p.dtype), alpha=-group["lr"] * scale)

    def _move_others(self, others: list[nn.Parameter], group: dict[str, Any]) -> None:
        """All the rest, by torch's own AdamW."""
        if not others:
            return
        for p in others:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in others]
        adamw(
            list(others),
            [p.grad for p in others if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def is_matrix(p: Tensor) -> bool:
    """Whether Muon moves it: at least 32 rows and columns, a convolution counting as out x (in * kernel); and
    nobody left it to AdamW."""
    wide = p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= SMALLEST_SIDE
    return wide and not getattr(p, "adamw", False)


def leave_to_adamw(module: nn.Module) -> None:
    """Have AdamW move the matrices of a module. Wide ones that run once a sample, say, take less time to run
    than to be made orthogonal.

    The mark is on the parameters, which keep it when their values move or narrow. Splitting a network over
    processes would replace them; Muon needs whole matrices and is refused there (`check_shares`).
    """
    for parameter in module.parameters():
        parameter.adamw = True  # type: ignore[attr-defined]


def batches(matrices: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Matrices of equal shape, as many together as memory should bear, in the order given."""
    alike: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for p in matrices:
        alike.setdefault((p.shape, p.device, p.dtype), []).append(p)
    for members in alike.values():
        count = max(1, TOGETHER // members[0].numel())
        for first in range(0, len(members), count):
            yield members[first : first + count]


def orthogonalize(x: Tensor, narrow: bool = False) -> Tensor:
    """Matrices x (n, rows, columns) with all singular values brought near 1, in the computing precision.

    Newton-Schulz iteration for the nearest orthogonal matrix, five steps: float32, or bfloat16 where asked
    for and on CUDA devices, where it is as good and faster. A matrix of zeros stays one.
    """
    x = x.to(torch.bfloat16 if narrow or x.is_cuda else torch.float32)
    tall = x.shape[1] > x.shape[2]
    if tall:  # the product of a matrix with its transpose is smaller from this side
        x = x.mT
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    first, second, third = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=second, alpha=third)
        x = torch.baddbmm(x, polynomial, x, beta=first)
    return x.mT if tall else x
