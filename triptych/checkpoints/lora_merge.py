"""LoRAs into checkpoints and out of them: whole new weight files, and the LoRA between two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from triptych.checkpoints.files import write_part
from triptych.checkpoints.headers import PartInfo
from triptych.checkpoints.load import read_part
from triptych.checkpoints.lora import Lora
from triptych.checkpoints.lora_keys import matrices
from triptych.errors import CheckpointError
from triptych.models.lora import Change, extract, merged

EXTRACTABLE = ("stage_c", "stage_b")


def merge_into(
    base: Path, part: str, changes: Sequence[tuple[Change, float]], lora: PartInfo, out: Path
) -> None:
    """Write the weights of `part` in `base` with `changes` in them, in the precision they had.

    Configuration, settings, licence and notice of the base go along; a licence of the LoRA is added.
    """
    contents = read_part(base, part)
    tensors = dict(contents.tensors)
    for name in {f"{change.target}.weight" for change, _ in changes}:
        own = [(change, scale) for change, scale in changes if f"{change.target}.weight" == name]
        tensors[name] = merged(tensors[name], own).to(tensors[name].dtype)
    write_part(out, tensors, with_licence(contents.info, lora))


def with_licence(base: PartInfo, other: PartInfo) -> PartInfo:
    """The description of `base` that also carries what `other` asks for."""

    def both(first: str, second: str) -> str:
        return first if not second or second in first else f"{first}; {second}" if first else second

    return replace(base, licence=both(base.licence, other.licence), notice=both(base.notice, other.notice))


def extract_between(base: Path, tuned: Path, rank: int, only: str = "") -> tuple[Lora, Mapping[str, float]]:
    """The LoRA of `rank` that comes nearest to turning `base` into `tuned`, both a Stage C or both a Stage B.

    `only` keeps modules whose name contains it (".attn", say). Also returns, by weight, the share of the
    difference (squared) that the LoRA holds. Raises CheckpointError for different networks.
    """
    first = read_part(base)
    part = first.info.part
    if part not in EXTRACTABLE:
        raise CheckpointError(f"{base} holds {part}; a LoRA is between two files of Stage C or of Stage B.")
    second = read_part(tuned, part)
    if first.config != second.config:
        raise CheckpointError(f"{base} and {tuned} are networks of different sizes; no LoRA is between them.")
    shapes = {name: tuple(tensor.shape) for name, tensor in first.tensors.items()}
    changes, kept = [], {}
    for target in matrices(shapes, shapes):
        if only not in target:
            continue
        before, after = (p.tensors[f"{target}.weight"] for p in (first, second))
        change = extract(target, before, after, rank)
        if change is not None:
            changes.append(change)
            whole = after.float() - before.float()
            rest = whole - change.difference(before)
            kept[target] = 1 - float(rest.square().sum() / whole.square().sum())
    if not changes:
        raise CheckpointError(f"{base} and {tuned} hold the same matrices{f' in {only}' if only else ''}.")
    info = PartInfo(
        "lora", settings={"base": part, "rank": rank}, licence=second.info.licence or first.info.licence,
        notice=second.info.notice or first.info.notice,
    )  # fmt: skip
    return Lora({part: changes}, info=info), kept


def published_shapes(size_c: str, size_b: str | None = None) -> dict[str, dict[str, tuple[int, ...]]]:
    """Our names and shapes of networks known by the name of their size, without any weights."""
    from triptych.models.stage_b import STAGE_B, StageB
    from triptych.models.stage_c import STAGE_C, StageC

    with torch.device("meta"):
        networks = {"stage_c": StageC(STAGE_C[size_c])}
        own = {
            part: {n: tuple(t.shape) for n, t in net.state_dict().items()} for part, net in networks.items()
        }
        if size_b is not None:
            own["stage_b"] = {n: tuple(t.shape) for n, t in StageB(STAGE_B[size_b]).state_dict().items()}
    return own
