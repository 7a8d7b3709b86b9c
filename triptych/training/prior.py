"""Prior preservation: what the base draws without the token, it goes on drawing [Ruiz 2023, eq. 2].

The base draws a few pictures itself before training. On these the changed network must answer what the base
answers, which is known without a second network: the base is the same one with its adapters off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triptych.checkpoints.files import read_header, read_tensors, write_tensors
from triptych.conditioning.encode import TextEncoder
from triptych.diffusion.prediction import add_noise
from triptych.diffusion.schedule import Schedule, training_times
from triptych.training.config import RunSettings
from triptych.training.draws import Draws

PRIOR_FILE, PRIOR_MARK = "prior.safetensors", "triptych_prior"
TOGETHER = 4  # prior pictures drawn at once


def open_prior(
    settings: RunSettings,
    text: TextEncoder,
    size: tuple[int, int],
    device: torch.device,
    progress: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """Latents of pictures of `size` (width, height) that the base draws for the prior prompts, made once and
    kept beside the run: "c", "b", and "hidden" and "pooled" of the prompts."""
    from triptych.pipelines.cascade import Cascade

    own = settings.lora
    prompts = [prompt.format(word=own.word) for prompt in own.prior_prompts]
    path = Path(settings.out) / PRIOR_FILE
    mark = json.dumps([own.model, prompts, own.prior_pictures, settings.data.size, *own.parts])
    if not path.exists() or read_header(path).metadata.get(PRIOR_MARK) != mark:
        cascade = Cascade.load(own.model, device=str(device))
        # What Stage B draws is kept only where it learns; else one step of it is enough to get past it.
        quick: dict[str, Any] = {} if "stage_b" in own.parts else {"decoder_steps": 1}
        latents: dict[str, list[Tensor]] = {"c": [], "b": []}
        for first in range(0, own.prior_pictures, TOGETHER):
            numbers = range(first, min(first + TOGETHER, own.prior_pictures))
            told = [prompts[number % len(prompts)] for number in numbers]
            result = cascade.generate(told, seeds=tuple(numbers), size=size, **quick)
            latents["c"].append(result.latents_c)
            latents["b"].append(result.latents_b)
            progress(numbers.stop, own.prior_pictures)
        write_tensors(path, {name: torch.cat(rows) for name, rows in latents.items()}, {PRIOR_MARK: mark})
    prior = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    hidden, pooled = text.encode(prompts)
    return prior | {"hidden": hidden, "pooled": pooled}


def prior_loss(
    networks: Mapping[str, nn.Module], prior: Mapping[str, Tensor], noise: Draws, device: torch.device
) -> Tensor:
    """How far the changed networks' answers to the base's own pictures are from the base's answers, ().

    The base is the same network with its adapters off, so that no copy of it is kept.
    """
    count, prompts = len(prior["c"]), len(prior["hidden"])
    rows = (noise.uniform() * count).long()
    hidden, pooled = (prior[name][rows % prompts].to(device) for name in ("hidden", "pooled"))
    total = torch.zeros((), device=device)
    for part, network in networks.items():
        x0 = prior["c" if part == "stage_c" else "b"][rows].to(device)
        schedule = Schedule()
        logsnr = schedule.logsnr(training_times(noise.uniform()).to(device))
        x = add_noise(x0, noise.normal(x0.shape[1:]).to(device), logsnr)
        beside = (hidden, pooled) if part == "stage_c" else (prior["c"][rows].to(device), pooled)
        time = schedule.time(logsnr)
        with torch.no_grad(), without_adapters(network):
            wanted = network(x, time, *beside)
        total = total + (network(x, time, *beside) - wanted).float().square().mean()
    return total


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """The network as it was before adapters were put on it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def gated(network: nn.Module, on: Sequence[bool]) -> Callable[..., Tensor]:
    """The network with its adapters on for the rows of `on`, and off for the rest; a call may have several
    times as many rows (branches of guidance)."""

    def answer(x: Tensor, *beside: Tensor) -> Tensor:
        rows = torch.tensor(on).repeat(len(x) // len(on)).to(x.device)
        made: Tensor | None = None
        for wanted in (True, False):
            own = rows if wanted else ~rows
            if not bool(own.any()):
                continue
            given = [tensor[own] for tensor in (x, *beside)]
            if wanted:
                part = network(*given)
            else:
                with without_adapters(network):
                    part = network(*given)
            made = part.new_empty(len(x), *part.shape[1:]) if made is None else made
            made[own] = part
        assert made is not None
        return made

    return answer
