"""The models that can be named, the settings published weights were made for, and finding their files.

    mini           inside the package
    cascade        Stage C 3.6b and Stage B 1.5b from the hub, `stabilityai/stable-cascade`
    cascade-lite   Stage C 1b and Stage B 700m, same place; the image tower is in `stable-cascade-prior`
    owner/name     any other hub repository in a layout that triptych reads
    a path         a folder in the official, diffusers or triptych layout, or a ComfyUI file

Files in a folder are told apart by what is inside them, not by their names. Nothing here needs torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.checkpoints.fit import identify
from triptych.checkpoints.headers import part_info, read_header
from triptych.checkpoints.hub import cached, fetch, fetch_repository, tell_once
from triptych.errors import CheckpointError, nearest

PUBLISHED_LICENCE = "Stability AI Non-Commercial Research Community License"
PUBLISHED_NOTICE = (
    "Stable Cascade's weights are published by Stability AI for non-commercial research use only "
    "(https://huggingface.co/stabilityai/stable-cascade); what is made from them carries that licence."
)
DECODER_REPO = "stabilityai/stable-cascade"
PRIOR_REPO = "stabilityai/stable-cascade-prior"


@dataclass(frozen=True)
class Published:
    """A published cascade: the sizes of Stages C and B it is made of."""

    stage_c: str
    stage_b: str
    summary: str


PUBLISHED = {
    "cascade": Published("3.6b", "1.5b", "Stable Cascade, full size"),
    "cascade-lite": Published("1b", "700m", "Stable Cascade, lite"),
}
PACKAGED = ("mini",)
MODEL_NAMES = (*PACKAGED, *PUBLISHED)

# Where each published part is: size -> (repository, file, parameters). 16-bit files, half the download.
STAGE_C_FILES = {
    "3.6b": (DECODER_REPO, "stage_c_bf16.safetensors", 3_589_103_632),
    "1b": (DECODER_REPO, "stage_c_lite_bf16.safetensors", 1_030_785_040),
}
STAGE_B_FILES = {
    "1.5b": (DECODER_REPO, "stage_b_bf16.safetensors", 1_562_941_136),
    "700m": (DECODER_REPO, "stage_b_lite_bf16.safetensors", 699_471_248),
}
SHARED_FILES = {
    "stage_a": (DECODER_REPO, "stage_a.safetensors", 18_406_894),
    "semantic": (DECODER_REPO, "effnet_encoder.safetensors", 20_197_968),
    "previewer": (DECODER_REPO, "previewer.safetensors", 3_979_651),
}

# ControlNets of the 3.6B Stage C, by what they were trained on; identity's was withdrawn.
CONTROLNET_FILES = {
    "canny": (DECODER_REPO, "controlnet/canny.safetensors"),
    "inpainting": (DECODER_REPO, "controlnet/inpainting.safetensors"),
    "super_resolution": (DECODER_REPO, "controlnet/super_resolution.safetensors"),
}
# What a pipeline needs to know about published weights, which say nothing about themselves.
PUBLISHED_SETTINGS: dict[str, dict[str, Any]] = {
    "stage_c": {
        "prediction": "eps",
        "shift": 2.0,
        "pixels_per_latent": 42.67,
        "default_size": [1024, 1024],
        "size_multiple": 8,
        "steps": 20,
        "guidance": 4.0,
        "rescale": 0.7,
        "sampler": "ddpm",
        "text_encoder": "clip-bigg",
        "image_encoder": "clip-vit-l",
    },
    "stage_b": {
        "prediction": "eps",
        "shift": 1.0,
        "steps": 10,
        "guidance": 1.1,
        "rescale": 0.7,
        "sampler": "ddpm",
    },
}


def package_folder(name: str = "mini") -> Path:
    """The folder of weights that come with the package."""
    return Path(__file__).parent.parent / "weights" / name


@dataclass(frozen=True)
class ModelFiles:
    """Where the parts of one model are. A ComfyUI file may stand for several parts at once.

    `text_encoder` and `image_encoder` are part files of triptych, or folders (or files) of transformers;
    `tokenizer` is a `tokenizer.json` or a transformers tokenizer folder. The last three parts are optional.
    """

    name: str
    stage_a: Path
    stage_b: Path
    stage_c: Path
    text_encoder: Path
    tokenizer: Path | None
    semantic: Path | None = None
    previewer: Path | None = None
    image_encoder: Path | None = None
    licence: str = ""
    notice: str = ""


def find_model(
    name: str | Path = "mini",
    *,
    stage_c: str | Path | None = None,
    stage_b: str | Path | None = None,
    stage_a: str | Path | None = None,
    text_encoder: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> ModelFiles:
    """Find, and for published names download, the files of a model.

    `stage_c` and `stage_b` are a published size ("3.6b", "1b"; "1.5b", "700m") or a path; `stage_a` and
    `text_encoder` are paths. `say` is told the licence notice before the first download (standard error by
    default). Raises `CheckpointError` for unknown names, missing parts and failed downloads.
    """
    given = {"stage_c": stage_c, "stage_b": stage_b, "stage_a": stage_a, "text_encoder": text_encoder}
    sizes = {part: str(value) for part, value in given.items() if value in SIZES_BY_PART.get(part, ())}
    paths = {part: Path(value) for part, value in given.items() if value is not None and part not in sizes}
    for part, path in paths.items():
        if not path.exists():
            known = SIZES_BY_PART.get(part, ())
            hint = f"; {nearest(str(path), known)}" if known else ""
            raise CheckpointError(f"There is no file {path} for {part}{hint}.")
    own = {part: _own_file(path, part) for part, path in paths.items()}
    folder = Path(name)
    if str(name) in PUBLISHED:
        found = _from_hub(str(name), sizes, own, say or _to_stderr)
    elif str(name) in PACKAGED:
        found = scan(package_folder(str(name)), sizes, own)
    elif folder.exists():
        found = scan(folder, sizes, own)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not folder.parent.exists():
        found = scan(fetch_repository(str(name)), sizes, own)
    else:
        raise CheckpointError(f'There is no model "{name}"; {nearest(str(name), MODEL_NAMES)}, or a path.')
    return _complete(str(name), {**found, **own})


SIZES_BY_PART: dict[str, tuple[str, ...]] = {"stage_c": tuple(STAGE_C_FILES), "stage_b": tuple(STAGE_B_FILES)}
REQUIRED = ("stage_c", "stage_b", "stage_a", "text_encoder")
OPTIONAL = ("semantic", "previewer", "image_encoder")
# Folders inside a diffusers or hub folder that hold one model each.
PART_FOLDERS = ("prior", "prior_lite", "decoder", "decoder_lite", "vqgan", "text_encoder", "image_encoder")


@dataclass(frozen=True)
class Candidate:
    """One file found to hold a part; smaller `rank` is preferred among several."""

    part: str
    size: str | None
    path: Path
    rank: tuple[int, int, int, str]


def scan(folder: Path, sizes: Mapping[str, str], own: Mapping[str, Path]) -> dict[str, Path]:
    """Parts found in a folder (or a ComfyUI file), told by their contents.

    `sizes` asks for a published size of Stage C or B. Parts in `own` need not be there. Raises
    `CheckpointError` when files are damaged or a size is missing; absent parts are simply not in the result.
    """
    candidates: list[Candidate] = []
    troubles: list[CheckpointError] = []
    for path in _weight_files(folder):
        try:
            candidates += _candidates(path)
        except CheckpointError as error:
            troubles.append(error)
    found: dict[str, Path] = {}
    for part in (*REQUIRED, *OPTIONAL):
        fitting = [c for c in candidates if c.part == part]
        if part in sizes and part not in own:
            there = sorted({c.size or "no published size" for c in fitting})
            fitting = [c for c in fitting if c.size == sizes[part]]
            if not fitting:
                has = f"it has {', '.join(there)}" if there else f"it has no {part}"
                raise CheckpointError(f'{folder} has no {part} "{sizes[part]}"; {has}.')
        if fitting:
            found[part] = _as_folder(min(fitting, key=lambda c: c.rank).path)
        elif part in REQUIRED and part not in own and troubles:
            raise troubles[0]
    return found


def _weight_files(folder: Path) -> list[Path]:
    """Safetensors files of a model folder: its own, its parts' folders, and a `-prior` folder beside it."""
    if folder.is_file():
        return [folder]
    roots = [folder]
    roots += sorted(p for p in folder.iterdir() if p.is_dir() and _is_pipeline(p))
    beside = folder.resolve().with_name(folder.resolve().name + "-prior")
    if _is_pipeline(folder) and beside.is_dir():
        roots.append(beside)
    files: list[Path] = []
    for root in roots:
        files += sorted(root.glob("*.safetensors"))
        for name in PART_FOLDERS:
            files += sorted((root / name).glob("*.safetensors"))
    if not files and (
        pickled := sorted(p for p in folder.rglob("*") if p.suffix in (".pt", ".bin", ".ckpt"))
    ):
        read_header(pickled[0])
    return files


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").exists() or any((folder / name).is_dir() for name in PART_FOLDERS)


