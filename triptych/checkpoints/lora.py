"""LoRA files of every maker, read: changes of weights, and learned tokens beside them.

official     weights.N.lora_down and .lora_up, numbered; tokens as offsets without their names
kohya        lora_unet_PATH.lora_down.weight, .lora_up.weight, .alpha; read by ComfyUI as well
onetrainer   the same with lora_prior_unet_; tokens as bundle_emb.NAME.clip_g
comfyui      diffusion_model.PATH with dots
diffusers    prior.PATH.lora_A.weight and .lora_B.weight, with peft's words for the scale
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.checkpoints.files import read_tensors
from triptych.checkpoints.fit import SIZE_OPTIONS, check_addon, identify
from triptych.checkpoints.headers import Header, PartInfo, part_info
from triptych.checkpoints.lora_keys import (
    OUTPUT,
    UNKNOWN_KINDS,
    Place,
    name_table,
    official_targets,
    place_of,
    split_name,
)
from triptych.checkpoints.sniff import PART_NAMES
from triptych.errors import CheckpointError
from triptych.models.lora import FACTORS, Change

TOKEN_PREFIX = "bundle_emb."
GATE = "only_with_token"  # a setting of our files: prompts without a token of theirs are left as they were
STUDENT = "sampling"  # a setting of our distilled files: what they are drawn with, by the names below
STUDENT_SETTINGS = ("steps", "guidance", "sampler")
OFFICIAL_VECTORS, OFFICIAL_ROWS = "embeddings.embeddings", "embeddings.indices"
SIZES_BY_WIDTH = {2048: "3.6b", 1536: "1b"}
OUTPUT_WEIGHT = f"{OUTPUT}.weight"
OTHER_PARTS = ("decoder", "text", "_te_", TOKEN_PREFIX)  # marks of files that change more than Stage C
PartShapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # part -> our name -> shape


@dataclass(frozen=True)
class Offsets:
    """Learned tokens of an official file: what is added to the rows `indices` (n,) of the token table."""

    indices: Tensor
    vectors: Tensor = field(repr=False)  # (n, width)


@dataclass(frozen=True)
class Lora:
    """What a LoRA file holds: changes by part, learned tokens by name (n, width), and where it is from."""

    changes: dict[str, list[Change]]
    tokens: dict[str, Tensor] = field(default_factory=dict)
    offsets: Offsets | None = None
    layout: str = "kohya"
    info: PartInfo = field(default_factory=lambda: PartInfo("lora"))

    @property
    def gated(self) -> bool:
        """Whether it says of itself that it acts on prompts with one of its tokens only."""
        return bool(self.tokens) and self.info.settings.get(GATE) is True

    @property
    def rank(self) -> int:
        """The largest rank in it."""
        return max((change.rank for part in self.changes.values() for change in part), default=0)


def read_lora(path: str | os.PathLike[str], shapes: PartShapes) -> Lora:
    """A LoRA or a file of learned tokens, for the networks whose `shapes` are given ("stage_c" at least).

    Raises CheckpointError for a file made for another size, one whose names or shapes belong to no weight
    of these networks, one with NaN, and kinds of change that have no counterpart here.
    """
    header, sniffed = identify(path)
    if sniffed.part == "token":
        return Lora({}, {Path(path).stem: read_tensors(path, finite=True)["clip_g"]}, layout="comfyui")
    if sniffed.part != "lora":
        found = PART_NAMES.get(sniffed.part, sniffed.part)
        raise CheckpointError(f"{path} holds {found}; a LoRA was expected.")
    width = next((shape[0] for name, shape in shapes["stage_c"].items() if name.endswith(OUTPUT_WEIGHT)), 0)
    if width and not any(mark in name for name in header.entries for mark in OTHER_PARTS):
        check_addon(path, width, SIZES_BY_WIDTH.get(width))
    tensors = read_tensors(path, finite=True, header=header)
    info = part_info(header) or PartInfo("lora")
    if "weights.0.lora_down" in tensors:
        return _read_official(header, tensors, shapes["stage_c"], info)
    return _read_named(header, tensors, shapes, info)


def _read_official(
    header: Header, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], info: PartInfo
) -> Lora:
    targets = official_targets(shapes)
    count = sum(name.endswith(".lora_down") for name in tensors)
    if count != len(targets):
        raise CheckpointError(
            f"{header.path} changes {count} weights and this Stage C has {len(targets)} attention matrices: "
            "it was made for another size, or trained with other modules than the official default."
        )
    changes = []
    for number, target in enumerate(targets):
        factors = {"down": tensors[f"weights.{number}.lora_down"], "up": tensors[f"weights.{number}.lora_up"]}
        changes.append(Change(target, "lora", factors, 1 / len(factors["down"])))
    _check_shapes(header.path, {"stage_c": changes}, {"stage_c": shapes})
    offsets = None
    tokens: dict[str, Tensor] = {}
    if OFFICIAL_VECTORS in tensors and len(tensors[OFFICIAL_VECTORS]):
        vectors = tensors[OFFICIAL_VECTORS]
        names = info.settings.get("tokens")
        if isinstance(names, list) and len(names) == len(vectors):  # ours: the start was zeros
            for name, vector in zip(names, vectors, strict=True):
                tokens[name] = torch.cat([tokens[name], vector[None]]) if name in tokens else vector[None]
        else:
            offsets = Offsets(tensors[OFFICIAL_ROWS].long(), vectors)
    return Lora({"stage_c": changes}, tokens, offsets, "official", info)


def _read_named(header: Header, tensors: Mapping[str, Tensor], shapes: PartShapes, info: PartInfo) -> Lora:
    table = name_table(shapes)
    found: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, str] = {}
    tokens: dict[str, Tensor] = {}
    strange: list[str] = []
    for name, tensor in tensors.items():
        if name.startswith(TOKEN_PREFIX):
            token, _, side = name.removeprefix(TOKEN_PREFIX).rpartition(".")
            if side != "clip_g_out":  # vectors for the tower's output side: nothing here adds them
                tokens[token] = tensor
            continue
        split = split_name(name)
        if split is None:
            strange.append(name)
            continue
        module, kind, factor = split
        found.setdefault(module, {})[factor] = tensor
        if kind:
            kinds[module] = kind
    _refuse_strange(header.path, strange, len(tensors))
    alphas = _Alphas(header)
    changes: dict[str, list[Change]] = {}
    foreign = [module for module in found if place_of(module, table) is None]
    if foreign:
        raise CheckpointError(
            f"{header.path} changes {len(found)} weights, {len(foreign)} of which are not in this model "
            f"({', '.join(name[:80] for name in foreign[:2])}): it was made for another size or network."
        )
    for module, factors in found.items():
        place = place_of(module, table)
        assert place is not None
        change = _change(header.path, place, kinds.get(module, ""), dict(factors))
        if "alpha" not in factors:
            change = replace(change, scale=alphas.scale(module, change.rank) or change.scale)
        changes.setdefault(place.part, []).append(change)
    _check_shapes(header.path, changes, shapes)
    known = any("lora_unet_" in name or "lora_prior_" in name for name in found)
    return Lora(changes, tokens, None, "kohya" if known else "diffusers", info)


def _refuse_strange(path: Path, strange: Sequence[str], total: int) -> None:
    for name in strange:
        for ending, what in UNKNOWN_KINDS.items():
            if name.endswith(ending):
                raise CheckpointError(
                    f"{path} holds {what} ({name[:80]}), which triptych does not apply; LoRA, DoRA, LoHa and "
                    "LoKr it does."
                )
    if strange:
        raise CheckpointError(
            f"{path} has {len(strange)} of {total} names that no LoRA layout has ({strange[0][:80]})."
        )


class _Alphas:
    """Scales that files of peft keep beside the weights: in adapter_config.json, or in the metadata."""

    def __init__(self, header: Header) -> None:
        self.config: dict[str, Any] = {}
        beside = header.path.with_name("adapter_config.json")
        try:
            if beside.is_file():
                self.config = dict(json.loads(beside.read_text(encoding="utf-8")))
            elif "lora_adapter_metadata" in header.metadata:
                stored = dict(json.loads(header.metadata["lora_adapter_metadata"]))
                self.config = {key.partition(".")[2] or key: value for key, value in stored.items()}
        except (ValueError, TypeError):
            raise CheckpointError(f"{beside} is not a configuration of peft.") from None

    def scale(self, module: str, rank: int) -> float | None:
        """The scale of a module's change of this rank (0: nothing is factored); None when nothing is said."""
        pattern = self.config.get("alpha_pattern") or {}
        own = next((value for key, value in pattern.items() if module.endswith(key)), None)
        alpha = own if own is not None else self.config.get("lora_alpha", self.config.get("alpha"))
        if not isinstance(alpha, int | float):
            return None
        divisor = rank or int(self.config.get("r", 1))
        return float(alpha) / (divisor**0.5 if self.config.get("use_rslora") else divisor)


