"""PiDiNet [Su 2021]: soft edges of a picture by pixel differences, for the soft-edge hint.

Its convolutions look at differences of neighbours instead of at values [eq. 2-4]: central (c), angular (a)
and radial (r) ones, beside plain ones (v). Each is a plain convolution with a rearranged kernel, which is how
it is computed here. Parameter names are those of the published file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = "carv" * 4  # of the convolutions in order, the stem first
BLOCKS = (3, 4, 4, 4)  # of the four stages
DILATIONS = (5, 7, 9, 11)
NEXT_AROUND = (3, 0, 1, 6, 4, 2, 7, 8, 5)  # flat 3x3 place -> the one a step further round the centre
OUTER = (0, 2, 4, 10, 14, 20, 22, 24)  # flat 5x5 places of the far ring that a radial kernel adds,
INNER = (6, 7, 8, 11, 13, 16, 17, 18)  # and of the near ring it takes away


@dataclass(frozen=True)
class PiDiNetConfig:
    width: int = 60  # of the first stage; the others have 2, 4 and 4 times as much
    fuse_width: int = 24  # of each stage's side branch


def difference_kernel(weight: Tensor, kind: str) -> Tensor:
    """The plain kernel (o,i,3,3), or (o,i,5,5) for "r", that a difference convolution amounts to."""
    if kind == "v":
        return weight
    flat = weight.flatten(2)
    if kind == "c":
        centred = flat.clone()
        centred[..., 4] -= flat.sum(-1)
        return centred.view_as(weight)
    if kind == "a":
        return (flat - flat[..., NEXT_AROUND]).view_as(weight)
    radial = flat.new_zeros(*flat.shape[:2], 25)
    radial[..., OUTER] = flat[..., 1:]
    radial[..., INNER] = -flat[..., 1:]
    return radial.view(*flat.shape[:2], 5, 5)


class DifferenceConv(nn.Module):
    def __init__(self, before: int, after: int, kind: str, groups: int = 1) -> None:
        super().__init__()
        self.kind, self.groups = kind, groups
        self.weight = nn.Parameter(torch.empty(after, before // groups, 3, 3))
        if not self.weight.is_meta:
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        kernel = difference_kernel(self.weight, self.kind)
        return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=self.groups)


class Block(nn.Module):
    """Depthwise differences, ReLU, 1x1; the input is added. The first of a stage begins with a max-pool."""

    def __init__(self, before: int, after: int, kind: str, first: bool) -> None:
        super().__init__()
        self.shrinks = first
        if first:
            self.shortcut = nn.Conv2d(before, after, 1)
        self.conv1 = DifferenceConv(before, before, kind, groups=before)
        self.conv2 = nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.shrinks:
            x = F.max_pool2d(x, 2)
        y = self.conv2(self.conv1(x).relu())
        return y + (self.shortcut(x) if self.shrinks else x)


class DilatedSum(nn.Module):
    """ReLU, 1x1 to the side branch's width, and the sum of four 3x3 with growing reach."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1)
        for number, dilation in enumerate(DILATIONS, 1):
            conv = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
            setattr(self, f"conv2_{number}", conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x.relu())
        return sum(getattr(self, f"conv2_{number}")(x) for number in range(1, 5))  # type: ignore[return-value]


class SpatialGate(nn.Module):
    """x times a map in [0,1] made from it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 4, 1)
        self.conv2 = nn.Conv2d(4, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv2(self.conv1(x.relu())).sigmoid()


class Reduce(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class PiDiNet(nn.Module):
    """Pixels (B,3,H,W) in [0,1] -> edges (B,1,H,W) in [0,1]; sides of at least 8 pixels."""

    def __init__(self, config: PiDiNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * factor for factor in (1, 2, 4, 4)]
        kinds = iter(KINDS)
        self.init_block = DifferenceConv(3, config.width, next(kinds))
        before = config.width
        for stage, (width, blocks) in enumerate(zip(widths, BLOCKS, strict=True), 1):
            for number in range(1, blocks + 1):
                first = stage > 1 and number == 1
                setattr(self, f"block{stage}_{number}", Block(before, width, next(kinds), first))
                before = width
        fuse = config.fuse_width
        self.dilations = nn.ModuleList(DilatedSum(width, fuse) for width in widths)
        self.attentions = nn.ModuleList(SpatialGate(fuse) for _ in widths)
        self.conv_reduces = nn.ModuleList(Reduce(fuse) for _ in widths)
        self.classifier = nn.Conv2d(4, 1, 1)

    def stages(self, pixels: Tensor) -> Iterator[Tensor]:
        """The map at the end of each stage."""
        x = self.init_block(pixels)
        for stage, blocks in enumerate(BLOCKS, 1):
            for number in range(1, blocks + 1):
                x = getattr(self, f"block{stage}_{number}")(x)
            yield x

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """The side maps of the four stages and, last, the fused one, all (B,1,H,W) in [0,1]."""
        sides = []
        for x, widen, gate, reduce in zip(
            self.stages(pixels), self.dilations, self.attentions, self.conv_reduces, strict=True
        ):
            side = reduce(gate(widen(x)))
            sides.append(F.interpolate(side, pixels.shape[-2:], mode="bilinear", align_corners=False))
        fused = self.classifier(torch.cat(sides, dim=1))
        return [edges.sigmoid() for edges in (*sides, fused)]

    def forward(self, pixels: Tensor) -> Tensor:
        return self.maps(pixels.to(next(self.parameters()).dtype))[-1]