def _candidates(path: Path) -> list[Candidate]:
    header, sniffed = identify(path)
    full_first = {"3.6b": 0, "1.5b": 0, "1b": 1, "700m": 1}.get(sniffed.size or "", 0)
    elsewhere = {"triptych": 0, "official": 0, "transformers": 0, "diffusers": 1}.get(sniffed.layout, 2)
    wide = header.size // 2**20
    rank = (full_first, elsewhere, wide, path.name)
    return [Candidate(part, sniffed.size, path, rank) for part in sniffed.parts or (sniffed.part,)]


def controlnet_files(files: ModelFiles) -> dict[str, Path]:
    """Hint -> ControlNet, of those beside a model's own files or in a folder `controlnet` there.

    The first of a kind counts, by name; damaged files do not.
    """
    parts = (files.stage_c, files.stage_b, files.stage_a, files.text_encoder)
    folders = dict.fromkeys(part.parent for part in parts)
    found: dict[str, Path] = {}
    for place in [inner for folder in folders for inner in (folder, folder / "controlnet")]:
        for path in sorted(place.glob("*.safetensors")):
            try:
                header, sniffed = identify(path)
            except CheckpointError:
                continue
            if sniffed.part == "controlnet":
                stored = part_info(header)
                hint = stored.settings.get("hint") if stored is not None else path.stem
                found.setdefault(str(hint), path)
    return found


