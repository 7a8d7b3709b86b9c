"""ControlNets with random weights for the tiny cascade."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from triptych.checkpoints.files import PartInfo, write_part
from triptych.checkpoints.load import config_fields
from triptych.conditioning.hints import KINDS
from triptych.models.controlnet import CONTROLNET, ControlNet, ControlNetConfig

HINTS = ("canny", "inpainting", "super_resolution", "pixel_super_resolution", "palette", "identity")


def config_for(hint: str, **changes: object) -> ControlNetConfig:
    kind = KINDS[hint]
    return replace(
        CONTROLNET["tiny"], channels=kind.channels, bottleneck=kind.bottleneck, blocks=(0, 3), **changes
    )


def write_controlnet(path: Path, hint: str = "canny", config: ControlNetConfig | None = None) -> Path:
    """A ControlNet that says something loud about its hint."""
    kind, config = KINDS[hint], config or config_for(hint)
    network = ControlNet(config)
    generator = torch.Generator().manual_seed(len(hint))
    network.eval()
    side = 2 if kind.bottleneck == "large" or hint == "identity" else 64
    example = torch.rand(4, kind.channels, side, side, generator=generator)
    with torch.no_grad():
        for projection in network.projections:
            last = projection[2].weight
            last.copy_(torch.randn(last.shape, generator=generator))
        for block, residual in enumerate(network(example)):
            if residual is not None:
                network.projections[config.blocks.index(block)][2].weight.mul_(2 / residual.std())
    info = PartInfo("controlnet", config=config_fields(config), settings={"hint": hint}, step=9)
    write_part(path, network.state_dict(), info)
    return path


def controlled_cascade(cascade: Path, folder: Path) -> Path:
    """The parts of `cascade`, and a ControlNet for every kind of hint, in `folder`."""
    for part in cascade.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "controlnet").mkdir()
    torch.manual_seed(0)
    for hint in HINTS:
        write_controlnet(folder / "controlnet" / f"{hint}.safetensors", hint)
    return folder
