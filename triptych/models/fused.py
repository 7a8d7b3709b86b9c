"""Perceptrons for sampling: fewer passes over memory than in blocks.py, no large temporaries.

The same formulas, to rounding. The widest map is written by the first matrix product into a
buffer, and everything up to the second is done there, a span of rows at a time, while they are in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.models.scratch import Buffer, span_rows

STATISTIC_ROWS = 256  # summed up at once, in float32
LEAST_ROWS_PER_WIDTH = 2  # shorter products spend their time on fetching the weights


def is_plain(layer: Any, x: Tensor) -> bool:
    """Is it nothing but a linear layer in x's precision: no adapter, no hook, no quantised weight?"""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    weight = layer.weight
    return type(weight) is nn.Parameter and weight.dtype == x.dtype and weight.device == x.device


def spans(rows: int, step: int) -> Iterator[slice]:
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def add_perceptron(
    layers: Any, source: Tensor, skip: Tensor | None, onto: Tensor, eps: float, buffer: Buffer
) -> None:
    """onto (B, n, C) += layers(norm(source) and skip side by side), in place.

    source (B, n, C) may be `onto` itself; skip (B, n, C'). Linear layers are plain and have biases.
    """
    first, _, response, _, last = layers
    batch, count, width = onto.shape
    step = max(span_rows(first.out_features, onto), LEAST_ROWS_PER_WIDTH * width)
    for group in spans(batch, max(1, step // count)):  # of whole samples
        rows = onto[group].flatten(0, 1)
        entering = source[group].flatten(0, 1)
        beside = None if skip is None else skip[group].flatten(0, 1)
        hidden = buffer.take(len(rows), first.out_features, onto)
        energy = rows.new_zeros(len(rows) // count, first.out_features, dtype=torch.float32)
        for part in spans(len(rows), step):
            entered = F.layer_norm(entering[part], (width,), eps=eps)
            if beside is not None:
                entered = torch.cat([entered, beside[part]], dim=1)
            torch.addmm(first.bias, entered, first.weight.t(), out=hidden[part])
            torch.ops.aten.gelu_(hidden[part])
            for sample, own in _by_sample(part, count):
                energy[sample] += column_energies(hidden[own])
        scale = response.scale(energy.sqrt_(), onto.dtype)
        for part in spans(len(rows), step):
            for sample, own in _by_sample(part, count):
                torch.addcmul(response.beta.flatten(), hidden[own], scale[sample], out=hidden[own])
            rows[part].addmm_(hidden[part], last.weight.t()).add_(last.bias)


def _by_sample(rows: slice, count: int) -> Iterator[tuple[int, slice]]:
    """(sample, its rows) for all samples, of `count` rows each, that `rows` touches."""
    for sample in range(rows.start // count, -(-rows.stop // count)):
        yield sample, slice(max(rows.start, sample * count), min(rows.stop, (sample + 1) * count))


def column_energies(x: Tensor) -> Tensor:
    """Sums of squares of the columns of x (n, width), float32."""
    if x.device.type != "cpu":
        return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()
    total = torch.zeros(x.shape[1], dtype=torch.float32)
    for part in spans(len(x), STATISTIC_ROWS):
        total += (x[part] * x[part] if x.dtype == torch.float32 else x[part].float().square_()).sum(0)
    return total
