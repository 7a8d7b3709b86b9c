"""Stage A: an autoencoder through a codebook, and a discriminator that may judge it [Esser 2021, eq. 3-6]."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from triptych.checkpoints.files import PartInfo
from triptych.data.batches import Batch
from triptych.errors import SettingsError, nearest
from triptych.images import grid, to_images
from triptych.models.stage_a import DISCRIMINATOR, STAGE_A, Discriminator, StageA
from triptych.training.config import RunSettings
from triptych.training.draws import CODES, Draws, key
from triptych.training.processes import everywhere
from triptych.training.sources import Pictures
from triptych.training.start import network_config, trained_info
from triptych.training.task import Losses, Task

SHOWN = 8  # pictures in a sample grid


def stage_a_task(settings: RunSettings, pictures: Pictures, device: torch.device) -> Task:
    """Two players: the autoencoder, and, with a weight above 0 and from its start on, the discriminator."""
    weights = settings.autoencoder
    if weights.discriminator not in DISCRIMINATOR:
        raise SettingsError(
            f'discriminator "{weights.discriminator}": {nearest(weights.discriminator, DISCRIMINATOR)}.'
        )
    if weights.decoder_only and settings.init is None:
        raise SettingsError("autoencoder.decoder_only keeps an encoder that is there: say which by init.")
    stage_a = StageA(network_config(settings, "stage_a", STAGE_A)).to(device)
    players = {"autoencoder": ["stage_a"]}
    helpers: dict[str, nn.Module] = {}
    if weights.adversarial > 0:
        helpers["discriminator"] = Discriminator(DISCRIMINATOR[weights.discriminator]).to(device)
        players["discriminator"] = ["discriminator"]

    def loss(player: str, batch: Batch, draws: Draws, step: int) -> Losses:
        pixels = batch.pixels.to(device)
        judged = bool(helpers) and step >= weights.adversarial_start
        judge = helpers.get("discriminator")
        through_codes = (draws.uniform() < weights.quantised).to(device)
        if player == "discriminator":
            assert judge is not None
            with torch.no_grad():
                shown, _ = reconstruct(stage_a, pixels, through_codes, weights.decoder_only)
            real, made = judge(pixels), judge(shown)
            total = F.binary_cross_entropy(real, torch.ones_like(real))
            total = total + F.binary_cross_entropy(made, torch.zeros_like(made))
            return Losses(total / 2, terms={"real": real.detach().mean(), "made": made.detach().mean()})
        shown, codebook = reconstruct(stage_a, pixels, through_codes, weights.decoder_only)
        if weights.restart_codes and not weights.decoder_only and step % weights.restart_codes == 0:
            restart_codes(stage_a, pixels, key(settings.seed, CODES, step))
        squared = F.mse_loss(shown, pixels)
        total = weights.l2 * squared + weights.l1 * F.l1_loss(shown, pixels) + weights.codebook * codebook
        if judged:
            assert judge is not None
            judgement = judge(shown)
            total = total + weights.adversarial * F.binary_cross_entropy(
                judgement, torch.ones_like(judgement)
            )
        terms = {"psnr": -10 * squared.detach().log10(), "codebook": codebook.detach()}
        return Losses(total, terms=terms)

    @torch.no_grad()
    def sample(trained: dict[str, nn.Module], out: Path) -> Image.Image:
        plan = pictures.order().plan(0)
        batch = pictures.load(plan, tuple(range(min(SHOWN, len(plan.samples)))))
        pixels = batch.pixels.to(device)
        network: Any = trained["stage_a"]
        return grid(
            to_images(torch.cat([pixels, network.decode(network.encode(pixels))])), columns=len(pixels)
        )

    def info(part: str, network: nn.Module) -> PartInfo:
        stated = trained_info(settings, part, network, {})
        if settings.init is None:  # latents of weights that were there keep the scale that Stage B knows
            stated.config["scale"] = latent_deviation(network)
        return stated

    return Task(
        {"stage_a": stage_a}, pictures.order(), pictures.load, loss, info, sample,
        players=players, helpers=helpers, start_of={"discriminator": weights.adversarial_start},
        skipped=pictures.skipped, key_of=pictures.source.key,
    )  # fmt: skip


def reconstruct(
    stage_a: StageA, pixels: Tensor, through_codes: Tensor, decoder_only: bool = False
) -> tuple[Tensor, Tensor]:
    """The picture, from codes where `through_codes` (B,) and else from the latents, and the codebook's loss.

    Generation never quantises, so a decoder that also sees continuous latents serves it better. With
    `decoder_only` nothing of the encoder changes, the statistics of its batch norm neither.
    """
    if decoder_only:
        stage_a.down_blocks.eval()
    with torch.set_grad_enabled(torch.is_grad_enabled() and not decoder_only):
        quantised = stage_a.encode_quantised(pixels)
    latents = torch.where(through_codes[:, None, None, None], quantised.codes, quantised.latents)
    return stage_a.decode(latents), quantised.loss


@torch.no_grad()
def restart_codes(stage_a: StageA, pixels: Tensor, seed: int) -> None:
    """Move every code that this batch did not use onto one of its latents; a codebook born far from the
    latents would otherwise stay unused [Dhariwal 2020, Jukebox, section 3]."""
    quantised = stage_a.encode_quantised(pixels)
    table = stage_a.vquantizer.codebook.weight
    rows = (quantised.latents * stage_a.config.scale).permute(0, 2, 3, 1).reshape(-1, table.shape[1])
    unused = torch.ones(len(table), dtype=torch.bool, device=table.device)
    rows = everywhere(rows)
    unused[everywhere(quantised.indices.flatten()).unique()] = False
    chosen = torch.randint(len(rows), (len(table),), generator=torch.Generator().manual_seed(seed))
    table[unused] = rows[chosen.to(rows.device)][unused].to(table.dtype)


def latent_deviation(network: nn.Module) -> float:
    """The scale that gives latents_b unit deviation: that of the encoder's closing batch norm, whose outputs
    have the learned gain as deviation."""
    gains = closing_norm(network).weight
    return round(math.sqrt(float(gains.detach().square().mean())), 4)


def closing_norm(network: nn.Module) -> nn.BatchNorm2d:
    """The last batch norm of the encoder."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    return norms[-1]
