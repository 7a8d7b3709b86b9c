"""Recorded training steps of Stage C: noising, weights, optimiser, warm-up, clipping, running average."""

from __future__ import annotations

import copy
from typing import Any

import torch
from golden_checks.trunk import our_names, stage_c_config
from torch import Tensor

from triptych.diffusion.loss import AdaptiveWeight, p2_weight, per_sample_loss
from triptych.diffusion.prediction import add_noise, target
from triptych.diffusion.schedule import Schedule, training_times
from triptych.models.stage_c import StageC
from triptych.training.optim import (
    EmaSettings,
    OptimSettings,
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
    update_ema,
)


def check_training_steps(golden: Any) -> dict[str, Tensor]:
    """A few updates from the weights of `stage_c`: losses, gradient norms, rates, weights, their average."""
    config = golden.config
    settings = OptimSettings(lr=config["lr"], warmup=config["warmup_updates"], clip=1.0)
    ema_settings = EmaSettings(every=config["ema_every"], beta=config["ema_beta"], start=config["ema_start"])
    network = StageC(stage_c_config(config["stage_c"]))
    network.load_state_dict(our_names(golden.sibling("stage_c").under("w.")))
    network.train()
    ema = copy.deepcopy(network)
    optimizer = build_optimizer(network.parameters(), settings)
    adaptive = AdaptiveWeight() if config["adaptive"] else None
    schedule = Schedule()
    rates, norms, losses = [], [], []
    for i in range(config["iterations"]):
        update, part = divmod(i, config["accumulation"])
        rates.append(torch.tensor(learning_rate(update, settings)))
        logsnr = schedule.logsnr(training_times(golden["in.train_uniform"][i]))
        x0, eps = golden["in.latents"][i], golden["in.eps"][i]
        predicted = network(
            add_noise(x0, eps, logsnr),
            schedule.time(logsnr),
            golden["in.text_hidden"][i],
            golden["in.text_pooled"][i],
            golden["in.image_embed"][i],
        )
        loss = per_sample_loss(predicted, target("eps", x0, eps, logsnr))
        losses.append(loss.detach())
        if adaptive is None:
            weight = p2_weight(logsnr)
        else:
            weight = adaptive(logsnr)
            adaptive.update(logsnr, loss)
        ((loss * weight).mean() / config["accumulation"]).backward()
        norms.append(torch.zeros(()))
        if part + 1 == config["accumulation"]:
            norms[-1] = clip_gradients(network.parameters(), settings.clip)
            set_learning_rate(optimizer, learning_rate(update, settings))
            optimizer.step()
            optimizer.zero_grad()
        update_ema(ema, network, i + 1, ema_settings)
    out = {
        "out.lr": torch.stack(rates),
        "out.grad_norm_before_clip": torch.stack(norms),
        "out.loss_per_sample": torch.stack(losses),
    }
    if adaptive is not None:
        out["out.adaptive_losses"] = adaptive.losses
    for prefix, module in (("out.param.", network), ("out.ema.", ema)):
        weights = module.state_dict()
        recorded = {name: name for name in golden.under(prefix)}
        out |= {prefix + name: weights[ours] for ours, name in our_names(recorded).items()}
    return out


CHECKS = {
    "training_steps_p2": check_training_steps,
    "training_steps_adaptive": check_training_steps,
}
