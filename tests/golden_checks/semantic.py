"""Recorded semantic encoder and previewer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triptych.models.semantic import (
    SEMANTIC,
    Previewer,
    PreviewerConfig,
    SemanticEncoder,
    normalise,
)

U64 = np.uint64
GOLDEN_RATIO = 0x9E3779B97F4A7C15


def mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 on uint64 arrays, with wrap-around."""
    z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
    return z ^ (z >> U64(31))


def formula_values(seed: int, number: int, count: int) -> np.ndarray:
    """`count` float32 values in [-1, 1) of tensor `number` under `seed`."""
    start = (seed * 1000003 + number + 1) * GOLDEN_RATIO % 2**64
    base = mix(np.array([start], U64))
    bits = mix(base + np.arange(1, count + 1, dtype=U64) * U64(GOLDEN_RATIO)) >> U64(40)
    return (bits.astype(np.float64) / 2**23 - 1).astype(np.float32)


def formula_weights(seed: int, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Weights by the formula of the recording's notes, for all names except running statistics.

    `shapes` has every tensor of the network in the order of its state dict, buffers counted.
    """
    weights = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros(shape, dtype=torch.int64)
        elif not name.endswith(("running_mean", "running_var")):
            u = formula_values(seed, number, math.prod(shape))
            if name.endswith(".bias"):
                u = np.float32(0.25) * u
            elif len(shape) == 1:
                u = 1 + np.float32(0.25) * u
            else:
                u = u * np.float32(math.sqrt(6 / math.prod(shape[1:])))
            weights[name] = torch.from_numpy(u).reshape(shape)
    return weights


def check_semantic_encoder(golden: Any) -> dict[str, Tensor]:
    """The full-size encoder on formula weights: latents, and thinned-out maps from the middle."""
    network = SemanticEncoder(SEMANTIC["full"])
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    weights = formula_weights(golden.config["seed"], shapes) | golden.under("w.")
    network.load_state_dict(weights)
    network.eval()
    out = {
        f"check.{name}": weights[name].flatten()[: first.numel()]
        for name, first in golden.under("check.").items()
    }
    with torch.no_grad():
        normalised = normalise(golden["in.pixels"])
        stem = network.backbone[0](normalised)
        stage_3 = network.backbone[1:4](stem)
        features = network.backbone[4:](stage_3)
        return out | {
            "out.normalised": normalised[:, :, ::8, ::8],
            "out.stem": stem[:, :, ::8, ::8],
            "out.stage_3": stage_3[:, ::8],
            "out.features": features[:, ::16],
            "out.latents": network(golden["in.pixels"]),
            "out.latents_small": network(golden["in.pixels_small"]),
        }


def check_previewer(golden: Any) -> dict[str, Tensor]:
    """The previewer in eval mode."""
    c = golden.config
    network = Previewer(PreviewerConfig(c["c_in"], c["c_hidden"], c["c_out"]))
    network.load_state_dict(golden.under("w."))
    network.eval()
    return {"out.rgb": network(golden["in.latents"])}


CHECKS = {"effnet_encoder": check_semantic_encoder, "previewer": check_previewer}