def beside(files: ModelFiles, part: str) -> Path | None:
    """The file of a small extra part ("saliency", "pidinet") beside a model's own files, if there is one."""
    parts = (files.stage_c, files.stage_b, files.stage_a, files.text_encoder)
    for folder in dict.fromkeys(path.parent for path in parts):
        for path in sorted(folder.glob("*.safetensors")):
            try:
                if identify(path)[1].part == part:
                    return path
            except CheckpointError:
                continue
    return None


def find_controlnet(files: ModelFiles, hint: str, say: Callable[[str], None] | None = None) -> Path:
    """The ControlNet of a model for one kind of hint; published ones are downloaded the first time.

    Raises CheckpointError that names the kinds there are, or says that nobody published this one.
    """
    found = controlnet_files(files)
    if hint in found:
        return found[hint]
    if files.name in PUBLISHED and hint in CONTROLNET_FILES:
        place = CONTROLNET_FILES[hint]
        if cached(*place) is None:
            tell_once(PUBLISHED_NOTICE, say or _to_stderr)
        return fetch(*place)
    known = sorted({*found, *(CONTROLNET_FILES if files.name in PUBLISHED else ())})
    has = f"it has {', '.join(known)}" if known else "it has none at all"
    raise CheckpointError(
        f'{files.name} has no ControlNet for "{hint}"; {has}. Give a file with --controlnet, or train one '
        f'with the recipe "controlnet" (control.hint = "{hint}").'
    )


