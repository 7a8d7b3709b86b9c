"""One real training step of a full-size Stage C on the CPU: the private memory it takes beside the plan.

    python benchmarks/training_memory.py --size 1b
    python benchmarks/training_memory.py --size 3.6b --lora int8
    python benchmarks/training_memory.py --size 1b --blocks 1   # fewer blocks a level, for a quick look

Without `--lora` all weights learn: they are bfloat16, widened block by block in both passes, and every
gradient is applied by Adafactor and freed inside the backward pass. With it the weights are frozen, as
bfloat16 or int8, and adapters of rank 16 on attention learn by AdamW, on two pictures: one to learn from, one
of the base to keep. Latents are those of a 1024 x 1024 picture. Values are random: only time and memory are
looked at. The text tower is left out of both figures.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from sampler import Sampler
from torch import Tensor, nn

from triptych.models.stage_c import STAGE_C, StageC
from triptych.pipelines.placement import blocks_of
from triptych.training.checkpointing import checkpoint_blocks, is_matrix, store_base, store_blocks
from triptych.training.config import RunSettings, check_settings
from triptych.training.footprint import backward_peak, trace
from triptych.training.fused import FusedUpdate, apply_gradients
from triptych.training.lora import inject
from triptych.training.optim import OptimSettings, build_optimizer
from triptych.training.plan import optimizer_bytes, step_inputs, weight_bytes

GIB = 2**30
FULL = {"recipe": "stage_c", "optim": {"fused_backward": True, "clip_by": "layer", "kind": "adafactor"}}


def settings_of(lora: str | None) -> RunSettings:
    shared = {"out": "-", "batch": 1, "data": {"size": 768}, "checkpointing": True}
    own = {"recipe": "lora", "lora": {"base": lora, "token": False}} if lora else FULL
    return check_settings(shared | own, "benchmark")


def random_network(config: Any) -> StageC:
    """With the matrices of blocks in bfloat16 from the start: float32 copies of all never exist."""
    with torch.device("meta"):
        network = StageC(config)
    for block in blocks_of(network):
        for parameter in block.parameters():
            if is_matrix(parameter):
                parameter.data = parameter.data.to(torch.bfloat16)
    network.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-0.01, 0.01)
    return network


def planned(settings: RunSettings, config: Any) -> tuple[int, dict[str, Tensor]]:
    """Bytes the plan foretells for this network, and the inputs of its step, without values."""
    with torch.device("meta"):
        network = StageC(config)
    lora = settings.recipe == "lora"
    if lora:
        network.requires_grad_(False)
        inject(network, settings.lora, "stage_c")
    inputs = step_inputs(settings, network)
    held, copies = (4.0, 1) if lora else (0.0, 6)
    maps, gradients = backward_peak(*trace(network, inputs), True, narrow=True, held=held, update=copies)
    learned = [p for p in network.parameters() if p.requires_grad]
    frozen = [p for p in network.parameters() if not p.requires_grad]
    weights = weight_bytes(learned, "float32" if lora else "bfloat16")
    weights += weight_bytes(frozen, settings.lora.base)
    return weights + maps + gradients + optimizer_bytes(settings, learned), inputs


def full_step(network: StageC, settings: RunSettings) -> Callable[[Callable[[], Tensor]], None]:
    store_blocks(network, "bfloat16")
    checkpoint_blocks(network)
    inside = FusedUpdate(build_optimizer(network.parameters(), settings.optim), 1.0, seed=0)

    def step(loss: Callable[[], Tensor]) -> None:
        with inside.step(0):
            loss().backward()

    return step


def lora_step(network: StageC, settings: RunSettings) -> Callable[[Callable[[], Tensor]], None]:
    network.requires_grad_(False)
    inject(network, settings.lora, "stage_c")
    store_base(network, settings.lora.base)  # type: ignore[arg-type]
    checkpoint_blocks(network)
    optimizer = build_optimizer([p for p in network.parameters() if p.requires_grad], settings.optim)

    def step(loss: Callable[[], Tensor]) -> None:
        loss().backward()
        apply_gradients(optimizer, 0, 0)

    return step


def warm_up(settings: RunSettings) -> None:
    """Load what torch, the optimiser and peft load at first use, so that it does not count."""
    torch.ones(64, 64, requires_grad=True).matmul(torch.ones(64, 64)).sum().backward()
    build_optimizer([nn.Parameter(torch.zeros(2, 2))], OptimSettings(kind=settings.optim.kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1b", choices=["1b", "3.6b"])
    parser.add_argument("--lora", choices=["bfloat16", "int8"], help="teach adapters on weights held so")
    parser.add_argument("--blocks", type=int, default=0, help="blocks a level, in place of the published")
    given = parser.parse_args()
    config = STAGE_C[given.size]
    if given.blocks:
        config = dataclasses.replace(config, down_blocks=(given.blocks,) * 2, up_blocks=(given.blocks,) * 2)
    settings = settings_of(given.lora)
    expected, inputs = planned(settings, config)
    warm_up(settings)
    sampler = Sampler()
    network = random_network(config).train()
    step = (lora_step if given.lora else full_step)(network, settings)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # int8: a real run narrows each matrix from the mapped file
    told = {name: torch.rand(tensor.shape) for name, tensor in inputs.items()}
    sampler.reset()
    begun = time.monotonic()
    try:
        step(lambda: (network(**told) - told["x"]).square().mean())
    finally:
        sampler.close()
    seconds = time.monotonic() - begun
    billions = sum(p.numel() for p in network.parameters()) / 1e9
    print(f"Stage C {given.size}, {billions:.2f} billion weights, 24 x 24 latents, batch {len(told['x'])}")
    print(f"planned {expected / GIB:.2f} GiB, measured {sampler.private / GIB:.2f} GiB private at most")
    print(f"and {sampler.mapped / GIB:.2f} GiB of mapped files; {seconds:.0f} s")


if __name__ == "__main__":
    main()
