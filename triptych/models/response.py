"""Global response norm for training: its backward pass in two sweeps over the map instead of eight.

The norm's map is the widest of a block, so on a CPU the sweeps over it cost more than anything but the matrix
products. Here nothing of its size is made but the result, and a span of rows is worked on while the cache
holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from triptych.models.fused import column_energies

SPAN = 2**17  # numbers of a map worked on at once on a CPU: 512 KiB of float32


class Response(torch.autograd.Function):
    """y = x * (1 + gamma * r) + beta, with r = e / (mean of e + eps), e the channels' norms over the picture.

    `Response.apply(x, gamma, beta, eps)`: x (B, H, W, C), gamma and beta (1, 1, 1, C) [ConvNeXt V2, eq. 1-3].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        energy = torch.stack([column_energies(rows) for rows in x.flatten(1, 2)]).sqrt_()  # float32
        ctx.save_for_backward(x, gamma, energy)
        ctx.eps = eps
        response = (energy / (energy.mean(dim=-1, keepdim=True) + eps)).to(x.dtype)
        return torch.addcmul(beta, x, (1 + gamma.flatten() * response)[:, None, None])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x, gamma, energy = ctx.saved_tensors
        rows, steep = x.flatten(1, 2), gradient.flatten(1, 2)  # (B, n, C)
        products = torch.zeros_like(energy)  # (B, C), of the map and its gradient, summed over the picture
        shift = torch.zeros_like(energy)
        for sample, span in spans(rows):
            products[sample] += (rows[sample, span] * steep[sample, span]).sum(0, dtype=torch.float32)
            shift[sample] += steep[sample, span].sum(0, dtype=torch.float32)
        mean = energy.mean(dim=-1, keepdim=True) + ctx.eps
        response = energy / mean
        wide = gamma.flatten().float()
        asked = products * wide / mean  # of the norms, through their own share
        asked = asked - (asked * response).mean(dim=-1, keepdim=True)  # and through the mean
        back = torch.where(energy > 0, asked / energy, 0).to(
            x.dtype
        )  # a channel that is zero has no direction
        scale = (1 + wide * response).to(x.dtype)
        result = torch.empty_like(rows)
        for sample, span in spans(rows):
            torch.mul(rows[sample, span], back[sample], out=result[sample, span])
            result[sample, span].addcmul_(steep[sample, span].to(x.dtype), scale[sample])
        grown = (products * response).sum(0).view_as(gamma).to(gamma.dtype)
        return result.view_as(x), grown, shift.sum(0).view_as(gamma).to(gamma.dtype), None


def spans(rows: Tensor) -> Iterator[tuple[int, slice]]:
    """Each sample of rows (B, n, C) in spans that a cache holds; whole samples where there is no CPU."""
    count, width = rows.shape[1:]
    step = max(1, SPAN // width) if rows.device.type == "cpu" else count
    for sample in range(len(rows)):
        for start in range(0, count, step):
            yield sample, slice(start, min(start + step, count))
