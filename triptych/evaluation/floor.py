"""The floor of a computation: its matrix products and attention alone, at the same shapes and precision.

`record_products` watches a call and notes every product it makes; `time_products` runs each kind by itself.
Nothing that computes the same products can be faster, so what lies above the floor is what a better program
could still save.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = (
    "mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "mkldnn_convolution", "convolution_backward",
)  # fmt: skip
ATTENTION = "scaled_dot_product"
RUNS = 3  # per kind of product


@dataclass(frozen=True)
class Shape:
    """A tensor as far as the speed of a product depends on it."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device).fill_(0.5)


@dataclass(frozen=True)
class Product:
    """One operator with its arguments, tensors replaced by their shapes."""

    operator: Any
    arguments: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_product(func, args):
            named = tuple((name, _frozen(value)) for name, value in kwargs.items())
            self.products[Product(func, tuple(map(_frozen, args)), named)] += 1
        return func(*args, **kwargs)


def _is_product(func: Any, args: tuple[Any, ...]) -> bool:
    name = func.overloadpacket.__name__
    if ATTENTION in name:
        return True
    if name not in PRODUCTS:
        return False
    if "convolution" not in name:
        return True
    x, weight = args[1:3] if name == "convolution_backward" else args[:2]  # before it stands the gradient
    depthwise = weight.shape[1] == 1 and x.shape[1] > 1
    return not depthwise  # a depthwise convolution multiplies no matrices


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Shape(tuple(value.shape), value.stride(), value.dtype, value.device)
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, Shape):
        return value.make()
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value


@torch.no_grad()
def record_products(call: Callable[[], Any]) -> Counter[Product]:
    """How often `call` makes which product."""
    with _Recorder() as recorder:
        call()
    return recorder.products


@torch.no_grad()
def time_products(
    products: Counter[Product],
    wait: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds that all `products` take one after the other, each kind timed apart (median of 3 runs).

    `wait` returns when the device has finished; `clock` tells the time in seconds.
    """
    total = 0.0
    for product, count in products.items():
        arguments, named = _thawed(product.arguments), {k: _thawed(v) for k, v in product.named}
        seconds = []
        for _ in range(RUNS):
            start = clock()
            product.operator(*arguments, **named)
            wait()
            seconds.append(clock() - start)
        total += count * median(seconds)
    return total
