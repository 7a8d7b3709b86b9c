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

CACHED = 2**18  # numbers that the cache next to a core holds, in float32, together with what is made of them
MANY_ROWS_PER_WIDTH = 2  # from here, the second matrix has less than half of the numbers of the map
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
            for few in _few_rows(part, hidden):
                torch.ops.aten.gelu_(hidden[few])
                for sample, own in _by_sample(few, count):
                    energy[sample] += column_energies(hidden[own])
        scale = response.scale(energy.sqrt_(), onto.dtype)
        if count >= MANY_ROWS_PER_WIDTH * width:
            _add_product_of_many(rows.view(-1, count, width), hidden, scale, response.beta, last, step)
            continue
        for part in spans(len(rows), step):
            for few in _few_rows(part, hidden):
                for sample, own in _by_sample(few, count):
                    torch.addcmul(response.beta.flatten(), hidden[own], scale[sample], out=hidden[own])
            rows[part].add_(F.linear(hidden[part], last.weight, last.bias))


def _add_product_of_many(
    rows: Tensor, hidden: Tensor, scale: Tensor, beta: Tensor, last: nn.Linear, step: int
) -> None:
    """rows (B, n, C) += last(hidden * scale + beta), with scale and shift in the weights, which are fewer."""
    shift = F.linear(beta.flatten(), last.weight, last.bias)
    for sample, (onto, wide) in enumerate(zip(rows, hidden.split(rows.shape[1]), strict=True)):
        weight = last.weight * scale[sample]
        for part in spans(len(onto), step):
            onto[part].add_(F.linear(wide[part], weight, shift))


def _few_rows(rows: slice, wide: Tensor) -> Iterator[slice]:
    """Parts of `rows` small enough for the fastest cache from one operation to the next; on a CPU."""
    if wide.device.type != "cpu":
        yield rows
        return
    step = max(1, CACHED // wide.shape[1])
    for part in spans(rows.stop - rows.start, step):
        yield slice(rows.start + part.start, rows.start + part.stop)


def _by_sample(rows: slice, count: int) -> Iterator[tuple[int, slice]]:
    """(sample, its rows) for all samples, of `count` rows each, that `rows` touches."""
    for sample in range(rows.start // count, -(-rows.stop // count)):
        yield sample, slice(max(rows.start, sample * count), min(rows.stop, (sample + 1) * count))


def column_energies(x: Tensor) -> Tensor:
    """Sums of squares of the columns of x (..., n, width), (..., width)."""
    if x.device.type != "cpu":
        return torch.linalg.vector_norm(x, dim=-2, dtype=torch.float32).square_()
    if x.dtype == torch.float16:  # its squares overflow
        x = x.float()
    # Of bfloat16, `square` takes a fifth of the time of `x * x`. Its sums are made in float32, then rounded:
    # less than its own norm, which diffusers takes, is.
    return x.square().sum(-2)
