"""The weights of text and image towers, wherever they lie: our part files, hub folders, ComfyUI files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from triptych.checkpoints.files import read_tensors
from triptych.checkpoints.fit import identify
from triptych.checkpoints.headers import PartInfo, part_info, read_header
from triptych.checkpoints.int8 import widen
from triptych.checkpoints.keys import COMFYUI_OLD_PROJECTION, split_comfyui
from triptych.checkpoints.load import assign
from triptych.checkpoints.sniff import PART_NAMES
from triptych.conditioning.tokenizer import (
    CLIP_WINDOW,
    MINILM_WINDOW,
    Tokenizer,
    clip_tokenizer,
    wordpiece_tokenizer,
)
from triptych.errors import CheckpointError
from triptych.models import clip
from triptych.models.image_tower import ImageTower, ImageTowerConfig
from triptych.models.minilm import MiniLM, MiniLMConfig

HUB_FILES = ("model.safetensors", "model.bf16.safetensors", "model.fp16.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model.bf16.bin", "pytorch_model.fp16.bin")
Config = TypeVar("Config", MiniLMConfig, ImageTowerConfig)


def load_text_tower(
    path: Path | str, tokenizer: Path | str | None = None
) -> tuple[MiniLM | clip.ClipText, Tokenizer]:
    """The text tower of any model and its tokenizer; CLIP weights stay memory-mapped, in their own precision.

    `path` is a part file of triptych (MiniLM); a hub folder with `text_encoder/` and `tokenizer/`, or its
    `text_encoder` folder, or the safetensors file in it (CLIP); or a ComfyUI file that holds a text tower.
    `tokenizer` is a folder or a `tokenizer.json`, looked for beside the weights when not given.
    Raises CheckpointError when something is missing, pickled or does not fit.
    """
    path = weight_file(path, "text_encoder")
    if part_info(read_header(path)) is not None:
        return load_minilm_tower(path, tokenizer)
    tensors = _tower_tensors(path, "text_encoder")
    tower = clip.on_meta(clip.ClipText, _tower_config(path, tensors, clip.text_config))
    assign(tower.network, tensors, path)
    words = clip_tokenizer(tokenizer or _beside(path), min(CLIP_WINDOW, tower.positions))
    _check_match(words, tower.vocabulary, path)
    return tower, words


def load_minilm_tower(path: Path | str, tokenizer: Path | str | None = None) -> tuple[MiniLM, Tokenizer]:
    """The small text tower from a part file and its `tokenizer.json` (beside it when not given).

    Matrices stored as int8 rows are widened to float32. Raises CheckpointError when the file does not fit.
    """
    path = Path(path)
    info = _own_info(path, "text_encoder")
    with torch.device("meta"):
        tower = MiniLM(_configured(MiniLMConfig, info.config, path))
    assign(tower, widen(read_tensors(path)), path)
    words = wordpiece_tokenizer(
        tokenizer or path.with_name("tokenizer.json"), info.settings.get("window", MINILM_WINDOW)
    )
    _check_match(words, tower.config.vocabulary, path)
    return tower.eval().requires_grad_(False), words


def load_image_tower(path: Path | str) -> ImageTower | clip.ClipImage:
    """The image tower of any model: a part file of triptych, a hub folder or file, or a ComfyUI file.

    Raises CheckpointError when something is missing, pickled or does not fit.
    """
    path = weight_file(path, "image_encoder")
    if part_info(read_header(path)) is not None:
        info = _own_info(path, "image_encoder")
        with torch.device("meta"):
            small = ImageTower(_configured(ImageTowerConfig, info.config, path))
        assign(small, widen(read_tensors(path)), path)
        return small.eval().requires_grad_(False)
    tensors = _tower_tensors(path, "image_encoder")
    tower = clip.on_meta(clip.ClipImage, _tower_config(path, tensors, clip.image_config))
    assign(tower.network, tensors, path)
    return tower


def weight_file(path: Path | str, part: str) -> Path:
    """The file that holds `part`: `path` itself, or the one in a folder of ours or of the hub."""
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / f"{part}.safetensors").is_file():
        return path / f"{part}.safetensors"
    folder = path / part if (path / part).is_dir() else path
    for name in HUB_FILES:
        if (folder / name).is_file():
            return folder / name
    if any((folder / name).is_file() for name in PICKLES):
        raise CheckpointError(
            f"{folder} has only pickled weights, which can run code and are never read: "
            "get the safetensors file of the same repository."
        )
    raise CheckpointError(f"{folder} has no {' or '.join(HUB_FILES[:2])}.")


def file_names(tower: nn.Module) -> dict[str, Tensor]:
    """The parameters of a tower under the names that its file has for them."""
    return dict((tower.network if isinstance(tower, clip.ClipText | clip.ClipImage) else tower).state_dict())


def _own_info(path: Path, part: str) -> PartInfo:
    info = part_info(read_header(path))
    if info is None or info.part != part:
        found = "something else" if info is None else PART_NAMES.get(info.part, info.part)
        raise CheckpointError(f"{path} holds {found}; {PART_NAMES[part]} of triptych was expected.")
    return info


def _configured(kind: type[Config], fields: Mapping[str, Any], path: Path) -> Config:
    try:
        return kind(**fields)
    except TypeError as error:
        raise CheckpointError(f"{path} carries a configuration that makes no sense: {error}.") from None


def _tower_config(
    path: Path, tensors: Mapping[str, Tensor], infer: Callable[[Mapping[str, Sequence[int]]], dict[str, Any]]
) -> Mapping[str, Any]:
    """The hub's config.json beside the weights; without one, what the shapes say."""
    beside = path.with_name("config.json")
    if not beside.is_file():
        try:
            return infer({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is not a whole CLIP tower: {error} is missing or odd.") from None
    try:
        content = json.loads(beside.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{beside} is not valid JSON: {error}.") from None
    if not isinstance(content, dict) or "hidden_size" not in content:
        raise CheckpointError(f"{beside} is not the configuration of a CLIP tower: it has no hidden_size.")
    return content


def _tower_tensors(path: Path, part: str) -> dict[str, Tensor]:
    """The tensors of a CLIP tower under the hub's names."""
    header, sniffed = identify(path)
    if part not in sniffed.parts:
        found, wanted = (PART_NAMES.get(name, name) for name in (sniffed.part, part))
        raise CheckpointError(f"{path} holds {found}; {wanted} was expected.")
    tensors = read_tensors(path, header=header)
    if sniffed.layout == "comfyui_single":
        names = split_comfyui(tensors, sniffed.part)[part]
        old = names.get("text_projection.weight") == COMFYUI_OLD_PROJECTION
        tensors = {ours: tensors[name] for ours, name in names.items()}
        if old:  # stored as the right-hand side of x @ projection
            tensors["text_projection.weight"] = tensors["text_projection.weight"].T.contiguous()
    # Old files also store the position numbers and the temperature of CLIP's own training.
    return {n: t for n, t in tensors.items() if not n.endswith((".position_ids", "logit_scale"))}


def _beside(path: Path) -> Path:
    """Where the hub keeps the tokenizer of the text tower at `path`."""
    for folder in (path.parent / "tokenizer", path.parent.parent / "tokenizer", path.parent):
        if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
            return folder
    raise CheckpointError(
        f"There is no tokenizer for {path}: a folder `tokenizer` with tokenizer.json, or with vocab.json and "
        "merges.txt, belongs beside it."
    )


def _check_match(words: Tokenizer, vocabulary: int, path: Path) -> None:
    if words.size > vocabulary:
        raise CheckpointError(
            f"The tokenizer has {words.size} tokens and {path} knows {vocabulary}: they belong to different "
            "text towers."
        )
