"""Recorded schedule, noising, loss weights and sampler trajectories, computed by triptych.diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from triptych.diffusion.denoiser import Branch, Denoiser, Guidance
from triptych.diffusion.loss import AdaptiveWeight, p2_weight
from triptych.diffusion.prediction import add_noise, offset_noise, pyramid_noise, target, to_x0_eps
from triptych.diffusion.samplers import SAMPLERS, Step, sample_ddim
from triptych.diffusion.schedule import NORMALISER, Schedule, alpha_sigma, training_times

KINDS = {"EpsilonTarget": "eps", "VTarget": "v", "X0Target": "x0"}


def check_schedule(golden: Any) -> dict[str, Tensor]:
    """λ, α, σ and t' on a grid of t for three shifts, the inverse on a grid of λ, step grids."""
    out: dict[str, Tensor] = {}
    t, logsnr = golden["in.t"], golden["in.logsnr"]
    for name, shift in (("0.5", 0.5), ("1", 1.0), ("2", 2.0)):
        schedule = Schedule(shift)
        levels = schedule.logsnr(t)
        out[f"out.logsnr.shift_{name}"] = levels
        out[f"out.alpha.shift_{name}"], out[f"out.sigma.shift_{name}"] = alpha_sigma(levels)
        out[f"out.network_t.shift_{name}"] = schedule.time(levels)
    out["out.alpha"], out["out.sigma"] = alpha_sigma(logsnr)
    out["out.network_t"] = Schedule().time(logsnr)
    out["out.limits"] = Schedule().logsnr(torch.tensor([1.0, 0.0]))
    out["out.m"] = torch.tensor([NORMALISER])
    for name, steps, start in (("4", 4, 1.0), ("10", 10, 1.0), ("20", 20, 1.0), ("16_from_0.8", 16, 0.8)):
        out[f"out.grid_{name}"], out[f"out.grid_{name}.logsnr.shift_2"] = Schedule(2.0).grid(steps, start)
    out["out.train_logsnr"] = Schedule().logsnr(training_times(golden["in.train_uniform"]))
    return out


def check_loss_weights(golden: Any) -> dict[str, Tensor]:
    """P2 weights and the adaptive table through six updates."""
    logsnr = golden["in.logsnr"]
    adaptive = AdaptiveWeight()
    out = {
        "out.p2": p2_weight(logsnr),
        "out.p2.k2_gamma0.5": p2_weight(logsnr, k=2.0, gamma=0.5),
        "out.p2.loss_shift_2": p2_weight(logsnr + 2 * math.log(2)),
        "out.adaptive.edges": adaptive.edges,
        "out.adaptive.initial": adaptive(logsnr),
    }
    for index in range(6):
        adaptive.update(golden[f"in.update{index}.logsnr"], golden[f"in.update{index}.loss"])
        out[f"out.adaptive.losses_after_{index}"] = adaptive.losses
    out["out.adaptive.final"] = adaptive(logsnr)
    return out


def check_training_noise(golden: Any) -> dict[str, Tensor]:
    """Noising and its inversion for each target, offset noise, pyramid noise."""
    out: dict[str, Tensor] = {}
    x0, t = golden["in.x0"], golden["in.t"]
    runs = (
        ("eps", "eps", 1.0, 0.0),
        ("v", "v", 1.0, 0.0),
        ("x0", "x0", 1.0, 0.0),
        ("eps_shift2", "eps", 2.0, 0.0),
        ("offset0.1", "eps", 1.0, 0.1),
    )
    for name, kind, shift, offset in runs:
        schedule = Schedule(shift)
        logsnr = schedule.logsnr(t)
        eps = offset_noise(golden["in.eps"], golden["in.offset"], offset)
        noised, wanted = add_noise(x0, eps, logsnr), target(kind, x0, eps, logsnr)
        recovered_x0, recovered_eps = to_x0_eps(kind, noised, wanted, logsnr)
        results = {
            "logsnr": logsnr,
            "network_t": schedule.time(logsnr),
            "noised": noised,
            "target": wanted,
            # Recorded with a loss shift equal to the schedule's, which undoes it.
            "p2_weight": p2_weight(logsnr + 2 * math.log(shift)),
            "recovered_x0": recovered_x0,
            "recovered_eps": recovered_eps,
        }
        out |= {f"out.{name}.{key}": value for key, value in results.items()}
    for name in ("small", "square", "tall", "wide"):
        draws = _in_order(golden, f"in.pyramid.{name}")
        out[f"out.pyramid.{name}"] = pyramid_noise(golden[f"in.pyramid.{name}.base"].shape, draws)
    return out


def _in_order(golden: Any, prefix: str) -> Callable[[tuple[int, ...]], Tensor]:
    def recorded() -> Iterator[Tensor]:
        yield golden[f"{prefix}.base"]
        for level in range(9):
            yield golden[f"{prefix}.level{level}"]

    draws = recorded()

    def normal(shape: tuple[int, ...]) -> Tensor:
        draw = next(draws)
        assert tuple(draw.shape) == shape
        return draw

    return normal


def check_samplers(golden: Any) -> dict[str, Tensor]:
    """Trajectories of every official sampler with a closed-form network.

    The official rescale takes one deviation over the whole batch. Ours takes one per image, so the whole
    batch is handed to the samplers as a single image, (1, B*C, H, W), and unfolded for the network.
    """
    out: dict[str, Tensor] = {}
    batch = golden["in.x_start"].shape
    constants = {"cond": golden["in.cond"], "uncond": golden["in.uncond"]}

    def predict(x: Tensor, t: Tensor, branches: Sequence[Branch]) -> list[Tensor]:
        x = x.reshape(batch)
        answer = 0.8 * x * t + 0.3 * torch.sin(3 * x) * (1 - t)
        return [(answer + constants[branch]).reshape(1, -1, *batch[2:]) for branch in branches]

    for run in golden.config["runs"]:
        for key, value in run_sampler(run, predict, golden, batch).items():
            out[f"out.{run['name']}.{key}"] = value
    return out


def run_sampler(run: dict[str, Any], predict: Any, golden: Any, batch: torch.Size) -> dict[str, Tensor]:
    """One recorded run: x0, x and prediction after every step, each (steps, B, C, H, W)."""
    weight = run["cfg"]
    guidance = None
    if weight is not None:
        guidance = Guidance(tuple(weight) if isinstance(weight, list) else weight, run["cfg_rho"])
    schedule = Schedule(run["shift"])
    denoise = Denoiser(predict, schedule, KINDS[run["target"]], guidance)
    draws = golden[f"noise.{run['name']}"].reshape(run["timesteps"], 1, -1, *batch[2:])
    grid = schedule.grid(run["timesteps"], run["t_start"], run["t_end"])
    x = golden["in.x_start"].reshape(1, -1, *batch[2:])
    eta = run.get("sampler_params", {}).get("eta")
    steps: list[Step]
    if eta is None:
        steps = list(SAMPLERS[run["sampler"]](denoise, x, *grid, draws.__getitem__))
    else:
        steps = list(sample_ddim(denoise, x, *grid, draws.__getitem__, eta=eta))
    keys = ("x0", "x", "prediction")
    return {key: torch.stack([getattr(step, key).reshape(batch) for step in steps]) for key in keys}


CHECKS = {
    "schedule": check_schedule,
    "loss_weights": check_loss_weights,
    "training_noise": check_training_noise,
    "samplers": check_samplers,
}
