"""Where the weights of a model live while one request is carried out, or which smaller request would fit."""

from __future__ import annotations

from collections.abc import Sequence

from triptych.errors import CapacityError
from triptych.models.stage_a import StageAConfig
from triptych.models.stage_b import StageBConfig
from triptych.models.stage_c import StageCConfig
from triptych.pipelines.capacity import (
    Need,
    Plan,
    decode_working,
    free_memory,
    measure,
    plan,
    refusal,
    text_working,
    trunk_working,
)
from triptych.pipelines.parts import Parts
from triptych.pipelines.request import Request
from triptych.sizes import latent_size_b

PLANNED = ("text_encoder", "stage_c", "stage_b", "stage_a")


def plan_requests(parts: Parts, requests: Sequence[Request]) -> Plan:
    """Where weights live for resolved requests. Raises CapacityError naming what would fit.

    The encoders of source pictures are not counted: they are far smaller than Stage C, and are let go of
    before it is loaded.
    """
    item, free = parts.dtype.itemsize, free_memory(parts.device)
    needs_by_request = [needs_of(parts, request) for request in requests]
    needs = [max(same, key=lambda need: need.working) for same in zip(*needs_by_request, strict=True)]
    chosen = plan(needs, item, free, requests[0].low_memory)
    if chosen is None:
        worst = max(requests, key=lambda request: request.sides()[0] * request.sides()[1])
        raise _refused(parts, worst, needs, item, free)
    return chosen


def needs_of(parts: Parts, request: Request) -> list[Need]:
    """What each planned part of the model needs for this request."""
    item, pictures = parts.dtype.itemsize, min(request.batch or 1, len(request.prompts) * request.count)
    height, width = request.sides()
    stage_c = StageCConfig(**parts.info("stage_c").config)
    stage_b = StageBConfig(**parts.info("stage_b").config)
    stage_a = StageAConfig(**parts.info("stage_a").config)
    shapes = {part: parts.shapes(part) for part in PLANNED}
    working = {
        "text_encoder": text_working(shapes["text_encoder"], item),
        "stage_c": trunk_working(stage_c, *parts.size_c(height, width), pictures, item),
        "stage_b": trunk_working(stage_b, *latent_size_b(height, width), pictures, item),
        "stage_a": decode_working(stage_a, height, width),
    }
    return [measure(part, shapes[part], parts.header(part), working[part]) for part in working]


def _refused(parts: Parts, request: Request, needs: list[Need], item: int, free: int) -> CapacityError:
    return refusal(needs, item, free, str(parts.device), _advice(parts, request, item, free))


def _advice(parts: Parts, request: Request, item: int, free: int) -> str:
    height, width = request.sides()
    smaller = [request.replaced(batch=1)]
    while min(width, height) >= 256:
        width, height = width // 2 // 128 * 128, height // 2 // 128 * 128
        smaller.append(request.replaced(batch=1, size=(max(width, 128), max(height, 128))))
    for attempt in smaller:
        if plan(needs_of(parts, attempt), item, free, request.low_memory) is not None:
            height, width = attempt.sides()
            return f"It would fit with --batch 1 --size {width}x{height}."
    return "No size of this model fits; a smaller model (--stage-c 1b --stage-b 700m, or mini) may."
