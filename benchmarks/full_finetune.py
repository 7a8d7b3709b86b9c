"""One real training step of a full-size Stage C on the CPU, and the private memory it takes.

    python benchmarks/full_finetune.py --size 1b
    python benchmarks/full_finetune.py --size 1b --blocks 1   # fewer blocks a level, for a quick look

Weights are bfloat16, widened block by block in the forward and backward pass; every gradient is applied by
Adafactor and freed inside the backward pass. Latents are those of a 1024 x 1024 picture, batch 1. Values are
random: only time and memory are looked at.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import threading
import time
from pathlib import Path

import torch

from triptych.models.stage_c import STAGE_C, StageC
from triptych.pipelines.placement import blocks_of
from triptych.training.checkpointing import checkpoint_blocks, is_matrix, store_blocks
from triptych.training.config import check_settings
from triptych.training.footprint import backward_peak, trace
from triptych.training.fused import FusedUpdate
from triptych.training.optim import OptimSettings, build_optimizer
from triptych.training.plan import step_inputs, weight_bytes

GIB = 2**30


def memory(field: str) -> int:
    """Bytes of this process: RssAnon is private, RssFile are pages of mapped files."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1b", choices=["1b", "3.6b"])
    parser.add_argument("--blocks", type=int, default=0, help="blocks a level, in place of the published")
    given = parser.parse_args()
    config = STAGE_C[given.size]
    if given.blocks:
        config = dataclasses.replace(config, down_blocks=(given.blocks,) * 2, up_blocks=(given.blocks,) * 2)
    settings = check_settings(
        {"recipe": "stage_c", "out": "-", "batch": 1, "data": {"size": 768}, "checkpointing": True,
         "optim": {"fused_backward": True, "clip_by": "layer", "kind": "adafactor"}}, "benchmark",
    )  # fmt: skip
    with torch.device("meta"):
        network = StageC(config)
    inputs = step_inputs(settings, network)
    maps, gradients = backward_peak(*trace(network, inputs), recomputed=True, narrow=True, held=0, update=6)
    planned = weight_bytes(network.parameters(), "bfloat16") + maps + gradients
    for block in blocks_of(network):
        for parameter in block.parameters():
            if is_matrix(parameter):
                parameter.data = parameter.data.to(torch.bfloat16)
    torch.ones(64, 64, requires_grad=True).matmul(torch.ones(64, 64)).sum().backward()
    build_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], OptimSettings(kind="adafactor"))
    start, files = memory("RssAnon"), memory("RssFile")
    network.to_empty(device="cpu").train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-0.01, 0.01)
    store_blocks(network, "bfloat16")
    checkpoint_blocks(network)
    optimizer = build_optimizer(network.parameters(), settings.optim)
    inside = FusedUpdate(optimizer, 1.0, seed=0)
    told = {name: torch.rand(tensor.shape) for name, tensor in inputs.items()}
    peak, going = [0, 0], True

    def watch() -> None:
        while going:
            peak[0] = max(peak[0], memory("RssAnon") - start)
            peak[1] = max(peak[1], memory("RssFile") - files)
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    begun = time.monotonic()
    try:
        with inside.step(0):
            (network(**told) - told["x"]).square().mean().backward()
    finally:
        going = False
        thread.join()
    seconds = time.monotonic() - begun
    numbers = sum(p.numel() for p in network.parameters())
    print(f"Stage C {given.size}, {numbers / 1e9:.2f} billion weights, 24 x 24 latents, batch 1")
    print(f"planned {planned / GIB:.2f} GiB, measured {peak[0] / GIB:.2f} GiB private at most")
    print(f"and {peak[1] / GIB:.2f} GiB of mapped files; {seconds:.0f} s, gradient norm {inside.norm:.3g}")


if __name__ == "__main__":
    main()
