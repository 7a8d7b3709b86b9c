"""Recorded ControlNets, the networks of their hints, and the hints."""

from __future__ import annotations

from typing import Any

import torch
from golden_checks.semantic import formula_weights
from torch import Tensor

from triptych.conditioning.faces import Face, identity_map
from triptych.conditioning.hints import (
    canny_hint,
    inpainting_hint,
    pixel_super_resolution_hint,
    shrunk,
    super_resolution_hint,
)
from triptych.conditioning.masks import BLUR, saliency_mask, smart_crop
from triptych.models.controlnet import ControlNet, ControlNetConfig
from triptych.models.pidinet import PiDiNet, PiDiNetConfig
from triptych.models.saliency import Saliency, SaliencyConfig, shrink
from triptych.models.semantic import SEMANTIC, SemanticEncoder


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


def mostly(got: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """A pair that is equal when at most 0.5 % of the pixels differ, as the recording's notes allow."""
    differ = ((got - expected).abs() > 2e-3).float().mean() > 0.005
    return differ.float(), torch.zeros(())


@torch.no_grad()
def check_hints(golden: Any) -> dict[str, Any]:
    """Edges, masks, saliency, the small picture's latents, smart crops."""
    pixels, threshold = golden["in.pixels"], golden.config["threshold"]
    network = Saliency(SaliencyConfig())
    network.load_state_dict(golden.under("w.saliency."))
    saliency = network(pixels)
    inside, outside = (
        saliency_mask(pixels, threshold, turned, network, blur=BLUR) for turned in (False, True)
    )
    encoder = SemanticEncoder(SEMANTIC["full"]).eval()
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    statistics = golden.sibling("effnet_encoder").under("w.")
    encoder.load_state_dict(formula_weights(golden.config["encoder_seed"], shapes) | statistics)
    large = golden["in.super_resolution.pixels"]
    latents = super_resolution_hint(encoder(shrunk(large, 2)))
    out: dict[str, Any] = {
        "out.saliency": saliency,
        "out.saliency_input": shrink(pixels)[..., ::4, ::4],
        "out.canny": mostly(canny_hint(pixels), golden["out.canny"]),
        "out.canny_no_resize": mostly(canny_hint(pixels, side=None), golden["out.canny_no_resize"]),
        "out.inpaint": mostly(inpainting_hint(pixels, inside), golden["out.inpaint"]),
        "out.outpaint_mask": mostly(outside, golden["out.outpaint_mask"].float()),
        "out.inpaint_given_mask": inpainting_hint(pixels, golden["in.mask"].float())[..., ::2, ::2],
        "out.pixel_super_resolution": pixel_super_resolution_hint(shrunk(pixels, 4), pixels.shape[-2:]),
        "out.super_resolution.latents": latents,
        "out.super_resolution.preview": pixel_super_resolution_hint(shrunk(large, 2), large.shape[-2:]),
    }
    for name, size in golden.config["smart_crop_sizes"].items():
        out[f"out.smart_crop.{name}"] = smart_crop(pixels[0], tuple(size), saliency[0, 0])
    return out


def check_identity(golden: Any) -> dict[str, Tensor]:
    """Maps of given faces."""
    maps = []
    for picture in range(2):
        boxes, vectors = golden[f"in.boxes.{picture}"].tolist(), golden[f"in.vectors.{picture}"]
        faces = [Face(tuple(box), vector) for box, vector in zip(boxes, vectors, strict=True)]
        maps.append(identity_map(golden["in.pixels_size"].tolist(), faces))
    return {"out.map": torch.stack(maps)}


CHECKS = {
    "controlnet_small": check_small,
    "controlnet_effnet": check_effnet,
    "pidinet": check_pidinet,
    "hints": check_hints,
    "hint_identity": check_identity,
}
