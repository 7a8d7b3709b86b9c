"""Recorded ControlNets, the networks of their hints, and the hints."""

from __future__ import annotations

from typing import Any

import torch
from golden_checks.semantic import formula_weights
from torch import Tensor

from triptych.models.controlnet import ControlNet, ControlNetConfig
from triptych.models.pidinet import PiDiNet, PiDiNetConfig


@torch.no_grad()
def check_small(golden: Any) -> dict[str, Tensor]:
    """The bottlenecks without an EfficientNet."""
    out = {}
    for name, c in golden.config.items():
        sizes = {}
        if name == "large":
            sizes = {
                "first_width": c["first_width"], "hidden": c["width"], "features": c["out_width"],
                "residual_blocks": c["residual_blocks"],
            }  # fmt: skip
        config = ControlNetConfig(
            channels=c["c_in"], bottleneck=name, blocks=c["proj_blocks"], width=c["c_proj"], **sizes
        )
        network = ControlNet(config)
        network.load_state_dict(golden.under(f"w.{name}."))
        hint = golden[f"in.{name}.hint"]
        if name == "large":
            out["out.large.features"] = network.encode(hint)
        for block, residual in enumerate(network(hint)):
            if residual is not None:
                out[f"out.{name}.residual.{block}"] = residual
    return out


@torch.no_grad()
def check_effnet(golden: Any) -> dict[str, Tensor]:
    """EfficientNet on hints of 1, 3 and 4 channels; weights by formula, statistics of the encoder's file."""
    statistics = {
        name: tensor
        for name, tensor in golden.sibling("effnet_encoder").under("w.").items()
        if name.startswith("backbone.")
    }
    out = {}
    for channels, c in golden.config.items():
        network = ControlNet(ControlNetConfig(c["c_in"], blocks=c["proj_blocks"], width=c["c_proj"]))
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        network.load_state_dict(formula_weights(c["seed"], shapes) | statistics)
        network.train()  # the backbone stays in eval mode whatever is asked for
        for block, residual in enumerate(network(golden[f"in.hint.c{channels}"])):
            if residual is not None:
                out[f"out.residual.c{channels}.{block}"] = residual
    return out


@torch.no_grad()
def check_pidinet(golden: Any) -> dict[str, Tensor]:
    """Side maps and the fused map."""
    network = PiDiNet(PiDiNetConfig(**golden.config))
    network.load_state_dict(golden.under("w."))
    *sides, fused = network.maps(golden["in.pixels"])
    return {f"out.side_{number}": side for number, side in enumerate(sides, 1)} | {"out.edges": fused}


CHECKS = {"controlnet_small": check_small, "controlnet_effnet": check_effnet, "pidinet": check_pidinet}
