"""Sentences for weight files that are not what was asked for: each mistake its own.

Files that load nowhere are what people ask about most, and the cause is nearly always the wrong part or the
wrong size; so both are found out from the header, before anything is built.
"""

from __future__ import annotations

import os
from pathlib import Path

from triptych.checkpoints.headers import Header, part_info, read_header
from triptych.checkpoints.sniff import PART_NAMES, Sniffed, sniff
from triptych.errors import CheckpointError

STAGES = ("stage_a", "stage_b", "stage_c")
SIZE_OPTIONS = {
    "3.6b": "--stage-c 3.6b",
    "1b": "--stage-c 1b",
    "1.5b": "--stage-b 1.5b",
    "700m": "--stage-b 700m",
}
PART_OPTIONS = {
    "stage_a": "--stage-a",
    "stage_b": "--stage-b",
    "stage_c": "--stage-c",
    "text_encoder": "--text-encoder",
    "lora": "--lora",
}
CONTROL_COMMANDS = "`triptych canny`, `triptych inpaint` and the other control commands"

# Why a recognised file cannot be a part of a cascade, whatever was asked for.
NEVER_A_PART = {
    "wuerstchen_prior": "holds the prior of Würstchen v2, an older family of other networks; "
    "use a Stage C file of Stable Cascade.",
    "wuerstchen_decoder": "holds the decoder of Würstchen v2, an older family of other networks; "
    "use a Stage B file of Stable Cascade.",
    "wuerstchen_semantic": "holds the semantic encoder of Würstchen v2; Stable Cascade's is "
    "effnet_encoder.safetensors.",
    "fp8": "is stored as 8-bit floats with scales of their own, which triptych does not read; "
    "use the 16-bit file.",
    "token": "holds a learned token (textual inversion), not a network.",
    "discriminator": "holds Stage A's discriminator, which only training uses.",
}


def identify(path: str | os.PathLike[str]) -> tuple[Header, Sniffed]:
    """Header and recognised contents of a weight file. Raises `CheckpointError` if it is nothing known."""
    header = read_header(path)
    stored = part_info(header)
    sniffed = sniff(header.shapes)
    if sniffed is None:
        if stored is not None:
            return header, Sniffed("triptych", stored.part, stored.size, (stored.part,))
        names = ", ".join(name[:60] for name in list(header.entries)[:3])
        raise CheckpointError(
            f"{path} is a safetensors file, but not of Stable Cascade: none of its "
            f"{len(header.entries)} names ({names}, ...) is known."
        )
    if stored is not None and sniffed.part != stored.part and stored.part not in sniffed.parts:
        return header, Sniffed("triptych", stored.part, stored.size, (stored.part,))
    return header, sniffed


def refuse_wrong_part(path: Path, sniffed: Sniffed, wanted: str | None) -> None:
    """Raise `CheckpointError` unless the file holds the wanted part (or any loadable one, if None)."""
    if sniffed.part in NEVER_A_PART and wanted != sniffed.part:
        raise CheckpointError(f"{path} {NEVER_A_PART[sniffed.part]}")
    if wanted is None or wanted == sniffed.part or wanted in sniffed.parts:
        return
    raise CheckpointError(f"{path} {_wrong_part(sniffed, wanted)}")


def _wrong_part(sniffed: Sniffed, wanted: str) -> str:
    found, asked = PART_NAMES.get(sniffed.part, sniffed.part), PART_NAMES.get(wanted, wanted)
    if sniffed.layout == "comfyui_single":
        return (
            f"is a ComfyUI file with {', '.join(sniffed.parts)} and no {wanted}: "
            f"{asked} must come from another file."
        )
    if sniffed.part == "lora" and wanted in STAGES:
        return f"is a LoRA, which changes a Stage C and cannot stand for {asked}: give it with --lora."
    if sniffed.part == "controlnet" and wanted in STAGES:
        return (
            f"is a ControlNet, which steers a Stage C and cannot stand for {asked}: see {CONTROL_COMMANDS}."
        )
    if {sniffed.part, wanted} == {"stage_b", "stage_c"}:
        return (
            f"holds {found} where {asked} is wanted: the two are different networks. "
            f"Give this file with {PART_OPTIONS[sniffed.part]}."
        )
    option = PART_OPTIONS.get(sniffed.part)
    return f"holds {found} where {asked} is wanted." + (f" Give it with {option}." if option else "")


def refuse_wrong_size(path: Path, sniffed: Sniffed, wanted: str | None) -> None:
    """Raise `CheckpointError` if a published size was asked for and the file is of another."""
    if wanted is None or sniffed.size == wanted:
        return
    looks = f'looks like "{sniffed.size}"' if sniffed.size else "is of no published size"
    advice = f": pass {SIZE_OPTIONS[sniffed.size]}" if sniffed.size else ""
    raise CheckpointError(f'{path} is not "{wanted}"; it {looks}{advice}.')


def check_addon(path: str | os.PathLike[str], stage_c_width: int, stage_c_size: str | None = None) -> Sniffed:
    """Whether a LoRA or ControlNet file was made for a Stage C of this width; returns what the file is.

    Raises `CheckpointError` when it is neither, or was made for another size.
    """
    header, sniffed = identify(path)
    if sniffed.part not in ("lora", "controlnet"):
        found = PART_NAMES.get(sniffed.part, sniffed.part)
        raise CheckpointError(f"{path} holds {found}; a LoRA or a ControlNet was expected.")
    width = _addon_width(header, sniffed)
    if width is not None and width != stage_c_width:
        here = f'"{stage_c_size}"' if stage_c_size else f"of width {stage_c_width}"
        made = f'"{sniffed.size}"' if sniffed.size else f"of width {width}"
        advice = f": use it with {SIZE_OPTIONS[sniffed.size]}" if sniffed.size in SIZE_OPTIONS else ""
        kind = PART_NAMES[sniffed.part]
        raise CheckpointError(
            f"{path} is {kind} made for the Stage C {made}, and the model's is {here}{advice}."
        )
    return sniffed


def _addon_width(header: Header, sniffed: Sniffed) -> int | None:
    """Channels of the Stage C an addon was made for, None where its names do not show it."""
    shapes = header.shapes
    if sniffed.part == "controlnet":
        return next(
            (s[0] for n, s in shapes.items() if n.startswith("projections.") and n.endswith(".2.weight")),
            None,
        )
    for name, shape in shapes.items():
        up = name.endswith((".lora_up", ".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight"))
        plain = "out_proj" in name or "to_out" in name or name == "weights.0.lora_up"
        if up and plain and shape:
            return shape[0]
    return None