def _change(path: Path, place: Place, kind: str, factors: dict[str, Tensor]) -> Change:
    alpha, magnitude = factors.pop("alpha", None), factors.pop("magnitude", None)
    factors = {name: _matrix(tensor) for name, tensor in factors.items()}
    needed = {"lora": {"down", "up"}, "loha": set(FACTORS["loha"]), "full": {"diff"}}.get(kind, set())
    whole = needed <= factors.keys()
    if kind == "lokr":
        whole = all(n in factors or {f"{n}_a", f"{n}_b"} <= factors.keys() for n in ("w1", "w2"))
    if not kind or not whole:
        raise CheckpointError(f"{path} is incomplete: it has {', '.join(factors) or 'no factor'} alone for "
                              f"{place.target}.")  # fmt: skip
    change = Change(place.target, kind, factors, 1.0, place.third)  # type: ignore[arg-type]
    if alpha is not None and change.rank:  # LyCORIS ignores alpha where nothing is factored
        change = replace(change, scale=float(alpha) / change.rank)
    if magnitude is not None:
        rows, _ = change.shape()
        by_column = magnitude.ndim >= 2 and magnitude.shape[0] == 1 and magnitude.numel() != rows
        length = magnitude.reshape(1, -1) if by_column else magnitude.reshape(-1, 1)
        change = replace(change, magnitude=length)
    return change


