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
CHUNK_ELEMENTS = 2**20  # numbers narrowed together, which bounds the memory beside the result


def narrow(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Store every floating matrix as int8 rows, rounded to nearest; other tensors pass unchanged, also those
    of one row, which are vectors (gains of response norms) with a range too wide for one scale."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or len(tensor) == 1 or not tensor.is_floating_point():
            stored[name] = tensor
            continue
        stored[name], stored[name + SCALE] = narrow_matrix(tensor)
    return stored


def narrow_matrix(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows of a matrix (rows, ...) and their scales (rows,), float32; some rows at a time."""
    flat = matrix.flatten(1)
    narrowed = torch.empty(flat.shape, dtype=torch.int8, device=matrix.device)
    scales = torch.empty(len(flat), device=matrix.device)
    step = max(1, CHUNK_ELEMENTS // max(1, flat.shape[1]))
    for start in range(0, len(flat), step):
        rows = flat[start : start + step].float()
        scale = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        narrowed[start : start + step] = (rows / scale[:, None]).round_().to(torch.int8)
        scales[start : start + step] = scale
    return narrowed.view(matrix.shape), scales


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
