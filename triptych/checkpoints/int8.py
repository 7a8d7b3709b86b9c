"""Matrices stored as int8 rows with one float scale each: a quarter of float32, for files that must be small.

A matrix `name` of shape (rows, ...) becomes `name` int8 and `name.scale` float32 (rows,), with
matrix = name * scale. Vectors stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = ".scale"
LARGEST = 127


def narrow(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Store every floating matrix as int8 rows, rounded to nearest; other tensors pass unchanged."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            stored[name] = tensor
            continue
        rows = tensor.float().flatten(1)
        scale = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        stored[name] = (rows / scale[:, None]).round().to(torch.int8).view(tensor.shape)
        stored[name + SCALE] = scale
    return stored


def widen(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Undo `narrow`: int8 matrices with a scale become `dtype`; other tensors pass unchanged."""
    wide: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name + SCALE)
        if tensor.dtype == torch.int8 and scale is not None:
            shape = (-1, *[1] * (tensor.ndim - 1))
            wide[name] = tensor.to(dtype).mul_(scale.to(dtype).view(shape))
        elif not (name.endswith(SCALE) and is_narrow(tensors, name.removesuffix(SCALE))):
            wide[name] = tensor
    return wide


def is_narrow(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether the matrix `name` is stored as int8 rows."""
    return name in tensors and tensors[name].dtype == torch.int8 and name + SCALE in tensors
