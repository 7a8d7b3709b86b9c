"""The Inception network of 2015 whose features the published FID and KID are measured in.

[Szegedy 2016, table 1] with the differences of TensorFlow's file of that year, whose weights pytorch-fid
brought over: average pools do not count what is padded, and the last block has a maximum pool. Parameters are
named as pytorch-fid's (`Mixed_5b.branch1x1.conv.weight`). Torchvision's Inception has the same names and
nearly the same shapes but other weights: its features give other numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 299  # pixels that the network was trained with
FEATURES = 2048
CLASSES = 1008  # of the layer after the features, which torchvision's file has 1000 of
NORM_EPS = 1e-3


class Conv(NamedTuple):
    """One layer of a branch. Padded to keep its places, unless it takes steps of more than one."""

    channels: int
    kernel: int | tuple[int, int] = 1  # (height, width)
    stride: int = 1


Branches = Mapping[str, Sequence[Conv | tuple[Conv, Conv]]]  # the two of a pair stand side by side


class FixedNorm(nn.Module):
    """Batch normalisation with the statistics of training: a scale and a shift of every channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=NORM_EPS)


class ConvUnit(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(self, inputs: int, layer: Conv, padded: bool = True) -> None:
        super().__init__()
        height, width = (layer.kernel, layer.kernel) if isinstance(layer.kernel, int) else layer.kernel
        padding = (height // 2, width // 2) if padded and layer.stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, layer.channels, (height, width), layer.stride, padding, bias=False)
        self.bn = FixedNorm(layer.channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, the last one over a pool: "average", "max", or "halve", which has no layer after
    it.

    Layers of a branch are named after it: NAME alone for a single one, NAME_1, NAME_2, ... for several, with
    a and b behind the number for a pair.
    """

    def __init__(self, inputs: int, branches: Branches, pool: str, pooled: int = 0) -> None:
        super().__init__()
        self.pool = pool
        self.paths: list[list[list[str]]] = []  # branches, their steps, and the names of a step's layers
        for name, steps in {**branches, **({"branch_pool": [Conv(pooled)]} if pooled else {})}.items():
            self._add(name, steps, inputs)

    def _add(self, name: str, steps: Sequence[Conv | tuple[Conv, Conv]], inputs: int) -> None:
        path: list[list[str]] = []
        for number, step in enumerate(steps, 1):
            stem = name if len(steps) == 1 else f"{name}_{number}"
            layers = {stem: step} if isinstance(step, Conv) else {f"{stem}a": step[0], f"{stem}b": step[1]}
            for own, layer in layers.items():
                self.add_module(own, ConvUnit(inputs, layer))
            path.append(list(layers))
            inputs = sum(layer.channels for layer in layers.values())
        self.paths.append(path)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,D,h,w), or half as high and wide where the pool is "halve"."""
        *own, last = self.paths if self.pool != "halve" else [*self.paths, []]
        return torch.cat([*(self._follow(path, x) for path in own), self._follow(last, self._pooled(x))], 1)

    def _follow(self, path: list[list[str]], x: Tensor) -> Tensor:
        for names in path:
            x = torch.cat([self.get_submodule(name)(x) for name in names], 1)
        return x

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "average":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.max_pool2d(x, 3, 2)


def _at_35(inputs: int, pooled: int) -> Mixed:
    """A block of 35x35 places."""
    branches: Branches = {
        "branch1x1": [Conv(64)],
        "branch5x5": [Conv(48), Conv(64, 5)],
        "branch3x3dbl": [Conv(64), Conv(96, 3), Conv(96, 3)],
    }
    return Mixed(inputs, branches, "average", pooled)


def _to_17(inputs: int) -> Mixed:
    branches: Branches = {
        "branch3x3": [Conv(384, 3, 2)],
        "branch3x3dbl": [Conv(64), Conv(96, 3), Conv(96, 3, 2)],
    }
    return Mixed(inputs, branches, "halve")


def _at_17(inputs: int, narrow: int) -> Mixed:
    """A block of 17x17 places; a 7x7 kernel is a row and a column."""
    row, column, last = Conv(narrow, (1, 7)), Conv(narrow, (7, 1)), Conv(192, (1, 7))
    branches: Branches = {
        "branch1x1": [Conv(192)],
        "branch7x7": [Conv(narrow), row, Conv(192, (7, 1))],
        "branch7x7dbl": [Conv(narrow), column, row, column, last],
    }
    return Mixed(inputs, branches, "average", 192)


def _to_8(inputs: int) -> Mixed:
    branches: Branches = {
        "branch3x3": [Conv(192), Conv(320, 3, 2)],
        "branch7x7x3": [Conv(192), Conv(192, (1, 7)), Conv(192, (7, 1)), Conv(192, 3, 2)],
    }
    return Mixed(inputs, branches, "halve")


def _at_8(inputs: int, pool: str) -> Mixed:
    """A block of 8x8 places, widened by pairs of a row and a column."""
    pair = (Conv(384, (1, 3)), Conv(384, (3, 1)))
    branches: Branches = {
        "branch1x1": [Conv(320)],
        "branch3x3": [Conv(384), pair],
        "branch3x3dbl": [Conv(448), Conv(384, 3), pair],
    }
    return Mixed(inputs, branches, pool, 192)


class Inception(nn.Module):
    """Pixels to the 2048 numbers before the classes, called pool3."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, Conv(32, 3, 2))
        self.Conv2d_2a_3x3 = ConvUnit(32, Conv(32, 3), padded=False)
        self.Conv2d_2b_3x3 = ConvUnit(32, Conv(64, 3))
        self.Conv2d_3b_1x1 = ConvUnit(64, Conv(80))
        self.Conv2d_4a_3x3 = ConvUnit(80, Conv(192, 3), padded=False)
        self.Mixed_5b = _at_35(192, pooled=32)
        self.Mixed_5c = _at_35(256, pooled=64)
        self.Mixed_5d = _at_35(288, pooled=64)
        self.Mixed_6a = _to_17(288)
        self.Mixed_6b = _at_17(768, narrow=128)
        self.Mixed_6c = _at_17(768, narrow=160)
        self.Mixed_6d = _at_17(768, narrow=160)
        self.Mixed_6e = _at_17(768, narrow=192)
        self.Mixed_7a = _to_8(768)
        self.Mixed_7b = _at_8(1280, "average")
        self.Mixed_7c = _at_8(2048, "max")

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B,2048) of pixels (B,3,299,299) in [0,1]; `squeezed` brings others to that size."""
        x = self.Conv2d_1a_3x3(2 * pixels - 1)  # (B, 32, 149, 149)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(x))  # (B, 64, 147, 147)
        x = self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2))  # (B, 80, 73, 73)
        x = F.max_pool2d(self.Conv2d_4a_3x3(x), 3, 2)  # (B, 192, 35, 35)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)  # (B, 288, 35, 35), (B, 768, 17, 17), ...
        return x.mean((2, 3))  # (B, 2048)


def squeezed(pixels: Tensor) -> Tensor:
    """Pixels (B,3,H,W) of any size as (B,3,299,299), bilinear without smoothing, as pytorch-fid does."""
    return F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file: the network, and the classes after it, which are not used."""
    with torch.device("meta"):
        network = Inception()
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    return {**shapes, "fc.weight": (CLASSES, FEATURES), "fc.bias": (CLASSES,)}
