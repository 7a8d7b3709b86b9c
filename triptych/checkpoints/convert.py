"""From any layout to another: single parts and whole models, without losing a number or a note.

official    stage_c.safetensors, stage_b.safetensors, ... in one folder, named as on the hub
diffusers   stable-cascade/ (decoder, vqgan, text tower) and stable-cascade-prior/ (prior, image tower)
comfyui     stable_cascade_stage_c.safetensors and stable_cascade_stage_b.safetensors, all parts inside

Every file carries our metadata as well, which other programs ignore, so that converting back also gives
back configuration, settings and licence. A folder appears complete or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.checkpoints.catalog import ModelFiles, controlnet_files
from triptych.checkpoints.diffusers_config import (
    DECODER_INDEX,
    IMAGE_PROCESSOR,
    PRIOR_INDEX,
    SCHEDULER,
    model_config,
    text_config,
    vision_config,
)
from triptych.checkpoints.files import read_header, read_tensors, write_tensors
from triptych.checkpoints.fit import identify
from triptych.checkpoints.headers import METADATA_KEY, PartInfo
from triptych.checkpoints.keys import comfyui_name, names_in_layout, split_comfyui
from triptych.checkpoints.load import NETWORKS, Part, assign, build_network, read_part
from triptych.errors import CheckpointError

TARGETS = ("official", "diffusers", "comfyui")
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
DIFFUSERS_FOLDERS = {
    "stage_a": "stable-cascade/vqgan",
    "stage_b": "stable-cascade/decoder",
    "stage_c": "stable-cascade-prior/prior",
}
# Parts that diffusers has no classes for; the hub keeps them, under official names, in the decoder's folder.
OFFICIAL_NAMES = {
    "stage_a": "stage_a",
    "stage_b": "stage_b",
    "stage_c": "stage_c",
    "semantic": "effnet_encoder",
    "previewer": "previewer",
    "saliency": "saliency",
    "pidinet": "pidinet",
}
LITE = ("1b", "700m")
COMFYUI_FILES = {
    "stage_c": "stable_cascade_stage_c.safetensors",
    "stage_b": "stable_cascade_stage_b.safetensors",
}


def layout_tensors(tensors: Mapping[str, Tensor], part: str, layout: str) -> dict[str, Tensor]:
    """Tensors of one part from our names to those of a layout; splitting makes views, not copies."""
    renamed: dict[str, Tensor] = {}
    for name, theirs in names_in_layout(tensors, layout, part).items():
        rows = tensors[name].chunk(len(theirs)) if len(theirs) > 1 else (tensors[name],)
        renamed.update(zip(theirs, rows, strict=True))
    return renamed


def convert_file(source: Path, target: Path, layout: str, dtype: torch.dtype | None = None) -> list[Path]:
    """Convert the parts in one weight file; returns the files written.

    `target` is a file for "official" and "comfyui" (one part in, one file out), or a folder. `dtype` stores
    floats in another precision. Raises `CheckpointError` for a part the layout does not have.
    """
    _, sniffed = identify(source)
    parts = {part: _checked(source, part) for part in sniffed.parts or (sniffed.part,) if part in NETWORKS}
    if not parts:
        _checked(source, None)  # explains what the file is instead
    towers = {part: source for part in sniffed.parts if part in ("text_encoder", "image_encoder")}
    if target.suffix == ".safetensors":
        return _convert_to_file(parts, towers, target, layout, dtype)
    with _new_folder(target) as folder:
        if len(parts) == 1 and not towers and layout == "diffusers":
            _write_diffusers_part(folder, next(iter(parts.values())), dtype)
        else:
            _write(folder, parts, towers, None, layout, dtype)
    return sorted(path for path in target.rglob("*") if path.is_file())


def _convert_to_file(
    parts: Mapping[str, Part],
    towers: Mapping[str, Path],
    target: Path,
    layout: str,
    dtype: torch.dtype | None,
) -> list[Path]:
    main = next(iter(parts))
    if layout == "diffusers":
        raise CheckpointError(
            f"A diffusers model is a folder, not a file: give a folder in place of {target}."
        )
    if len(parts) + len(towers) > 1 and layout == "official":
        raise CheckpointError(f"{', '.join([*parts, *towers])} are separate official files: give a folder.")
    if layout == "comfyui" and main in COMFYUI_FILES:
        _write_comfyui_file(target, main, parts, towers, dtype)
    else:
        _write_part(target, parts[main], "official", dtype)
    return [target]


def convert_model(
    files: ModelFiles, target: Path, layout: str, dtype: torch.dtype | None = None
) -> list[Path]:
    """Convert all parts of a model into a new folder; returns the files written."""
    paths = {part: getattr(files, part, None) for part in NETWORKS}
    parts = {part: _checked(path, part) for part, path in paths.items() if path is not None}
    towers = {"text_encoder": files.text_encoder}
    if files.image_encoder is not None:
        towers["image_encoder"] = files.image_encoder
    with _new_folder(target) as folder:
        _write(folder, parts, towers, files.tokenizer, layout, dtype)
        for path in controlnet_files(files).values():  # the same file everywhere, in the hub's place for it
            contents = _checked(path, "controlnet")
            (folder / "controlnet").mkdir(exist_ok=True)
            name = official_name(contents, dtype)
            _write_part(folder / "controlnet" / name, contents, "official", dtype)
    return sorted(path for path in target.rglob("*") if path.is_file())


def _checked(path: Path, part: str | None) -> Part:
    """A part whose every name and shape fits its network, so that no half-valid file is passed on."""
    contents = read_part(path, part)
    module = build_network(contents.info.part, contents.config, path)
    assign(module, {name: t.to("meta") for name, t in contents.tensors.items()}, path, contents.info.size)
    return contents


def _write(
    folder: Path,
    parts: Mapping[str, Part],
    towers: Mapping[str, Path],
    tokenizer: Path | None,
    layout: str,
    dtype: torch.dtype | None,
) -> None:
    writers: dict[str, Callable[..., None]] = {
        "official": _write_official,
        "diffusers": _write_diffusers,
        "comfyui": _write_comfyui,
    }
    if layout not in writers:
        raise CheckpointError(f'There is no layout "{layout}" to convert to. Known: {", ".join(TARGETS)}')
    writers[layout](folder, parts, towers, tokenizer, dtype)


def _write_official(
    folder: Path,
    parts: Mapping[str, Part],
    towers: Mapping[str, Path],
    tokenizer: Path | None,
    dtype: torch.dtype | None,
) -> None:
    for contents in parts.values():
        _write_part(folder / official_name(contents, dtype), contents, "official", dtype)
    for part, path in towers.items():
        _write_tower(folder, part, path)
    _copy_tokenizer(folder, tokenizer)


def official_name(contents: Part, dtype: torch.dtype | None = None) -> str:
    """The name the hub gives such a file: `stage_c_lite_bf16.safetensors`."""
    if contents.info.part == "controlnet":  # on the hub inside a folder, controlnet/canny.safetensors
        hint = str(contents.info.settings.get("hint"))
        name = hint if hint.isidentifier() else "controlnet"
    else:
        name = OFFICIAL_NAMES[contents.info.part]
    name += "_lite" if contents.info.size in LITE else ""
    stored = dtype or next(iter(contents.tensors.values())).dtype
    return name + ("_bf16" if stored == torch.bfloat16 else "") + ".safetensors"


def _write_part(path: Path, contents: Part, layout: str, dtype: torch.dtype | None) -> None:
    tensors = layout_tensors(contents.tensors, contents.info.part, layout)
    write_tensors(path, tensors, contents.info.to_metadata(), dtype)


def _write_diffusers(
    folder: Path,
    parts: Mapping[str, Part],
    towers: Mapping[str, Path],
    tokenizer: Path | None,
    dtype: torch.dtype | None,
) -> None:
    for part, contents in parts.items():
        if part in DIFFUSERS_FOLDERS:
            place = folder / DIFFUSERS_FOLDERS[part]
            place.mkdir(parents=True)
            _write_diffusers_part(place, contents, dtype)
        else:
            (folder / "stable-cascade").mkdir(exist_ok=True)
            _write_part(
                folder / "stable-cascade" / official_name(contents, dtype), contents, "official", dtype
            )
    decoder, prior = folder / "stable-cascade", folder / "stable-cascade-prior"
    has_image = "image_encoder" in towers and _is_clip(towers["image_encoder"])
    for root, index in ((decoder, DECODER_INDEX), (prior, _prior_index(has_image))):
        if not root.is_dir():
            continue
        (root / "scheduler").mkdir()
        _write_json(root / "scheduler" / "scheduler_config.json", SCHEDULER)
        if "text_encoder" in towers:
            _write_tower(root, "text_encoder", towers["text_encoder"])
            _copy_tokenizer(root, tokenizer)
        _write_json(root / "model_index.json", index)
    if "image_encoder" in towers:
        prior.mkdir(exist_ok=True)
        _write_tower(prior, "image_encoder", towers["image_encoder"])
        if has_image:
            (prior / "feature_extractor").mkdir()
            _write_json(prior / "feature_extractor" / "preprocessor_config.json", IMAGE_PROCESSOR)


def _prior_index(has_image: bool) -> dict[str, Any]:
    if not has_image:
        return PRIOR_INDEX
    return {
        **PRIOR_INDEX,
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }


def _write_diffusers_part(folder: Path, contents: Part, dtype: torch.dtype | None) -> None:
    """config.json and the weights of one model, as `from_pretrained` reads them."""
    _write_json(folder / "config.json", model_config(contents.info.part, contents.config))
    _write_part(folder / DIFFUSERS_FILE, contents, "diffusers", dtype)


def _write_comfyui(
    folder: Path,
    parts: Mapping[str, Part],
    towers: Mapping[str, Path],
    tokenizer: Path | None,
    dtype: torch.dtype | None,
) -> None:
    for main, file in COMFYUI_FILES.items():
        if main in parts:
            _write_comfyui_file(folder / file, main, parts, towers, dtype)
    if not any(main in parts for main in COMFYUI_FILES):
        for contents in parts.values():  # a VAE by itself keeps its official form
            _write_part(folder / official_name(contents, dtype), contents, "official", dtype)
    # Its files hold CLIP towers only; anything else, and the tokenizer, stays beside them.
    for part, path in towers.items():
        if not _is_clip(path):
            _write_tower(folder, part, path)
    _copy_tokenizer(folder, tokenizer)


def _write_comfyui_file(
    path: Path,
    main: str,
    parts: Mapping[str, Part],
    towers: Mapping[str, Path],
    dtype: torch.dtype | None,
) -> None:
    inside = ("stage_c", "semantic", "previewer") if main == "stage_c" else ("stage_b", "stage_a")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for part in inside:
        if part in parts:
            contents = parts[part]
            for name, tensor in layout_tensors(contents.tensors, part, "official").items():
                tensors[comfyui_name(part, name, main)] = tensor
            key = METADATA_KEY if part == main else f"{METADATA_KEY}.{part}"
            metadata |= {"format": "pt", key: contents.info.to_metadata()[METADATA_KEY]}
    for part in ("text_encoder", "image_encoder") if main == "stage_c" else ("text_encoder",):
        if part in towers and _is_clip(towers[part]):
            state, config = read_tower(towers[part], part)
            tensors |= {comfyui_name(part, name, main): tensor for name, tensor in state.items()}
            info = PartInfo(part, config=config)
            metadata[f"{METADATA_KEY}.{part}"] = info.to_metadata()[METADATA_KEY]
    write_tensors(path, tensors, metadata, dtype)


def read_tower(path: Path, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights (transformers names) and config.json of a CLIP tower: a folder, a file, or a ComfyUI file."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"), key=lambda file: (file.stat().st_size, file.name))
        if not files:
            raise CheckpointError(f"{path} holds no safetensors file.")
        return read_tensors(files[0]), _read_json(path / "config.json")
    header, sniffed = identify(path)
    tensors = read_tensors(path, header=header)
    if sniffed.layout == "comfyui_single":
        names = split_comfyui(tensors, sniffed.part).get(part)
        if names is None:
            raise CheckpointError(f"{path} holds no {part}.")
        tensors = {inner: _untransposed(name, tensors[name]) for inner, name in names.items()}
    elif sniffed.part != part:
        raise CheckpointError(f"{path} holds {sniffed.part}; {part} was expected.")
    stored = header.metadata.get(f"{METADATA_KEY}.{part}")
    if stored is not None:
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            config = json.loads(stored).get("config")
            if isinstance(config, dict) and config:
                return tensors, config
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return tensors, text_config(shapes) if part == "text_encoder" else vision_config(shapes)


def _untransposed(name: str, tensor: Tensor) -> Tensor:
    """OpenCLIP's `text_projection` is a bare matrix, the transpose of a linear layer's weight."""
    return tensor.T.contiguous() if name.endswith(".text_projection") else tensor


def _is_clip(path: Path) -> bool:
    """Whether a tower is CLIP's, in any place, rather than one of triptych's small towers."""
    if path.is_dir():
        return True
    return METADATA_KEY not in read_header(path).metadata or identify(path)[1].layout == "comfyui_single"


def _write_tower(folder: Path, part: str, path: Path) -> None:
    """Copy a tower: a transformers folder as it is, our own part file as one file."""
    if not _is_clip(path):
        shutil.copyfile(path, folder / f"{part}.safetensors")
        return
    if path.is_dir():
        shutil.copytree(path, folder / part, ignore=shutil.ignore_patterns(".*"))
        return
    state, config = read_tower(path, part)
    (folder / part).mkdir()
    _write_json(folder / part / "config.json", config)
    write_tensors(folder / part / "model.safetensors", state)


def _copy_tokenizer(folder: Path, tokenizer: Path | None) -> None:
    if tokenizer is None:
        return
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, folder / "tokenizer", ignore=shutil.ignore_patterns(".*"))
    else:
        shutil.copyfile(tokenizer, folder / tokenizer.name)


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears at `target` when everything in it is written, and not at all otherwise."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(
            f"{target} exists and is not an empty folder: choose another name or remove it."
        )
    working = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        working.mkdir()
        yield working
        if target.is_dir():
            target.rmdir()
        working.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a table.")
    return content
