"""What an optimiser remembers, as named tensors and back, bit for bit and whatever its kind.

torch's own `load_state_dict` casts states to the type of their parameter; byte-sized or wide states of a
bfloat16 parameter would not survive that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

COUNTERS = ("k", "weight_sum", "lr_max")  # what schedule-free optimisers count for a whole group


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """States as `NUMBER.FIELD`, by the number of the parameter; counters as `group.NUMBER.FIELD`."""
    tensors: dict[str, Tensor] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for field, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{index}.{field}"] = torch.as_tensor(value)
    for index, group in enumerate(optimizer.param_groups):
        for field in COUNTERS:
            if field in group:
                tensors[f"group.{index}.{field}"] = torch.tensor(group[field], dtype=torch.float64)
    return tensors


def restore_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser back what `moments_of` took from one like it."""
    parameters = list(_parameters(optimizer))
    optimizer.state.clear()
    for name, tensor in tensors.items():
        place, field = name.split(".", 1)
        if place == "group":
            number, field = field.split(".", 1)
            group = optimizer.param_groups[int(number)]
            group[field] = type(group[field])(tensor.item())
        else:
            parameter = parameters[int(place)]
            counter = tensor.ndim == 0 and not tensor.is_floating_point()  # only Python reads it
            device = tensor.device if counter else parameter.device
            optimizer.state[parameter][field] = tensor.to(device, copy=True)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        yield from group["params"]