def _matrix(tensor: Tensor) -> Tensor:
    """Factors of 1x1 convolutions come with two more axes."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def _check_shapes(path: Path, changes: Mapping[str, Sequence[Change]], shapes: PartShapes) -> None:
    for part, own in changes.items():
        for change in own:
            try:
                made = change.shape()
                rows, columns = shapes[part][f"{change.target}.weight"][:2]
            except (IndexError, KeyError):
                made, rows, columns = (0, 0), 1, 1
            rows = rows // 3 if change.third is not None else rows
            if made != (rows, columns):
                advice = "" if part != "stage_c" else _other_size(made)
                raise CheckpointError(
                    f"{path} changes {change.target} as a matrix of {made[0]}x{made[1]} and the model's is "
                    f"{rows}x{columns}: it was made for another size{advice}."
                )


def _other_size(made: tuple[int, int]) -> str:
    size = SIZES_BY_WIDTH.get(made[1])
    return f"; use it with {SIZE_OPTIONS[size]}" if size else ""


def with_tokens(lora: Lora, table: Tensor, tokens: Mapping[str, Tensor | None]) -> Lora:
    """Names for the nameless tokens of an official file, in order of their rows.

    `tokens` gives each name its starting row (width,), None for zeros; rows of `table` (the tower's token
    table) that the file only tunes need no name. Raises CheckpointError when the count does not fit.
    """
    if lora.offsets is None:
        raise CheckpointError("This file has no tokens without a name.")
    new = [int(row) for row in lora.offsets.indices if row >= len(table)]
    if len(new) != len(tokens):
        raise CheckpointError(
            f"The file has {len(new)} new tokens and {len(tokens)} names were given: one --token for each is "
            "needed."
        )
    named: dict[str, Tensor] = {}
    starts = dict(zip(new, tokens.items(), strict=True))
    for row, vector in zip(lora.offsets.indices.tolist(), lora.offsets.vectors, strict=True):
        if row in starts:
            name, start = starts[row]
            named[name] = (vector if start is None else start.float() + vector)[None]
    return replace(lora, tokens={**lora.tokens, **named}, offsets=None)
