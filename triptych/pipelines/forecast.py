"""What a model would need on this machine, before it is downloaded: memory by plan, and about how much time.

Networks are built on the meta device, where their operations are counted and nothing is computed. Time is
that count over the speed of a matrix product here, times what usually comes on top.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from triptych.checkpoints.catalog import PUBLISHED, PUBLISHED_SETTINGS, TOWER_PARAMETERS
from triptych.models.stage_a import STAGE_A, StageA
from triptych.models.stage_b import STAGE_B, StageB, StageBConfig
from triptych.models.stage_c import STAGE_C, StageC, StageCConfig
from triptych.pipelines.capacity import Plan, least, peak, plan
from triptych.pipelines.cascade import Cascade
from triptych.pipelines.needs import Need, decode_tiles, decode_working, need_of, trunk_working
from triptych.pipelines.planning import needs_of
from triptych.pipelines.request import Request
from triptych.sizes import latent_size_b, latent_size_c

TEXT_TOKENS = 77
STORED = 2  # bytes a number in the published files that are downloaded
OVERHEAD = 1.6  # time of a step over that of its matrix products alone; see docs/performance.md
PROBE_SIDE = 1024
TOWER_BLOCKS = 32  # layers of the published text tower, which hold nearly all of it


@dataclass(frozen=True)
class Forecast:
    """What one picture of `size` takes. `plan` is None when no plan fits the free memory."""

    model: str
    size: tuple[int, int]  # width, height
    needs: tuple[Need, ...]
    plan: Plan | None
    peak: int  # private bytes over the empty process with the plan; the least there is when none fits
    operations: float  # multiplications and additions, each counted
    seconds: float  # roughly, from a cold start on

    @property
    def stored(self) -> int:
        """Bytes of the files."""
        return sum(need.stored for need in self.needs)


def forecast(
    model: str, device: torch.device, dtype: torch.dtype, free: int, speed: float,
    size: tuple[int, int] | None = None, low_memory: bool = False, int8: bool | None = False,
) -> Forecast:  # fmt: skip
    """Memory and time of one picture by `model`: mini, a folder, or a published name, downloaded or not.

    `free` is in bytes, `speed` in operations a second (see `matmul_speed`). low_memory, int8: see `plan`.
    """
    if model in PUBLISHED:
        needs, operations, size = _published(model, size, device, dtype)
    else:
        needs, operations, size = _on_disk(model, size, device, dtype)
    chosen = plan(needs, free, low_memory, int8)
    seconds = OVERHEAD * operations / speed
    return Forecast(
        model,
        size,
        tuple(needs),
        chosen,
        least(needs) if chosen is None else peak(needs, chosen),
        operations,
        seconds,
    )


def _published(
    model: str, size: tuple[int, int] | None, device: torch.device, dtype: torch.dtype
) -> tuple[list[Need], float, tuple[int, int]]:
    item, on_cpu = dtype.itemsize, device.type == "cpu"
    mapped = on_cpu and dtype == torch.bfloat16  # computed with as the files have them
    published, settings = PUBLISHED[model], PUBLISHED_SETTINGS
    stage_c, stage_b = STAGE_C[published.stage_c], STAGE_B[published.stage_b]
    width, height = size or settings["stage_c"]["default_size"]
    shapes = {
        "stage_c": _shapes(StageC, stage_c),
        "stage_b": _shapes(StageB, stage_b),
        "stage_a": _shapes(StageA, STAGE_A["full"]),
    }
    latents_c, latents_b = latent_size_c(height, width), latent_size_b(height, width)
    working = {
        "stage_c": trunk_working(stage_c, *latents_c, 1, item),
        "stage_b": trunk_working(stage_b, *latents_b, 1, item),
    }
    tower = TOWER_PARAMETERS["text_encoder"]
    needs = [
        Need(
            "text_encoder", tower, tower * STORED, tower // TOWER_BLOCKS, tower // 10, TEXT_TOKENS * 2**16,
            item, tower * 9 // 10, mapped,
        ),
        need_of("stage_c", shapes["stage_c"], STORED, working["stage_c"], item, mapped),
        need_of("stage_b", shapes["stage_b"], STORED, working["stage_b"], item, mapped),
        need_of(
            "stage_a", shapes["stage_a"], 4, decode_working(STAGE_A["full"], height, width, device.type),
            mapped=on_cpu, tiles=decode_tiles(STAGE_A["full"], height, width, device.type),
        ),
    ]  # fmt: skip
    operations = _operations(stage_c, stage_b, latents_c, latents_b, settings["stage_c"], settings["stage_b"])
    return needs, operations, (width, height)


def _on_disk(
    model: str, size: tuple[int, int] | None, device: torch.device, dtype: torch.dtype
) -> tuple[list[Need], float, tuple[int, int]]:
    name = str(dtype).removeprefix("torch.")
    request = Request(prompt="", model=model, device=str(device), dtype=name, size=size, batch=1)
    cascade = Cascade.for_request(request)
    request = cascade.resolve(request)
    height, width = request.sides()
    stage_c, stage_b = cascade.parts.info("stage_c"), cascade.parts.info("stage_b")
    operations = _operations(
        StageCConfig(**stage_c.config), StageBConfig(**stage_b.config),
        cascade.parts.size_c(height, width), latent_size_b(height, width), stage_c.settings, stage_b.settings,
    )  # fmt: skip
    return needs_of(cascade.parts, request), operations, (width, height)


def _shapes(build: Any, config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network: nn.Module = build(config)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _operations(
    stage_c: StageCConfig, stage_b: StageBConfig, latents_c: tuple[int, int], latents_b: tuple[int, int],
    settings_c: dict[str, Any], settings_b: dict[str, Any],
) -> float:  # fmt: skip
    """Operations of all steps of Stages B and C for one picture; the other parts take little beside them."""
    branches_c, branches_b = (1 if settings["guidance"] == 1 else 2 for settings in (settings_c, settings_b))
    pooled = torch.empty(1, stage_c.pooled_width, device="meta")
    x_c = torch.empty(1, stage_c.channels, *latents_c, device="meta")
    x_b = torch.empty(1, stage_b.channels, *latents_b, device="meta")
    text = torch.empty(1, TEXT_TOKENS, stage_c.text_width, device="meta")
    t = torch.empty(1, device="meta")
    semantic = torch.empty(1, stage_b.semantic_channels, *latents_c, device="meta")
    with torch.device("meta"):
        network_c, network_b = StageC(stage_c), StageB(stage_b)
    per_c = count_operations(network_c, x_c, t, text, pooled)
    per_b = count_operations(network_b, x_b, t, semantic, pooled)
    return per_c * branches_c * settings_c["steps"] + per_b * branches_b * settings_b["steps"]


def count_operations(network: nn.Module, *inputs: torch.Tensor) -> float:
    """Multiplications and additions in the matrix products of one call, on the meta device.

    Of the plain formulas, which gradients make networks take: the counter does not see products in place.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        network.eval()(*inputs)
    return float(counter.get_total_flops())


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product of 1024 rows here: the best of three."""
    matrix = torch.ones(PROBE_SIDE, PROBE_SIDE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading a number waits for an accelerator
        best = min(best, time.perf_counter() - start)
    return 2 * PROBE_SIDE**3 / best