def _as_folder(path: Path) -> Path:
    """Towers in the transformers layout are folders: the weights need the config.json beside them."""
    inside = path.parent.name in ("text_encoder", "image_encoder") and path.with_name("config.json").exists()
    return path.parent if inside else path


def _own_file(path: Path, part: str) -> Path:
    """The file for a part that the user named, by file or by folder."""
    if path.is_file() or (part == "text_encoder" and (path / "config.json").exists()):
        return path
    found = scan(path, {}, {other: path for other in REQUIRED if other != part})
    if part not in found:
        raise CheckpointError(f"{path} holds no {part}.")
    return found[part]


def _complete(name: str, found: Mapping[str, Path]) -> ModelFiles:
    missing = [part for part in REQUIRED if part not in found]
    if missing:
        option = f" Give it with --{missing[0].replace('_', '-')}." if len(missing) == 1 else ""
        has = f" (it has {', '.join(found)})" if found else ""
        raise CheckpointError(f"{name} has no {' and no '.join(missing)}{has}.{option}")
    licence, notice = "", ""
    for part in ("stage_c", "stage_b", "stage_a"):
        stored = part_info(read_header(found[part]))
        licence = licence or (stored.licence if stored else "")
        notice = notice or (stored.notice if stored else "")
    if name in PUBLISHED:
        licence, notice = PUBLISHED_LICENCE, PUBLISHED_NOTICE
    tokenizer = _find_tokenizer(found["text_encoder"])
    return ModelFiles(name=name, tokenizer=tokenizer, licence=licence, notice=notice, **found)


def _find_tokenizer(text_encoder: Path) -> Path | None:
    """Beside the text encoder: `tokenizer.json`, or the folder `tokenizer` as hub repositories have it."""
    inside = [text_encoder] if text_encoder.is_dir() else []
    for folder in (*inside, text_encoder.parent):
        if (folder / "tokenizer").is_dir():
            return folder / "tokenizer"
        if (folder / "tokenizer.json").exists():
            return folder / "tokenizer.json"
    return None


def _from_hub(
    name: str, sizes: Mapping[str, str], own: Mapping[str, Path], say: Callable[[str], None]
) -> dict[str, Path]:
    """The parts of a published cascade, from the cache or downloaded into it."""
    files = published_files(name, sizes.get("stage_c"), sizes.get("stage_b"))
    wanted = {part: place for part, place in files.items() if part not in own}
    absent = [place for place in wanted.values() if cached(*place) is None]
    if absent:
        tell_once(PUBLISHED_NOTICE, say)
    found = {part: fetch(*place) for part, place in wanted.items()}
    for part in ("text_encoder", "image_encoder"):
        if part in found:
            repository, file = files[part]
            fetch(repository, f"{part}/config.json")
            found[part] = found[part].parent
    if "text_encoder" in found:
        for file in TOKENIZER_FILES:
            fetch(DECODER_REPO, file)
    return found


TOKENIZER_FILES = tuple(
    f"tokenizer/{file}"
    for file in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
    )
)
TOWER_PARAMETERS = {"text_encoder": 694_659_840, "image_encoder": 303_966_208}
TOWER_AT_ONCE = {
    "text_encoder": 84_659_200,
    "image_encoder": 14_253_056,
}  # one layer, and all outside of layers
TOWER_FILES = {
    "text_encoder": (DECODER_REPO, "text_encoder/model.bf16.safetensors"),
    "image_encoder": (PRIOR_REPO, "image_encoder/model.bf16.safetensors"),
}


def published_files(
    name: str, stage_c: str | None = None, stage_b: str | None = None
) -> dict[str, tuple[str, str]]:
    """Part -> (repository, file) of a published model, with other sizes of Stages C and B if given."""
    published = PUBLISHED[name]
    return {
        "stage_c": STAGE_C_FILES[stage_c or published.stage_c][:2],
        "stage_b": STAGE_B_FILES[stage_b or published.stage_b][:2],
        **{part: place[:2] for part, place in SHARED_FILES.items()},
        **TOWER_FILES,
    }


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
