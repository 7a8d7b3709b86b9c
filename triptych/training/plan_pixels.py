"""The fullest moment of a step of the recipes that learn from pixels, and of a ControlNet; see plan.py.

Networks are built without values, and their forward passes run once so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.models.image_tower import IMAGE_TOWER, ImageTower
from triptych.models.semantic import PREVIEWER, SEMANTIC, Previewer, SemanticEncoder
from triptych.models.stage_a import DISCRIMINATOR, STAGE_A, Discriminator, StageA
from triptych.models.stage_c import StageC
from triptych.training.config import RunSettings
from triptych.training.footprint import WIDE, BlockCost, backward_peak, trace, trace_whole
from triptych.training.image_tower import Viewer, embed, view_loss
from triptych.training.start import network_config
from triptych.training.vqgan import reconstruct

PIXEL_RECIPES = ("stage_a", "semantic", "image_encoder")


def pixel_step(settings: RunSettings) -> tuple[list[nn.Module], list[nn.Module], int, int]:
    """Networks that are written, helpers that are not, bytes of maps and of gradients.

    Where two players take turns, those of the one that takes more.
    """
    build = {"stage_a": _stage_a, "semantic": _semantic, "image_encoder": _image_encoder}[settings.recipe]
    count, side = max(1, settings.batch // settings.accumulate), settings.data.size
    with torch.device("meta"):
        networks, helpers, players = build(settings, torch.empty(count, 3, side, side))
    best = (0, 0)
    for learning, run in players:
        for network in [*networks, *helpers]:
            network.requires_grad_(network in learning)
        best = max(best, one_moment(trace_whole(nn.ModuleList([*networks, *helpers]), run)), key=sum)
    for network in [*networks, *helpers]:
        network.requires_grad_(True)
    return networks, helpers, *best


def one_moment(cost: BlockCost) -> tuple[int, int]:
    """Maps and gradients of networks that are kept whole for the backward pass, in float32."""
    return backward_peak([cost], BlockCost(), recomputed=False, narrow=False, held=WIDE, update=0)


Player = tuple[list[nn.Module], Callable[[], Any]]  # what learns, and the forward pass of its loss
Built = tuple[list[nn.Module], list[nn.Module], list[Player]]


def _stage_a(settings: RunSettings, pixels: Tensor) -> Built:
    weights = settings.autoencoder
    stage_a = StageA(network_config(settings, "stage_a", STAGE_A))
    codes = torch.empty(len(pixels), dtype=torch.bool)
    judge = Discriminator(DISCRIMINATOR[weights.discriminator]) if weights.adversarial else None

    def autoencode() -> None:
        shown, _ = reconstruct(stage_a.train(), pixels, codes, weights.decoder_only)
        F.mse_loss(shown, pixels)
        F.l1_loss(shown, pixels)
        if judge is not None:
            judge.train()(shown)

    def tell_apart() -> None:
        assert judge is not None
        judge.train()(pixels)
        judge(torch.empty_like(pixels))

    if judge is None:
        return [stage_a], [], [([stage_a], autoencode)]
    return [stage_a], [judge], [([stage_a], autoencode), ([judge], tell_apart)]


def _semantic(settings: RunSettings, pixels: Tensor) -> Built:
    encoder = SemanticEncoder(network_config(settings, "semantic", SEMANTIC))
    plain = settings.model_copy(update={"network": {}})
    previewer = Previewer(network_config(plain, "previewer", PREVIEWER))

    def autoencode() -> None:
        shown = previewer.train()(encoder.train()(pixels))
        wanted = torch.empty_like(shown)
        F.mse_loss(shown, wanted)
        F.l1_loss(shown, wanted)

    return [encoder, previewer], [], [([encoder, previewer], autoencode)]


def _image_encoder(settings: RunSettings, pixels: Tensor) -> Built:
    tower = ImageTower(network_config(settings, "image_encoder", IMAGE_TOWER))
    viewer = Viewer(tower.width) if settings.image_encoder.look else None
    helpers: list[nn.Module] = [] if viewer is None else [viewer]

    def look() -> None:
        embeds = embed(tower.train(), pixels)
        if viewer is not None:
            view_loss(viewer.train(), embeds, pixels)

    return [tower], helpers, [([tower, *helpers], look)]


def control_step(
    settings: RunSettings, network: nn.Module, hint: Tensor, stage_c: StageC, inputs: dict[str, Tensor]
) -> tuple[int, int]:
    """Bytes of maps and of gradients of a ControlNet whose frozen Stage C gets `inputs` and its residuals."""
    residuals: list[Tensor | None] = []
    own = trace_whole(network, lambda: residuals.extend(network.train()(hint)))
    runs, outside = trace(stage_c, {**inputs, "residuals": residuals})  # type: ignore[dict-item]
    maps, _ = backward_peak(runs, outside, settings.checkpointing, narrow=False, held=0, update=0)
    return max((maps + own.kept, 0), one_moment(own), key=sum)
