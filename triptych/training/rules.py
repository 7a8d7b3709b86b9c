"""Which savings of memory go together, and why others do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triptych.training.config import RunSettings

TRUNKS = ("stage_b", "stage_c", "lora", "controlnet")  # recipes that run Stages B or C


def conflicts(settings: RunSettings) -> Iterator[str]:
    """A sentence for every pair of settings that cannot work together."""
    optim = settings.optim
    if optim.fused_backward:
        if settings.accumulate > 1:
            yield (
                f"optim.fused_backward frees every gradient at once, so accumulate = {settings.accumulate} "
                "has nothing to add up: use accumulate = 1"
            )
        if optim.clip > 0 and optim.clip_by == "whole":
            yield (
                "optim.fused_backward never holds the whole gradient, so its norm cannot be clipped: use "
                'optim.clip_by = "layer", or optim.clip = 0'
            )
        if optim.kind == "schedule_free":
            yield (
                'optim.kind = "schedule_free" counts updates for all parameters together and cannot move '
                "them one by one as optim.fused_backward does: use another kind"
            )
        if settings.not_finite == "skip":
            yield (
                "optim.fused_backward has moved some weights before it meets a gradient that is no number, "
                'so the update cannot be left out: use not_finite = "stop"'
            )
        if settings.shard:
            yield (
                "optim.fused_backward moves weights before other processes have added their gradients: leave "
                "out shard"
            )
    if settings.checkpointing and settings.recipe not in TRUNKS:
        yield (
            f"checkpointing recomputes blocks of Stages B and C; recipe {settings.recipe} has none: "
            "leave it out"
        )
    if settings.weights == "bfloat16":
        if settings.recipe not in TRUNKS[:2]:
            yield (
                f'weights = "bfloat16" is for stage_b and stage_c, not for recipe {settings.recipe} (a LoRA '
                "has lora.base): leave it out"
            )
        if not settings.checkpointing:
            yield (
                'weights = "bfloat16" saves nothing while widened copies wait for the backward pass: add '
                "checkpointing = true"
            )
        if optim.kind == "schedule_free":
            yield (
                'optim.kind = "schedule_free" interpolates weights at every step, for which bfloat16 is too '
                'coarse: use weights = "float32"'
            )
    if settings.diffusion.train_text:
        if settings.recipe != "stage_c":
            yield (
                f"diffusion.train_text lets the text encoder learn beside Stage C, not with recipe "
                f"{settings.recipe}: leave it out"
            )
        if settings.data.cache:
            yield (
                "data.cache holds what the text encoder said before training, and diffusion.train_text "
                "changes it: leave one of them out"
            )
        if settings.shard:
            yield "diffusion.train_text is for networks that every process holds whole: leave out shard"
    if settings.parts.offload and (settings.recipe == "lora" or settings.diffusion.train_text):
        learns = 'a LoRA holds its text encoder as lora.base says (lora.base = "int8", say)'
        if settings.recipe != "lora":
            learns = "diffusion.train_text moves the weights of the text encoder"
        yield f"parts.offload leaves frozen towers in their files, but {learns}: leave it out"
    if settings.distil.kind != "none":
        own = settings.lora
        if settings.recipe != "lora" or own.token or own.prior or own.parts != ("stage_c",):
            yield (
                f'distil.kind = "{settings.distil.kind}" teaches a LoRA what its base answers: use recipe = '
                '"lora", lora.token = false, lora.prior = 0 and lora.parts = ["stage_c"]'
            )
    if settings.lora.base != "float32" and settings.recipe == "lora" and not settings.checkpointing:
        yield (
            f'lora.base = "{settings.lora.base}" saves nothing while widened copies wait for the backward '
            "pass: add checkpointing = true"
        )
