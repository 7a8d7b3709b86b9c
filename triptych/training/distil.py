"""Distilling Stage C into a LoRA of itself: what took two branches, or many steps, in one and in few.

    guidance     without guidance the taught network answers what the base answers with it
                 [Meng et al. 2023, section 3.1, for one weight]: half of the work of a step
    consistency  from any noise level it answers the end of the base's guided path at once
                 [Song et al. 2023, algorithm 2; Luo et al. 2023, LCM, algorithm 1]: 2 to 4 steps of `lcm`

The teacher is the same network with its adapters off, so that no copy of it is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triptych.diffusion.denoiser import guide
from triptych.diffusion.loss import AdaptiveWeight
from triptych.diffusion.prediction import add_noise, to_x0_eps
from triptych.diffusion.schedule import Schedule, training_times
from triptych.training.config import RunSettings
from triptych.training.draws import Draws
from triptych.training.encoders import Encoded, Encoders
from triptych.training.prior import without_adapters
from triptych.training.task import Losses

HUBER = 0.00054  # of the pseudo-Huber constant, times the root of the count [Song and Dhariwal 2023, eq. 8]


class Told(NamedTuple):
    """What both networks are told beside x and t: text (B,n,W), pooled (B,W), and the same of no text."""

    hidden: Tensor
    pooled: Tensor
    empty_hidden: Tensor
    empty_pooled: Tensor


def distil_loss(
    settings: RunSettings,
    network: nn.Module,
    encoded: Encoded,
    draws: Draws,
    adaptive: AdaptiveWeight,
    encoders: Encoders,
    device: torch.device,
) -> Losses:
    """The loss that `distil.kind` names; arguments are those of `recipes.stage_c_loss`."""
    assert encoders.text is not None
    count = len(encoded.text_hidden)
    windows = encoded.text_hidden.shape[1] // encoders.text.window
    empty = (part.expand(count, *part.shape[1:]) for part in encoders.empty_text(windows))
    text = (encoded.text_hidden, encoded.text_pooled, *empty)
    told = Told(*(part.detach().to(device) for part in text))
    x0 = encoded.latents_c.to(device)
    uniform, eps = draws.uniform(), draws.normal(x0.shape[1:]).to(device)
    if settings.distil.kind == "guidance":
        return guidance_loss(settings, network, told, x0, eps, training_times(uniform).to(device))
    return consistency_loss(settings, network, told, x0, eps, uniform)


def guidance_loss(
    settings: RunSettings, network: nn.Module, told: Told, x0: Tensor, eps: Tensor, t: Tensor
) -> Losses:
    """Squared distance of the plain answer to the base's guided one, x0 and eps (B,C,H,W), t (B,)."""
    schedule = Schedule()
    logsnr = schedule.logsnr(t)
    x, time = add_noise(x0, eps, logsnr), schedule.time(logsnr)
    wanted = guided_answer(settings, network, told, x, time)
    answer = network(x, time, told.hidden, told.pooled)
    per_sample = (answer - wanted).float().square().flatten(1).mean(1)
    return Losses(per_sample.mean(), per_sample.detach(), t)


def consistency_loss(
    settings: RunSettings, network: nn.Module, told: Told, x0: Tensor, eps: Tensor, uniform: Tensor
) -> Losses:
    """Pseudo-Huber distance of the answers at two neighbouring levels of one guided path, uniform (B,).

    The path is the base's step of DDIM on the grid that generation uses. At its end the answer is what the
    step itself came to, which is what holds the rest in place.
    """
    schedule = Schedule(float(settings.diffusion.sampling.get("shift", 1.0)))
    times, logsnrs = schedule.grid(settings.distil.levels)
    index = (uniform * settings.distil.levels).long()
    here, there = (logsnrs[index + step].to(x0.device) for step in (0, 1))
    kind = settings.diffusion.prediction
    x = add_noise(x0, eps, here)
    guided = guided_answer(settings, network, told, x, schedule.time(here))
    with torch.no_grad():
        end, noise = to_x0_eps(kind, x, guided, here)
        nearer = add_noise(end, noise, there)  # DDIM at eta 0 [Song et al. 2021, eq. 12]
        answer = network(nearer, schedule.time(there), told.hidden, told.pooled)
        aim, _ = to_x0_eps(kind, nearer, answer, there)
        last = (index + 1 == settings.distil.levels).to(x0.device)
        aim = torch.where(last.view(-1, 1, 1, 1), end, aim)
    answer = network(x, schedule.time(here), told.hidden, told.pooled)
    got, _ = to_x0_eps(kind, x, answer, here)
    rounding = HUBER * x0[0].numel() ** 0.5
    squared = (got - aim).float().square().flatten(1).sum(1)
    per_sample = (squared + rounding**2).sqrt() - rounding
    return Losses(per_sample.mean(), per_sample.detach(), times[index].to(x0.device))


@torch.no_grad()
def guided_answer(settings: RunSettings, network: nn.Module, told: Told, x: Tensor, time: Tensor) -> Tensor:
    """What the base answers to x (B,C,H,W) at times (B,) with `distil.guidance`, both branches at once."""
    rescale: Any = settings.diffusion.sampling.get("rescale", 0.0)
    hidden = torch.cat([told.hidden, told.empty_hidden])
    pooled = torch.cat([told.pooled, told.empty_pooled])
    with without_adapters(network):
        cond, uncond = network(torch.cat([x, x]), torch.cat([time, time]), hidden, pooled).chunk(2)
    return guide(cond, uncond, settings.distil.guidance, float(rescale))
