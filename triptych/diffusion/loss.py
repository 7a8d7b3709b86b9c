"""The training loss of a diffusion stage: squared error per sample, and its weights over noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

BUCKETS = 300
LOGSNR_RANGE = (-10.0, 10.0)
DECAY = 0.99
WEIGHT_RANGE = (1e-7, 1e7)


def per_sample_loss(predicted: Tensor, target: Tensor, weigh: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample: (B, ...) and (B, ...) -> (B,), in float32.

    With weights `weigh` (B,1,h,w) it is the weighted mean over places; 0 where all of a sample's are 0.
    """
    error = (predicted.float() - target.float()) ** 2
    if weigh is None:
        return error.flatten(1).mean(dim=1)
    total = (error.mean(dim=1, keepdim=True) * weigh.float()).flatten(1).sum(dim=1)
    return total / weigh.float().flatten(1).sum(dim=1).clamp_min(1e-6)


def p2_weight(logsnr: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """(k + e^logsnr)^-gamma [Choi et al. 2022, P2 weighting, eq. 8], any shape.

    With k = gamma = 1 and an eps target this is sigma^2: nearly clean samples count little.
    """
    return (k + logsnr.exp()) ** -gamma


def min_snr_weight(logsnr: Tensor, prediction: str, gamma: float = 5.0) -> Tensor:
    """Loss weight of x0 clipped at `gamma`, turned into that of the "eps", "v" or "x0" target, any shape.

    [Hang et al. 2023, Min-SNR, eq. 8 and section 3.4]: min(snr, gamma) for x0, over snr for eps, over
    snr + 1 for v.
    """
    snr = logsnr.exp()
    clipped = snr.clamp(max=gamma)
    return {"x0": clipped, "eps": clipped / snr, "v": clipped / (snr + 1)}[prediction]


class AdaptiveWeight:
    """Weights that even out the loss over noise levels: 1 / running loss of the sample's logsnr bucket.

    300 buckets split logsnr at 299 edges from -10 to 10; the running losses start at one. Usage per step:
    `weight = adaptive(logsnr)`, then after the forward pass `adaptive.update(logsnr, loss)` with the
    unweighted losses. State moves with `state_dict` and `load_state_dict`.
    """

    def __init__(self) -> None:
        self.edges = torch.linspace(*LOGSNR_RANGE, BUCKETS - 1, dtype=torch.float32)
        self.losses = torch.ones(BUCKETS, dtype=torch.float32)

    def __call__(self, logsnr: Tensor) -> Tensor:
        """Weights of samples at logsnr (B,) -> (B,), float32, within [1e-7, 1e7]."""
        self._move(logsnr.device)
        return (1 / self.losses[self._buckets(logsnr)]).clamp(*WEIGHT_RANGE)

    def update(self, logsnr: Tensor, loss: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Move each bucket seen in this batch one percent towards the mean of its losses.

        logsnr (B,), loss (B,) unweighted. Losses that are not finite are left out. With several processes
        `reduce` must return its (2, 300) float64 argument summed over all of them; then every process
        holds the same table.
        """
        self._move(logsnr.device)
        loss = loss.detach().to(logsnr.device, torch.float64).flatten()
        finite = loss.isfinite()
        # A matrix product with one-hot rows, not index_add: on GPUs that one adds in varying order.
        member = torch.nn.functional.one_hot(self._buckets(logsnr).flatten(), BUCKETS).to(torch.float64)
        sums = torch.stack([loss.where(finite, 0.0), finite.to(torch.float64)]) @ member  # (2, BUCKETS)
        if reduce is not None:
            sums = reduce(sums)
        total, count = sums
        mean = (total / count.clamp(min=1)).float()
        self.losses = torch.where(count > 0, DECAY * self.losses + (1 - DECAY) * mean, self.losses)

    def state_dict(self) -> dict[str, Tensor]:
        """{"losses": (300,)}, a copy on the CPU."""
        return {"losses": self.losses.detach().cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave. Raises ValueError if the table has another shape."""
        losses = state["losses"]
        if tuple(losses.shape) != (BUCKETS,):
            raise ValueError(f"adaptive weights have shape {tuple(losses.shape)}; expected ({BUCKETS},)")
        self.losses = losses.detach().to(self.losses.device, torch.float32).clone()

    def _buckets(self, logsnr: Tensor) -> Tensor:
        # Left-sided: a value on an edge belongs to the bucket below that edge.
        return torch.searchsorted(self.edges, logsnr.detach().float().contiguous())

    def _move(self, device: torch.device) -> None:
        self.edges, self.losses = self.edges.to(device), self.losses.to(device)
