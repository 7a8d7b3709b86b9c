"""One training step of Stage C against the published one: samples a second, and what lies above the matmuls.

    python benchmarks/train_step.py [--width 256] [--batch 2] [--repeats 5] [--threads 1] [--precision ...]

The network has the depth of the 1B model (4, 12, 12, 4 blocks of three layers) and `--width` channels instead
of 1536, on latents of 24 x 24 (1024 pixels). The reference is the published step with the same weights in
diffusers' StableCascadeUNet: noise, prediction, P2-weighted error, gradient norm clipped to 1, plain AdamW.
Ours is `triptych.training.loop.update` as `triptych train` calls it. Both take turns in one process; times
are medians of processor time, which other programs disturb less than wall time. The floor is the matrix
products and attention of our step, forward and backward, timed alone. With `--precision bfloat16` both
networks run under autocast, their weights float32.

A second table adds the frozen semantic encoder (at its published size) and a text tower as narrow as the
network: the published trainer runs them at every step, ours reads what they said from a cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from triptych.checkpoints.files import PartInfo, read_tensors, write_tensors
from triptych.data.batches import BatchOrder
from triptych.diffusion.loss import AdaptiveWeight
from triptych.evaluation.bench import build_theirs, import_theirs, processor, random_network, their_names
from triptych.evaluation.floor import record_products, time_products
from triptych.models.semantic import SEMANTIC, SemanticEncoder
from triptych.models.stage_c import STAGE_C, StageC
from triptych.training.config import RunSettings
from triptych.training.draws import Draws
from triptych.training.encoders import Encoded, Encoders
from triptych.training.loop import update
from triptych.training.optim import build_optimizer
from triptych.training.recipes import stage_c_loss
from triptych.training.state import State
from triptych.training.task import Losses, Task

SIDE, TOKENS, PIXELS = 24, 77, 768  # latents of 1024 pixels; the published trainer encodes 768
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    heads = chosen.width // 64
    config = replace(
        STAGE_C["1b"], widths=(chosen.width,) * 2, heads=(heads,) * 2, cond_width=chosen.width,
        dropout=(0.0, 0.0),
    )  # fmt: skip
    network = random_network(StageC, config, CPU, torch.float32)
    theirs = build_theirs(import_theirs().unet, network, "stage_c")
    theirs.load_state_dict(
        {name: tensor.clone() for name, tensor in theirs.state_dict().items()}, assign=True
    )
    encoded = Encoded(
        torch.randn(chosen.batch, 16, SIDE, SIDE), None, torch.randn(chosen.batch, TOKENS, config.text_width),
        torch.randn(chosen.batch, config.pooled_width), None,
    )  # fmt: skip
    ours = our_step(network, chosen.batch, chosen.precision)
    reference = their_step(theirs, chosen.precision)
    with tempfile.TemporaryDirectory() as folder:
        cached = cache(Path(folder) / "cache.safetensors", encoded)
        encode = published_encoders(chosen.width, chosen.batch)
        seconds = take_turns(
            {
                "ours": lambda: ours(encoded),
                "reference": lambda: reference(encoded),
                "cache": cached,
                "encoders": encode,
            },
            chosen.repeats,
        )
        products = record_products(lambda: with_gradients(ours, encoded))
    floor = time_products(products, clock=time.process_time)
    print(table(seconds, floor, chosen, sum(p.numel() for p in network.parameters())))


def our_step(network: nn.Module, batch: int, precision: Any) -> Callable[[Encoded], None]:
    """The update of the `stage_c` recipe with its default settings."""
    settings = RunSettings(recipe="stage_c", out=".", batch=batch, precision=precision)
    adaptive, encoders = AdaptiveWeight(), Encoders()

    def loss(player: str, encoded: Encoded, draws: Draws, step: int) -> Losses:
        return stage_c_loss(settings, network, encoded, draws, adaptive, encoders, CPU)

    settings = settings.model_copy(
        update={"diffusion": settings.diffusion.model_copy(update={"drop_text": 0.0})}
    )
    network.requires_grad_(True)
    order = BatchOrder([0] * batch, batch)
    task = Task(
        {"stage_c": network}, order, lambda plan, places: None, loss,
        lambda part, network: PartInfo(part, config={}), lambda trained, out: None,
        players={"stage_c": ["stage_c"]},
    )  # fmt: skip
    optimizer = build_optimizer(network.parameters(), settings.optim)
    state = State(task, {}, {"stage_c": optimizer}, settings)
    count = iter(range(1, 10**6))

    def step(encoded: Encoded) -> None:
        number = next(count)
        parts = [(encoded, lambda: Draws(0, number, range(batch)))]
        update(settings, task, state, "stage_c", parts, None, number, CPU)

    return step


def their_step(network: Any, precision: str) -> Callable[[Encoded], None]:
    """The published loop: cosine schedule, epsilon target, P2 weights, clipped AdamW with its defaults."""
    network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step(encoded: Encoded) -> None:
        x0 = encoded.latents_c
        t = (1 - torch.rand(len(x0))).mul(1.08).add(0.001).clamp(0.001, 1.0)
        variance = (torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2).clamp(0.0001, 0.9999)
        logsnr = (variance / (1 - variance)).log()
        eps = torch.randn_like(x0)
        alpha, sigma = variance.sqrt()[:, None, None, None], (1 - variance).sqrt()[:, None, None, None]
        told = {
            "x": alpha * x0 + sigma * eps, "t": t, "text_hidden": encoded.text_hidden,
            "text_pooled": encoded.text_pooled[:, None], "image_embed": torch.zeros(len(x0), 1, 768),
        }  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            predicted = network(**their_names(told), return_dict=False)[0].float()
        error = nn.functional.mse_loss(predicted, eps, reduction="none").mean(dim=[1, 2, 3])
        (error * (1 + logsnr.exp()) ** -1).mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def cache(path: Path, encoded: Encoded) -> Callable[[], Tensor]:
    """Reading one batch from a file of float16 tensors, as training/cache.py keeps them."""
    kept = {"c": encoded.latents_c, "t": encoded.text_hidden, "p": encoded.text_pooled}
    write_tensors(path, {name: tensor.half() for name, tensor in kept.items()})
    tensors = read_tensors(path)
    return lambda: torch.stack([tensor.float().sum() for tensor in tensors.values()])


def published_encoders(width: int, batch: int) -> Callable[[], None]:
    """The semantic encoder and a text tower on one batch: what a step without a cache does first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    semantic = SemanticEncoder(SEMANTIC["full"]).eval().requires_grad_(False)
    side = max(64, 1280 * width // 1536 // 64 * 64)
    told = CLIPTextConfig(
        hidden_size=side, intermediate_size=4 * side, num_hidden_layers=32, num_attention_heads=side // 64
    )
    text = CLIPTextModelWithProjection(told).eval().requires_grad_(False)
    pixels, tokens = torch.rand(batch, 3, PIXELS, PIXELS), torch.randint(0, 49000, (batch, TOKENS))

    @torch.no_grad()
    def encode() -> None:
        semantic(pixels)
        text(tokens, output_hidden_states=True)

    return encode


def with_gradients(step: Callable[[Encoded], None], encoded: Encoded) -> None:
    with torch.enable_grad():
        step(encoded)


def take_turns(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, call in contenders.items():
            start = time.process_time()
            call()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: median(times) for name, times in seconds.items()}


def table(seconds: dict[str, float], floor: float, chosen: argparse.Namespace, parameters: int) -> str:
    """Both results as Markdown."""
    ours, theirs = seconds["ours"], seconds["reference"]
    cached, encoding = ours + seconds["cache"], theirs + seconds["encoders"]
    rows = [
        f"{processor(CPU)}, {chosen.threads} thread(s), {chosen.precision}, "
        f"{parameters / 1e6:.0f} M parameters, batch {chosen.batch}",
        "",
        "| | triptych | reference | ratio |",
        "|---|---|---|---|",
        f"| step, samples a second | {chosen.batch / ours:.3f} | {chosen.batch / theirs:.3f} | "
        f"{theirs / ours:.2f} |",
        f"| seconds above the floor of {floor:.2f} | {ours - floor:.2f} | {theirs - floor:.2f} | "
        f"{(ours - floor) / max(theirs - floor, 1e-9):.2f} |",
        f"| with data, samples a second (ours from a cache, the reference encodes) | "
        f"{chosen.batch / cached:.3f} | {chosen.batch / encoding:.3f} | {encoding / cached:.2f} |",
        f"| encoding a batch, seconds | {seconds['cache']:.4f} (reads) | {seconds['encoders']:.2f} | |",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
