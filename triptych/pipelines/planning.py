"""Where the weights of a model live while one request is carried out, or which smaller request would fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from triptych.errors import CapacityError
from triptych.models.stage_a import StageAConfig
from triptych.models.stage_b import StageBConfig
from triptych.models.stage_c import StageCConfig
from triptych.pipelines.capacity import Plan, gigabytes, least, plan, refusal, room_on
from triptych.pipelines.needs import (
    Need,
    decode_tiles,
    decode_working,
    measure,
    text_working,
    trunk_kept,
    trunk_working,
)
from triptych.pipelines.parts import FLOAT32_PARTS, Parts
from triptych.pipelines.request import MAX_BATCH, Request
from triptych.sizes import latent_size_b

TOKENS_C, TOKENS_B = 77 + 8, 4  # condition tokens of the published networks
PLANNED = ("text_encoder", "stage_c", "stage_b", "stage_a")


def plan_requests(parts: Parts, requests: Sequence[Request]) -> Plan:
    """Where weights live for resolved requests. Raises CapacityError naming what would fit.

    The encoders of source pictures are not counted: they are far smaller than Stage C, and are let go of
    before it is loaded.
    """
    limits = [request.max_memory for request in requests if request.max_memory is not None]
    room = room_on(parts.device, min(limits, default=None))
    by_request = [needs_of(parts, request) for request in requests]
    needs = [max(same, key=lambda need: need.working) for same in zip(*by_request, strict=True)]
    chosen = _plan(needs, room, requests[0], len(requests) > 1 or _batches(requests[0]) > 1)
    if chosen is None:
        worst = max(requests, key=lambda request: request.sides()[0] * request.sides()[1])
        raise _refused(parts, worst, needs, room)
    return chosen


def _plan(needs: Sequence[Need], room: int, request: Request, several: bool) -> Plan | None:
    int8 = request.int8
    if int8 is None and request.max_memory is None:
        int8 = False  # a picture is never rounded unasked
    return plan(needs, room, request.low_memory, int8, several)


def _batches(request: Request) -> int:
    return -(-len(request.prompts) * request.count // (request.batch or MAX_BATCH))


def needs_of(parts: Parts, request: Request, planned: Sequence[str] = PLANNED) -> list[Need]:
    """What each planned part of the model needs for this request."""
    item, pictures = parts.dtype.itemsize, min(request.batch or 1, len(request.prompts) * request.count)
    height, width = request.sides()
    stage_c = StageCConfig(**parts.info("stage_c").config)
    stage_b = StageBConfig(**parts.info("stage_b").config)
    stage_a = StageAConfig(**parts.info("stage_a").config)
    shapes = {part: parts.shapes(part) for part in planned}
    working = {
        "text_encoder": text_working(shapes.get("text_encoder", {}), item),
        "stage_c": trunk_working(stage_c, *parts.size_c(height, width), pictures, item),
        "stage_b": trunk_working(stage_b, *latent_size_b(height, width), pictures, item),
        "stage_a": decode_working(stage_a, height, width, parts.device.type),
    }
    kept = {
        "stage_c": trunk_kept(stage_c, *parts.size_c(height, width), pictures, TOKENS_C, item),
        "stage_b": trunk_kept(stage_b, *latent_size_b(height, width), pictures, TOKENS_B, item),
    }
    tiles = {"stage_a": decode_tiles(stage_a, height, width, parts.device.type)}
    needs = [
        measure(
            part,
            shapes[part],
            parts.header(part),
            working[part],
            torch.float32 if part in FLOAT32_PARTS else parts.dtype,
            parts.device.type,
            tiles.get(part, ()),
        )
        for part in planned
    ]
    return [replace(need, kept=kept.get(need.stage, 0)) for need in needs]


def _refused(parts: Parts, request: Request, needs: Sequence[Need], room: int) -> CapacityError:
    return refusal(needs, room, str(parts.device), _advice(parts, request, room))


def _advice(parts: Parts, request: Request, room: int) -> str:
    height, width = request.sides()
    smaller = [request.replaced(batch=1)]
    while min(width, height) >= 256:
        width, height = width // 2 // 128 * 128, height // 2 // 128 * 128
        smaller.append(request.replaced(batch=1, size=(max(width, 128), max(height, 128))))
    fewest = []
    for attempt in smaller:
        needs = needs_of(parts, attempt)
        fewest.append(least(needs))
        if _plan(needs, room, attempt, False) is not None:
            height, width = attempt.sides()
            return f"It would fit with --batch 1 --size {width}x{height}."
    return (
        f"No size of this model fits, the least is {gigabytes(min(fewest))}; a smaller model (--stage-c 1b "
        "--stage-b 700m, or mini) may."
    )
