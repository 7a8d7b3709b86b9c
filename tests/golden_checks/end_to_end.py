"""The recorded chain C -> B -> A, with the weights of the recordings of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from golden_checks.stage_a import build_stage_a
from golden_checks.trunk import build_stage_b, build_stage_c
from torch import Tensor, nn

from triptych.diffusion.denoiser import Denoiser, Guidance
from triptych.diffusion.prediction import add_noise
from triptych.diffusion.samplers import SAMPLERS
from triptych.diffusion.schedule import Schedule


def sample(
    network: nn.Module,
    branches: dict[str, dict[str, Any]],
    settings: dict[str, Any],
    sampler: str,
    start: Tensor,
    noise: Tensor,
    t_start: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """x0 and x after every step, (steps, B, C, H, W). `branches` are the network's conditions by branch.

    The recordings rescale guidance by one deviation over the whole batch (ours: one per image), so the batch
    is handed to the sampler as if it were the channels of one image.
    """
    batch = start.shape

    def predict(x: Tensor, t: Tensor, wanted: Sequence[str]) -> list[Tensor]:
        images, times = x.reshape(batch), t.expand(batch[0])
        return [network(images, times, **branches[branch]).reshape(x.shape) for branch in wanted]

    as_one = (1, batch[0] * batch[1], *batch[2:])
    schedule = Schedule(settings["shift"])
    guidance = Guidance(settings["cfg"], settings["cfg_rho"])
    grid = schedule.grid(settings["timesteps"], t_start)
    draws = noise.reshape(len(noise), *as_one)
    denoise = Denoiser(predict, schedule, "eps", guidance)
    steps = list(SAMPLERS[sampler](denoise, start.reshape(as_one), *grid, draws.__getitem__))
    x0, x = ([getattr(step, name).reshape(batch) for step in steps] for name in ("x0", "x"))
    return torch.stack(x0), torch.stack(x)


@torch.no_grad()
def check_end_to_end(golden: Any) -> dict[str, Tensor]:
    """From text, from an image embedding, with residuals, and from a noised picture."""
    stage_c = build_stage_c(golden.sibling("stage_c"))
    stage_b = build_stage_b(golden.sibling("stage_b"))
    stage_a = build_stage_a(golden.sibling("stage_a"))
    config = golden.config
    runs = sorted({name.split(".")[1] for name in golden if name.startswith("out.")})
    out = {}
    for run in runs:
        inputs = golden.under(f"in.{run}.")
        count = len(inputs["b_start"])
        empty = {
            "text_hidden": golden["in.empty_text_hidden"].expand(count, -1, -1),
            "text_pooled": golden["in.empty_text_pooled"].expand(count, -1, -1),
        }
        text = {"text_hidden": golden["in.text_hidden"], "text_pooled": golden["in.text_pooled"]}
        numbered = {int(k.removeprefix("residual.")): v for k, v in inputs.items() if "residual" in k}
        residuals = [numbered.get(index) for index in range(max(numbered) + 1)] if numbered else None
        branches = {
            "cond": text | {"image_embed": inputs.get("image_embed"), "residuals": residuals},
            "uncond": empty | {"image_embed": None, "residuals": residuals},
        }
        settings, t_start = config["stage_c_sampling"], 1.0
        start = inputs["c_start"]
        if run == "img2img":
            # The recording noises with another shift than it samples with; the product uses one for both.
            t_start = config["img2img"]["t_start"]
            level = Schedule(config["img2img"]["noising_shift"]).logsnr(torch.tensor(t_start))
            settings = settings | {"timesteps": config["img2img"]["timesteps"]}
            start = add_noise(inputs["latents"], inputs["eps"], level.expand(count))
            out[f"out.{run}.noised"] = start
        x0, x = sample(stage_c, branches, settings, config["sampler"], start, inputs["c_noise"], t_start)
        out |= {f"out.{run}.c_x0": x0, f"out.{run}.c_x": x, f"out.{run}.latents_c": x0[-1]}
        pooled = {branch: given["text_pooled"] for branch, given in branches.items()}
        branches = {
            "cond": {"semantic": x0[-1], "text_pooled": pooled["cond"]},
            "uncond": {"semantic": torch.zeros_like(x0[-1]), "text_pooled": pooled["uncond"]},
        }
        settings = config["stage_b_sampling"]
        x0, _ = sample(stage_b, branches, settings, config["sampler"], inputs["b_start"], inputs["b_noise"])
        out |= {f"out.{run}.b_x0": x0, f"out.{run}.latents_b": x0[-1]}
        out[f"out.{run}.pixels_unclamped"] = stage_a.decode(x0[-1])
    return out


CHECKS = {"end_to_end": check_end_to_end}
