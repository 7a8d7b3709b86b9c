"""Blocks under torch.compile, one kind and shape at a time.

A whole network takes minutes to compile, and again for each of its sizes. Its blocks are a few formulas in a
few shapes, so these are compiled, and all blocks of a kind and shape share what comes out; what runs between
them, and what is kept between steps (see `Scratch`), stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BACKEND = "inductor"
MOST_SHAPES = 64  # of one kind of block; further ones run uncompiled


def run_compiled(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """What `block(*arguments)` gives, a function without side effects, compiled at its first call with
    arguments of these shapes. Raises torch's errors where there is no compiler."""
    answer: Tensor = _compiled(block, BACKEND)(*arguments)
    return answer


@lru_cache(maxsize=16)
def _compiled(block: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    import torch._dynamo as dynamo  # seconds of imports, for those who ask for it

    name = "recompile_limit" if hasattr(dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(dynamo.config, name, max(MOST_SHAPES, getattr(dynamo.config, name)))
    made: Callable[..., Tensor] = torch.compile(block, dynamic=False, backend=backend)
    return made
