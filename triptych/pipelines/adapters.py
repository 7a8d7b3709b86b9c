"""The LoRA files that a cascade wears: read once, checked against its networks, stacked by part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.checkpoints.headers import part_info, read_header
from triptych.checkpoints.lora import STUDENT, STUDENT_SETTINGS, Lora, read_lora
from triptych.errors import CheckpointError, RequestError
from triptych.models.lora import Change

ADAPTED = ("stage_c", "stage_b", "text_encoder")  # parts that a LoRA file can change
NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"


@dataclass(frozen=True)
class Adapters:
    """Changes by part with their strengths, and learned tokens by name (n, width).

    `gates` has, by the identity of a change, the tokens one of which a prompt must have for it to act.
    """

    changes: Mapping[str, list[tuple[Change, float]]] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def opened(self, prompt: str) -> frozenset[str]:
        """The tokens of gated changes that stand in a prompt: prompts with the same ones wear the same."""
        return frozenset(token for tokens in self.gates.values() for token in tokens if token in prompt)

    def for_prompt(self, prompt: str) -> Adapters:
        """What acts on a prompt: everything but the gated changes none of whose tokens it has."""
        if not self.gates:
            return self
        opened = self.opened(prompt)
        changes = {
            part: [
                (change, strength)
                for change, strength in own
                if id(change) not in self.gates or opened & {*self.gates[id(change)]}
            ]
            for part, own in self.changes.items()
        }
        return replace(self, changes=changes)

    def targets(self, part: str) -> set[str]:
        """The weights of a part that these change."""
        return {f"{change.target}.weight" for change, strength in self.changes.get(part, []) if strength}

    def alike(self, other: Adapters, part: str) -> bool:
        """Whether both change a part in the same way (the same files at the same strengths)."""
        mine, theirs = self.changes.get(part, []), other.changes.get(part, [])
        return [(id(change), scale) for change, scale in mine] == [
            (id(change), scale) for change, scale in theirs
        ]


def split_scale(text: str) -> tuple[Path, float]:
    """ "FILE" or "FILE:SCALE" as a path and a strength, 1 when none is given.

    >>> split_scale("dog.safetensors:0.5")
    (PosixPath('dog.safetensors'), 0.5)
    """
    found = re.fullmatch(rf"(.+):({NUMBER})", text)
    return (Path(found[1]), float(found[2])) if found else (Path(text), 1.0)


def student_sampling(loras: Sequence[str]) -> dict[str, Any]:
    """Steps, guidance and sampler that distilled files among these say they are drawn with, later ones first.

    Raises CheckpointError for a file that is not there or no safetensors file.
    """
    stated: dict[str, Any] = {}
    for path, scale in map(split_scale, loras):
        info = part_info(read_header(existing(path)))
        own = info.settings.get(STUDENT) if info is not None and scale else None
        if isinstance(own, Mapping):
            stated |= {name: own[name] for name in STUDENT_SETTINGS if name in own}
    return stated


def existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"There is no LoRA file {path}.")
    return path


def stack(loras: Sequence[tuple[Path, float, Lora]], token_width: int) -> Adapters:
    """Several files as one. `token_width` is the width of the text tower's token vectors.

    Raises CheckpointError for tokens of another text tower or without a name, RequestError when two files
    teach different tokens of one name.
    """
    changes: dict[str, list[tuple[Change, float]]] = {}
    tokens: dict[str, Tensor] = {}
    gates: dict[int, tuple[str, ...]] = {}
    for path, strength, lora in loras:
        if lora.offsets is not None:
            raise CheckpointError(
                f"{path} teaches {len(lora.offsets.indices)} tokens whose names are not in it; "
                f"`triptych lora convert {path} NEW.safetensors --token '[name]=word'` writes one with "
                "names."
            )
        for part, own in lora.changes.items():
            changes.setdefault(part, []).extend((change, strength) for change in own)
            if lora.gated and part != "text_encoder":  # all prompts of a request are read by one tower
                gates |= {id(change): tuple(lora.tokens) for change in own}
        for name, vectors in lora.tokens.items():
            if vectors.shape[-1] != token_width:
                raise CheckpointError(
                    f"{path} teaches {name} to a text tower whose tokens have {vectors.shape[-1]} numbers; "
                    f"this model's have {token_width}: it was made for another model."
                )
            if name in tokens and not torch.equal(tokens[name], vectors):
                raise RequestError(f"Two of the LoRA files teach different things called {name}; use one.")
            tokens[name] = vectors
    return Adapters(changes, tokens, gates)


class Wardrobe:
    """LoRA files read before, so that another scale costs no reading. A file written anew is read anew."""

    def __init__(self) -> None:
        self._read: dict[tuple[Path, int], Lora] = {}

    def get(self, path: Path, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Lora:
        """The file at `path`. Raises CheckpointError as `read_lora` does."""
        mark = (existing(path).resolve(), path.stat().st_mtime_ns)
        if mark not in self._read:
            self._read[mark] = read_lora(path, shapes)
        return self._read[mark]
