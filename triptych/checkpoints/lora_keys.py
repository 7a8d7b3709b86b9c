"""How makers of LoRA files call the weights of a cascade: one table a part, from every spelling to ours.

Makers write a module's path with dots or underscores, with official or diffusers words, and with a prefix
that names the part; packed attention may be one matrix or three. Underscored paths cannot be undone by
replacing characters, so all spellings of our own modules are listed once and looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

PREFIXES = {
    "stage_c": ("", "prior.", "unet.", "diffusion_model.", "lora_unet_", "lora_prior_unet_", "stage_c."),
    "stage_b": ("decoder.", "lora_decoder_unet_", "stage_b."),
    "text_encoder": ("text_encoder.", "lora_te_", "lora_prior_te_"),
}
PEFT_PREFIX = "base_model.model."
PACKED = ".attention.attn.in_proj"
OUTPUT = ".attention.attn.out_proj"
# Query, key and value of a packed matrix; numbers are OneTrainer's KOHYA and COMFY, read, never written.
THIRDS = (".attention.attn.to_{qkv}", ".attention.to_{qkv}", ".attention.attn.in_proj.{012}")
OUTPUTS = (OUTPUT, ".attention.to_out.0", ".attention.to_out")

# End of a tensor's name -> which factor it is. The longest that fits counts.
SUFFIXES = {
    "lora_down.weight": ("lora", "down"),
    "lora_up.weight": ("lora", "up"),
    "lora.down.weight": ("lora", "down"),
    "lora.up.weight": ("lora", "up"),
    "lora_A.weight": ("lora", "down"),
    "lora_B.weight": ("lora", "up"),
    "lora_A.default.weight": ("lora", "down"),
    "lora_B.default.weight": ("lora", "up"),
    "alpha": ("", "alpha"),
    "dora_scale": ("", "magnitude"),
    "lora_magnitude_vector": ("", "magnitude"),
    "lora_magnitude_vector.weight": ("", "magnitude"),
    "lora_magnitude_vector.default": ("", "magnitude"),
    "lora_magnitude_vector.default.weight": ("", "magnitude"),
    "diff": ("full", "diff"),
    **{
        f"{kind}_{factor}{ending}": (kind if kind == "lokr" else "loha", factor)
        for kind, factors in (
            ("hada", ("w1_a", "w1_b", "w2_a", "w2_b")),
            ("lokr", ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")),
        )
        for factor in factors
        for ending in ("", ".default")
    },
}
# Kinds of change that exist elsewhere and have no counterpart here, by how their names end.
UNKNOWN_KINDS = {
    "oft_R.weight": "an orthogonal rotation (OFT)",
    "oft_blocks": "an orthogonal rotation (OFT)",
    "lora_mid.weight": "a convolution split in three (LoCon with Tucker)",
    "hada_t1": "a convolution split in three (LoHa with Tucker)",
    "lokr_t2": "a convolution split in three (LoKr with Tucker)",
    "diff_b": "a changed bias",
}


@dataclass(frozen=True)
class Place:
    """A matrix of ours: part, module name, and which third of its rows (None: all)."""

    part: str
    target: str
    third: int | None = None


def matrices(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Modules with a matrix that a low-rank change fits: linear layers and 1x1 convolutions."""
    found = []
    for name in names:
        shape = shapes[name]
        if name.endswith(".weight") and len(shape) in (2, 4) and all(side == 1 for side in shape[2:]):
            found.append(name.removesuffix(".weight"))
    return found


def spellings(part: str, target: str) -> Iterator[tuple[str, int | None]]:
    """All dotted spellings of one module of ours without a prefix, each with its third."""
    yield target, None
    if target.endswith(PACKED):
        stem = target.removesuffix(PACKED)
        for pattern in THIRDS:
            letters = re.search(r"\{(.*)\}", pattern)
            assert letters is not None
            for third, letter in enumerate(letters[1]):
                yield stem + re.sub(r"\{.*\}", letter, pattern), third
    if target.endswith(OUTPUT):
        stem = target.removesuffix(OUTPUT)
        for pattern in OUTPUTS:
            yield stem + pattern, None
    if part == "stage_b" and target.startswith("clip_mapper"):
        yield target.replace("clip_mapper", "clip_txt_pooled_mapper"), None


def name_table(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, Place]:
    """Every spelling of every matrix of these parts (part -> our name -> shape) and what it means."""
    table: dict[str, Place] = {}
    for part, own in shapes.items():
        for target in matrices(own, own):
            for dotted, third in spellings(part, target):
                for prefix in PREFIXES[part]:
                    path = dotted.replace(".", "_") if prefix.endswith("_") else dotted
                    table.setdefault(prefix + path, Place(part, target, third))
    return table


def split_name(name: str) -> tuple[str, str, str] | None:
    """(module as the file calls it, kind, factor) of a tensor's name; None for no known ending."""
    for ending in sorted(SUFFIXES, key=len, reverse=True):
        if name.endswith("." + ending):
            kind, factor = SUFFIXES[ending]
            return name.removesuffix("." + ending), kind, factor
    return None


def place_of(module: str, table: Mapping[str, Place]) -> Place | None:
    """What a module's name in a file means, with peft's and repeated prefixes taken off."""
    name = module.removeprefix(PEFT_PREFIX)
    if name in table:
        return table[name]
    for prefix in ("prior.", "unet.", "decoder.", "text_encoder."):  # e.g. "prior.base_model.model."
        if name.startswith(prefix):
            inner = prefix + name.removeprefix(prefix).removeprefix(PEFT_PREFIX)
            if inner in table:
                return table[inner]
    return None


def written_name(part: str, target: str, third: int | None, layout: str) -> str:
    """What "kohya", "onetrainer", "comfyui" or "diffusers" calls a matrix (or third of one) of ours."""
    if layout == "diffusers":
        path = target.replace(OUTPUT, ".attention.to_out.0")
        if third is not None:
            path = target.removesuffix(PACKED) + f".attention.to_{'qkv'[third]}"
        if part == "stage_b":
            path = re.sub(r"^clip_mapper\b", "clip_txt_pooled_mapper", path)
        return {"stage_c": "prior.", "stage_b": "decoder.", "text_encoder": "text_encoder."}[part] + path
    path = target if third is None else target.removesuffix(PACKED) + f".attention.attn.to_{'qkv'[third]}"
    if layout == "comfyui":
        return {"stage_c": "diffusion_model.", "stage_b": "decoder.", "text_encoder": "text_encoder."}[
            part
        ] + path
    prior = "lora_prior_" if layout == "onetrainer" else "lora_"
    prefix = {"stage_c": prior + "unet_", "stage_b": "lora_decoder_unet_", "text_encoder": prior + "te_"}
    return prefix[part] + path.replace(".", "_")


def official_targets(names: Iterable[str]) -> list[str]:
    """The matrices an official LoRA adapts, in the order of its numbers: every attention of Stage C in the
    order it runs, its output before its packed matrix."""
    blocks = {name.removesuffix(PACKED + ".weight") for name in names if name.endswith(PACKED + ".weight")}

    def order(block: str) -> tuple[bool, list[int]]:
        return block.startswith("up_blocks."), [int(n) for n in re.findall(r"\d+", block)]

    return [block + kind for block in sorted(blocks, key=order) for kind in (OUTPUT, PACKED)]
