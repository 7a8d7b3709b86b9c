"""Which part of a cascade a file holds, in which layout and of what size, told from names and shapes alone.

The order of the questions matters: a LoRA file names Stage C's layers too, a ComfyUI file holds several
parts, and a ControlNet has an EfficientNet inside. The file's name is never looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from triptych.checkpoints.keys import COMFYUI_MARK

Shapes = Mapping[str, tuple[int, ...]]

STAGE_C_SIZES = {2048: "3.6b", 1536: "1b"}  # rows of clip_txt_mapper.weight
STAGE_B_SIZES = {640: "1.5b", 576: "700m"}  # last side of down_blocks.1.0.channelwise.0.weight

# What a part is called in a sentence.
PART_NAMES = {
    "stage_a": "Stage A",
    "stage_b": "Stage B (the decoder)",
    "stage_c": "Stage C (the prior)",
    "semantic": "the semantic encoder",
    "previewer": "the previewer",
    "text_encoder": "a text encoder",
    "image_encoder": "an image encoder",
    "judge": "a judge for evaluation",
    "lora": "a LoRA",
    "controlnet": "a ControlNet",
    "saliency": "a saliency network, which finds masks for inpainting",
    "pidinet": "an edge network, which makes soft-edge hints",
    "latents": "a picture's latents",
    "token": "a learned token",
    "discriminator": "Stage A's discriminator (only for training)",
    "wuerstchen_prior": "the prior of Würstchen v2",
    "wuerstchen_decoder": "the decoder of Würstchen v2",
    "wuerstchen_semantic": "the semantic encoder of Würstchen v2",
    "fp8": "a model stored as scaled 8-bit floats",
}


@dataclass(frozen=True)
class Sniffed:
    """`layout` is one of keys.LAYOUTS, "comfyui_single", or a maker's word for LoRA; `size` a published one.

    `parts` lists all parts inside a ComfyUI single file, otherwise just `part`.
    """

    layout: str
    part: str
    size: str | None = None
    parts: tuple[str, ...] = ()


def sniff(shapes: Shapes) -> Sniffed | None:
    """Tell what a file is from its tensor names and shapes; None when nothing known fits."""
    names = list(shapes)
    if "scaled_fp8" in shapes or any(name.endswith(".scaled_fp8") for name in names):
        return Sniffed("comfyui", "fp8")
    if "weights.0.lora_down" in shapes:
        return Sniffed("official", "lora", STAGE_C_SIZES.get(_rows(shapes, "weights.0.lora_up")))
    if any(marks_lora(name) for name in names):
        return Sniffed("named", "lora")
    if any(name.startswith(COMFYUI_MARK) for name in names):
        return _sniff_comfyui(shapes)
    if any(name.startswith("projections.") for name in names):
        size = STAGE_C_SIZES.get(_rows(shapes, "projections.0.2.weight"))
        return Sniffed("official", "controlnet", size)
    return _sniff_wuerstchen(shapes) or _sniff_stage(shapes) or _sniff_small(shapes)


def marks_lora(name: str) -> bool:
    """Whether a tensor's name is one that only LoRA files of any maker have."""
    return (
        "lora_" in name
        or ".lora_A" in name
        or ".lora." in name
        or name.startswith("bundle_emb.")
        or name.endswith((".hada_w1_a", ".lokr_w1", ".oft_R.weight"))
    )


def _sniff_comfyui(shapes: Shapes) -> Sniffed | None:
    inner = {n.removeprefix(COMFYUI_MARK): s for n, s in shapes.items() if n.startswith(COMFYUI_MARK)}
    stage = _sniff_stage(inner)
    if stage is None:
        return None
    if stage.part == "stage_c":
        beside = {
            "text_encoder": "text_encoder.clip_g.",
            "semantic": "vae.encoder.",
            "previewer": "vae.previewer.",
            "image_encoder": "clip_l_vision.",
        }
    else:
        beside = {"text_encoder": "text_encoder.clip_g.", "stage_a": "vae."}
    found = [part for part, prefix in beside.items() if any(name.startswith(prefix) for name in shapes)]
    return Sniffed("comfyui_single", stage.part, stage.size, (stage.part, *found))


def _sniff_wuerstchen(shapes: Shapes) -> Sniffed | None:
    """Würstchen v2, the older family: another network under partly the same names."""
    layout = "diffusers" if any(".attention.to_q." in name for name in shapes) else "official"
    if "projection.weight" in shapes and "cond_mapper.0.weight" in shapes:
        return Sniffed(layout, "wuerstchen_prior")
    if any(name.startswith("effnet_mappers.") for name in shapes):
        return Sniffed(layout, "wuerstchen_decoder")
    # Its semantic encoder ends in a batch norm with a learned scale, ours has none.
    if "backbone.0.0.weight" in shapes and "mapper.1.weight" in shapes:
        return Sniffed("official", "wuerstchen_semantic")
    return None


def _sniff_stage(shapes: Shapes) -> Sniffed | None:
    if "clf.1.weight" not in shapes:
        return None
    if "clip_txt_mapper.weight" in shapes:
        part, size = "stage_c", STAGE_C_SIZES.get(_rows(shapes, "clip_txt_mapper.weight"))
    elif "effnet_mapper.0.weight" in shapes:
        shape = shapes.get("down_blocks.1.0.channelwise.0.weight", (0,))
        part, size = "stage_b", STAGE_B_SIZES.get(shape[-1] if shape else 0)
    else:
        return None
    return Sniffed(_attention_layout(shapes, part), part, size, (part,))


def _attention_layout(shapes: Shapes, part: str) -> str:
    for mark, layout in (
        (".attention.to_q.", "diffusers"),
        (".attention.attn.to_q.", "comfyui"),
        (".attention.attn.in_proj_weight", "official"),
        (".attention.attn.in_proj.", "triptych"),
    ):
        if any(mark in name for name in shapes):
            return layout
    # Without attention only the pooled mapper of Stage B tells diffusers from the rest.
    return "diffusers" if part == "stage_b" and "clip_txt_pooled_mapper.weight" in shapes else "official"


def _sniff_small(shapes: Shapes) -> Sniffed | None:
    if "vquantizer.codebook.weight" in shapes:
        return Sniffed("official", "stage_a", None, ("stage_a",))
    if "vquantizer.embedding.weight" in shapes:
        return Sniffed("diffusers", "stage_a", None, ("stage_a",))
    if "encoder.0.weight_orig" in shapes and "shuffle.weight" in shapes:
        return Sniffed("official", "discriminator")
    if any(name.startswith("backbone.") for name in shapes) and "mapper.0.weight" in shapes:
        return Sniffed("official", "semantic", None, ("semantic",))
    if any(name.startswith("blocks.11.") for name in shapes) and "blocks.24.weight" in shapes:
        return Sniffed("official", "previewer", None, ("previewer",))
    if any(name.startswith("text_model.") or "transformer.resblocks." in name for name in shapes):
        return Sniffed("transformers", "text_encoder", None, ("text_encoder",))
    if any(name.startswith("vision_model.") for name in shapes):
        return Sniffed("transformers", "image_encoder", None, ("image_encoder",))
    if "downsampler.1.weight" in shapes and "segmentator.6.weight" in shapes:
        return Sniffed("official", "saliency", None, ("saliency",))
    if "init_block.weight" in shapes and "block1_1.conv1.weight" in shapes:
        return Sniffed("official", "pidinet", None, ("pidinet",))
    if "clip_g" in shapes:
        return Sniffed("comfyui", "token")
    return None


def _rows(shapes: Shapes, name: str) -> int:
    shape = shapes.get(name, ())
    return shape[0] if shape else 0
