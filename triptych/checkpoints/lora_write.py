"""LoRA files written in the layout of any maker (see `lora.py`), always with our metadata.

Our own files are kohya's, which ComfyUI reads too, with learned tokens as OneTrainer bundles them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from triptych.checkpoints.files import write_tensors
from triptych.checkpoints.lora import OFFICIAL_ROWS, OFFICIAL_VECTORS, TOKEN_PREFIX, Lora
from triptych.checkpoints.lora_keys import official_targets, written_name
from triptych.errors import CheckpointError, nearest
from triptych.models.lora import FACTORS, Change, split_thirds

LAYOUTS = ("kohya", "onetrainer", "comfyui", "diffusers", "official")
ENDINGS = {
    "lora": {"down": "lora_down.weight", "up": "lora_up.weight"},
    "loha": {name: f"hada_{name}" for name in FACTORS["loha"]},
    "lokr": {name: f"lokr_{name}" for name in FACTORS["lokr"]},
    "full": {"diff": "diff"},
}
FIRST_NEW_ROW = 49408  # of the published text tower


def write_lora(
    path: str | os.PathLike[str],
    lora: Lora,
    layout: str = "kohya",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Write a LoRA atomically in one of LAYOUTS, with our metadata.

    `shapes` (our name -> shape) of the Stage C are needed where the official layout must be filled with zeros
    for matrices that the LoRA leaves alone.

    Raises CheckpointError for a change the layout cannot hold (the official one: plain LoRAs on the attention
    of Stage C only).
    """
    if layout not in LAYOUTS:
        raise CheckpointError(f'There is no LoRA layout "{layout}": {nearest(layout, LAYOUTS)}.')
    info = replace(lora.info, part="lora")
    if layout == "official":
        _refuse_unofficial(lora)
        info = replace(info, settings={**info.settings, "tokens": _repeated_names(lora)})
        write_tensors(path, _official_tensors(lora, shapes or {}), info.to_metadata())
        return
    tensors: dict[str, Tensor] = {}
    for part, changes in lora.changes.items():
        for change in changes:
            packed = change.target.endswith(".attn.in_proj")
            for piece in split_thirds(change) if packed else [change]:
                name = written_name(part, piece.target, piece.third, layout)
                tensors |= _diffusers(name, piece) if layout == "diffusers" else _named(name, piece)
    for token, vectors in lora.tokens.items():
        tensors[f"{TOKEN_PREFIX}{token}.clip_g"] = vectors
    if not tensors:
        raise CheckpointError(f"{path} was not written: there is nothing in this LoRA.")
    write_tensors(path, {name: t.contiguous() for name, t in tensors.items()}, info.to_metadata())


def _named(name: str, change: Change) -> dict[str, Tensor]:
    factors = dict(change.factors)
    if change.rank == 0 and change.scale != 1:  # nothing to hang an alpha on
        first = next(iter(factors))
        factors[first] = factors[first].float() * change.scale
    tensors = {f"{name}.{ENDINGS[change.kind][factor]}": tensor for factor, tensor in factors.items()}
    if change.rank:
        tensors[f"{name}.alpha"] = torch.tensor(float(change.scale * change.rank))
    if change.magnitude is not None:
        tensors[f"{name}.dora_scale"] = change.magnitude
    return tensors


def _diffusers(name: str, change: Change) -> dict[str, Tensor]:
    if change.kind != "lora":
        return _named(name, change)
    tensors = {f"{name}.lora_A.weight": change.factors["down"],
               f"{name}.lora_B.weight": change.factors["up"] * change.scale}  # fmt: skip
    if change.magnitude is not None:
        tensors[f"{name}.lora_magnitude_vector"] = change.magnitude.flatten()
    return tensors


def _refuse_unofficial(lora: Lora) -> None:
    """Raise CheckpointError for what the official layout has no place for."""
    attention = (".attn.in_proj", ".attn.out_proj")
    for part, changes in lora.changes.items():
        for change in changes:
            if part != "stage_c" or not change.target.endswith(attention):
                raise CheckpointError(
                    f"The official layout holds changes of Stage C's attention only, not of {part} "
                    f"{change.target}; write another layout."
                )
            if change.kind != "lora" or change.magnitude is not None:
                kind = "DoRA" if change.magnitude is not None else change.kind
                raise CheckpointError(f"The official layout holds plain LoRAs only, not {kind}.")


def _official_tensors(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """All attention matrices in order, all of one rank; what is missing is zeros."""
    fused = {target: _fuse(own) for target, own in _by_target(lora.changes.get("stage_c", [])).items()}
    sides = {target: (len(up), down.shape[1]) for target, (up, down) in fused.items()}
    sides |= {n.removesuffix(".weight"): shape[:2] for n, shape in shapes.items() if n.endswith(".weight")}  # type: ignore[misc]
    targets = official_targets([f"{target}.weight" for target in sides])
    rank = max((down.shape[0] for _, down in fused.values()), default=1)
    tensors: dict[str, Tensor] = {}
    for number, target in enumerate(targets):
        if target not in sides:
            raise CheckpointError(
                f"The official layout numbers every attention matrix, and {target} is unknown."
            )
        rows, columns = sides[target]
        up, down = fused.get(target, (torch.zeros(rows, 0), torch.zeros(0, columns)))
        missing = rank - up.shape[1]
        tensors[f"weights.{number}.lora_up"] = torch.nn.functional.pad(up, (0, missing)) * rank
        tensors[f"weights.{number}.lora_down"] = torch.nn.functional.pad(down, (0, 0, 0, missing))
    if lora.tokens:
        vectors = torch.cat([*lora.tokens.values()])
        first = int(lora.info.settings.get("vocabulary", FIRST_NEW_ROW))
        tensors[OFFICIAL_VECTORS] = vectors
        tensors[OFFICIAL_ROWS] = torch.arange(first, first + len(vectors))
    return tensors


def _by_target(changes: Sequence[Change]) -> dict[str, list[Change]]:
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(change.target, []).append(change)
    return found


def _fuse(changes: Sequence[Change]) -> tuple[Tensor, Tensor]:
    """(up, down) of one matrix from one change, or from those of its thirds, with the scale folded in."""
    whole = [change for change in changes if change.third is None]
    if whole:
        (change,) = whole
        return change.factors["up"].float() * change.scale, change.factors["down"].float()
    downs = [change.factors["down"].float() for change in changes]
    rows = len(changes[0].factors["up"])
    shared = all(torch.equal(down, downs[0]) for down in downs)
    rank = len(downs[0]) if shared else sum(map(len, downs))
    up, at = torch.zeros(3 * rows, rank), 0
    for change in changes:
        assert change.third is not None
        own = change.factors["up"].float() * change.scale
        up[change.third * rows : (change.third + 1) * rows, at : at + own.shape[1]] = own
        at += 0 if shared else own.shape[1]
    return up, downs[0] if shared else torch.cat(downs)


def _repeated_names(lora: Lora) -> list[str]:
    return [name for name, vectors in lora.tokens.items() for _ in range(len(vectors))]
