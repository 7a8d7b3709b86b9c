"""Parameter names of the layouts a weight file can have, as tables: pairs of patterns, no torch.

Our names are the official ones with one difference: the packed attention matrix is a plain linear layer,
`attn.in_proj.weight` where official files say `attn.in_proj_weight`. A rule with several patterns on
their side stands for one tensor of ours whose rows are theirs stacked, query, key, value in this order.
`*` stands for any text and is the same on both sides. Names that no rule matches are the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from triptych.errors import CheckpointError


@dataclass(frozen=True)
class Rule:
    """`ours` is one pattern; `theirs` is one, or those whose rows are stacked to make it."""

    ours: str
    theirs: tuple[str, ...]


def _stacked(ours: str, theirs: str) -> Rule:
    return Rule(ours, tuple(theirs.replace("{qkv}", letter) for letter in "qkv"))


PACKED = (
    Rule("*.attention.attn.in_proj.weight", ("*.attention.attn.in_proj_weight",)),
    Rule("*.attention.attn.in_proj.bias", ("*.attention.attn.in_proj_bias",)),
)
DIFFUSERS_ATTENTION = (
    _stacked("*.attention.attn.in_proj.weight", "*.attention.to_{qkv}.weight"),
    _stacked("*.attention.attn.in_proj.bias", "*.attention.to_{qkv}.bias"),
    Rule("*.attention.attn.out_proj.*", ("*.attention.to_out.0.*",)),
)
COMFYUI_ATTENTION = (
    _stacked("*.attention.attn.in_proj.weight", "*.attention.attn.to_{qkv}.weight"),
    _stacked("*.attention.attn.in_proj.bias", "*.attention.attn.to_{qkv}.bias"),
)

# Layout -> part -> rules; a part that is not listed has the same names in that layout as in ours.
# "comfyui" is what its loader makes in memory and what it saves; its loader reads "official" names as well.
LAYOUTS: dict[str, dict[str, tuple[Rule, ...]]] = {
    "triptych": {},
    "official": {"stage_b": PACKED, "stage_c": PACKED},
    "diffusers": {
        "stage_a": (Rule("vquantizer.codebook.weight", ("vquantizer.embedding.weight",)),),
        "stage_b": (*DIFFUSERS_ATTENTION, Rule("clip_mapper.*", ("clip_txt_pooled_mapper.*",))),
        "stage_c": DIFFUSERS_ATTENTION,
    },
    "comfyui": {"stage_b": COMFYUI_ATTENTION, "stage_c": COMFYUI_ATTENTION},
}

# ComfyUI's single files: prefix of a name -> part, for the file that holds Stage C and the one with Stage B.
COMFYUI_PREFIXES: dict[str, dict[str, str]] = {
    "stage_c": {
        "model.diffusion_model.": "stage_c",
        "text_encoder.clip_g.": "text_encoder",
        "vae.encoder.": "semantic",
        "vae.previewer.": "previewer",
        "clip_l_vision.": "image_encoder",
    },
    "stage_b": {
        "model.diffusion_model.": "stage_b",
        "text_encoder.clip_g.": "text_encoder",
        "vae.": "stage_a",
    },
}
COMFYUI_MARK = "model.diffusion_model."
# Numbers ComfyUI writes that are no weights of ours: the encoder's normalisation, the tower's temperature.
COMFYUI_EXTRAS = ("vae.encoder.mean", "vae.encoder.std", "text_encoder.clip_g.logit_scale")
# Inside its prefix ComfyUI keeps the text tower one level down; the old projection is a transposed matrix.
COMFYUI_TEXT = "transformer."
COMFYUI_OLD_PROJECTION = "text_encoder.clip_g.text_projection"


def _match(pattern: str, name: str) -> tuple[str, ...] | None:
    """The texts that the `*` of a pattern stand for, None if it does not fit."""
    expression = "(.*)".join(re.escape(piece) for piece in pattern.split("*"))
    found = re.fullmatch(expression, name)
    return found.groups() if found else None


def _fill(pattern: str, texts: tuple[str, ...]) -> str:
    pieces = pattern.split("*")
    return pieces[0] + "".join(text + piece for text, piece in zip(texts, pieces[1:], strict=True))


def rules_for(layout: str, part: str) -> tuple[Rule, ...]:
    """The table of one part in one layout. Raises `CheckpointError` for an unknown layout."""
    if layout not in LAYOUTS:
        raise CheckpointError(f'There is no layout "{layout}". Known: {", ".join(LAYOUTS)}')
    return LAYOUTS[layout].get(part, ())


def names_in_layout(ours: Iterable[str], layout: str, part: str) -> dict[str, tuple[str, ...]]:
    """Our name -> its name in a layout, or the three names whose rows it is split into."""
    rules = rules_for(layout, part)
    return {name: _theirs(name, rules) for name in ours}


def _theirs(name: str, rules: tuple[Rule, ...]) -> tuple[str, ...]:
    for rule in rules:
        texts = _match(rule.ours, name)
        if texts is not None:
            return tuple(_fill(pattern, texts) for pattern in rule.theirs)
    return (name,)


def names_from_layout(theirs: Iterable[str], layout: str, part: str) -> dict[str, tuple[str, ...]]:
    """Our name -> the name or names in the file that make it; the reverse of `names_in_layout`.

    Raises `CheckpointError` when a stack is incomplete (query and key without value).
    """
    rules = rules_for(layout, part)
    plan: dict[str, tuple[str, ...]] = {}
    present = set(theirs)
    for name in theirs:
        ours, sources = _ours(name, rules)
        missing = [source for source in sources if source not in present]
        if missing:
            raise CheckpointError(f"The file has {name!r} but not {missing[0]!r}: it is incomplete.")
        if plan.get(ours, sources) != sources:
            raise CheckpointError(f"The file holds {ours!r} twice, under different names.")
        plan[ours] = sources
    return plan


def _ours(name: str, rules: tuple[Rule, ...]) -> tuple[str, tuple[str, ...]]:
    for rule in rules:
        for pattern in rule.theirs:
            texts = _match(pattern, name)
            if texts is not None:
                return _fill(rule.ours, texts), tuple(_fill(other, texts) for other in rule.theirs)
    return name, (name,)


def split_comfyui(names: Iterable[str], main: str) -> dict[str, dict[str, str]]:
    """Sort the names of a ComfyUI single file by part: part -> (name inside the part -> name in the file).

    `main` says which file it is, "stage_c" or "stage_b". The text tower's names become transformers' names.
    ComfyUI's own extra numbers are left out; a name with no known prefix is a `CheckpointError`.
    """
    prefixes = COMFYUI_PREFIXES[main]
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        if name in COMFYUI_EXTRAS:
            continue
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            raise CheckpointError(
                f"{name[:80]!r} has none of the prefixes of a ComfyUI file: {', '.join(prefixes)}."
            )
        inner = name.removeprefix(prefix).removeprefix(COMFYUI_TEXT)
        if name == COMFYUI_OLD_PROJECTION:
            inner = "text_projection.weight"
        parts.setdefault(prefixes[prefix], {})[inner] = name
    return parts


def comfyui_name(part: str, inner: str, main: str) -> str:
    """The name of one tensor of a part in a ComfyUI single file; the reverse of `split_comfyui`."""
    prefix = {part: prefix for prefix, part in COMFYUI_PREFIXES[main].items()}[part]
    return prefix + (COMFYUI_TEXT if part == "text_encoder" else "") + inner


def converted_shapes(
    shapes: Mapping[str, tuple[int, ...]], plan: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes under our names, by a plan of `names_from_layout`: stacked rows are added up."""
    ours: dict[str, tuple[int, ...]] = {}
    for name, sources in plan.items():
        first = shapes[sources[0]]
        if len(sources) > 1 and first:
            first = (sum(shapes[source][0] if shapes[source] else 0 for source in sources), *first[1:])
        ours[name] = first
    return ours
