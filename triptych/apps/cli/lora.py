"""`triptych lora`: what a LoRA file holds, other makers' layouts, into a checkpoint and out of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

if TYPE_CHECKING:
    from triptych.checkpoints.lora import Lora, PartShapes

app = typer.Typer(help="Look into LoRA files, convert, merge and extract them.", no_args_is_help=True)

INFO = """Say what a LoRA file holds: kind, rank, which parts it changes, learned tokens, licence.

Example:

  triptych lora info mydog.safetensors
"""
CONVERT = """Write a LoRA in another maker's layout.

kohya files load in ComfyUI and kohya's scripts; `official` numbers the matrices as the official repository
does. The official layout does not name its learned tokens: give them, with the word each started from.

Examples:

  triptych lora convert mydog.safetensors for-diffusers.safetensors --to diffusers

  triptych lora convert official.safetensors named.safetensors --token "[fernando]=dog"
"""
MERGE = """Put LoRAs into the weights of a model, for programs that read checkpoints only.

OUT is a file, or a folder where the LoRAs change both Stage C and Stage B. Learned tokens cannot be merged.

Example:

  triptych lora merge stage_c_with_dog.safetensors --model mini --lora mydog.safetensors:0.8
"""
EXTRACT = """Find the LoRA between a model's weights and weights that were trained further from them.

Example:

  triptych lora extract stage_c.safetensors stage_c_tuned.safetensors difference.safetensors --rank 16
"""

File = Annotated[Path, Argument(help="A LoRA file of any maker.", metavar="FILE")]
Out = Annotated[Path, Argument(help="File to write; must not exist.", metavar="OUT")]
Model = Annotated[str | None, Option(help="The model it is for. [found by its shapes]", show_default=False)]


@app.command("info", help=INFO)
def info(
    file: File,
    model: Model = None,
    json_output: Annotated[bool, Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """See INFO."""
    lora, fits = read(file, model)
    facts: dict[str, Any] = {
        "file": str(file), "for": fits, "layout": lora.layout, "kind": kinds(lora), "rank": lora.rank,
        "changes": {part: len(own) for part, own in lora.changes.items()},
        "tokens": {name: len(vectors) for name, vectors in lora.tokens.items()},
        "unnamed tokens": 0 if lora.offsets is None else len(lora.offsets.indices),
        "licence": lora.info.licence, "notice": lora.info.notice, "settings": lora.info.settings,
    }  # fmt: skip
    if json_output:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        if value not in ("", 0, None):
            typer.echo(f"{name:<15} {value}")


@app.command("convert", help=CONVERT)
def convert(
    file: File,
    out: Out,
    to: Annotated[str, Option("--to", help="kohya, onetrainer, comfyui, diffusers or official.")] = "kohya",
    token: Annotated[
        list[str] | None, Option(metavar="NAME=WORD", help="Name a nameless token; may be repeated.")
    ] = None,
    model: Model = None,
) -> None:
    """See CONVERT."""
    from triptych.checkpoints.lora import with_tokens
    from triptych.checkpoints.lora_write import write_lora
    from triptych.errors import SettingsError

    refuse_existing(out)
    lora, fits = read(file, model)
    if token:
        if model is None:
            raise SettingsError(
                "--token needs --model: a token starts from a word of that model's text tower."
            )
        table, starts = token_starts(model, token)
        lora = with_tokens(lora, table, starts)
    write_lora(out, lora, to, shapes_of(fits)["stage_c"] if to == "official" else None)
    typer.echo(f"{out}: {to} layout, {kinds(lora)} of rank {lora.rank}")


@app.command("merge", help=MERGE)
def merge(
    out: Out,
    lora: Annotated[list[str], Option(metavar="FILE[:SCALE]", help="A LoRA; may be repeated.")],
    model: Annotated[str, Option(help="The model whose weights are taken.")] = "mini",
) -> None:
    """See MERGE."""
    from dataclasses import replace

    from triptych.checkpoints.catalog import find_model
    from triptych.checkpoints.headers import PartInfo
    from triptych.checkpoints.lora_merge import merge_into, with_licence
    from triptych.errors import CheckpointError
    from triptych.pipelines.adapters import split_scale

    files = find_model(model)
    read_files = [(scale, read(path, model)[0]) for path, scale in map(split_scale, lora)]
    changes: dict[str, list[Any]] = {}
    stated = PartInfo("lora")
    for scale, one in read_files:
        stated = with_licence(stated, one.info)
        for part, own in one.changes.items():
            changes.setdefault(part, []).extend((change, scale) for change in own)
    if "text_encoder" in changes:
        raise CheckpointError(
            "One of the LoRAs changes the text tower, which `merge` does not write; wear it with --lora."
        )
    if not changes:
        raise CheckpointError("There is nothing to merge: these files only teach tokens.")
    refuse_existing(out)
    written = {part: out for part in changes}
    if len(changes) > 1:
        out.mkdir(parents=True)
        written = {part: out / f"{part}.safetensors" for part in changes}
    for part, stacked in changes.items():
        merge_into(Path(getattr(files, part)), part, stacked, replace(stated, part=part), written[part])
        typer.echo(f"{written[part]}: {part} of {model} with {len(stacked)} changes; use it with "
                   f"--{part.replace('_', '-')} {written[part]}")  # fmt: skip
    tokens = [name for _, one in read_files for name in one.tokens]
    if tokens:
        typer.echo(f"Not merged, since tokens belong to prompts: {', '.join(tokens)}. Keep the LoRA file for "
                   "them.", err=True)  # fmt: skip
    if any(one.gated for _, one in read_files):
        typer.echo("The LoRA file waits for its token; merged weights act on every prompt.", err=True)


@app.command("extract", help=EXTRACT)
def extract(
    base: Annotated[Path, Argument(help="Weights before: a Stage C or Stage B file.", metavar="BASE")],
    tuned: Annotated[Path, Argument(help="The same part, trained further.", metavar="TUNED")],
    out: Out,
    rank: Annotated[int, Option(min=1, help="Rank of the LoRA; a larger one comes nearer.")] = 16,
    only: Annotated[str, Option(help="Only modules whose name contains this, such as .attn")] = "",
    to: Annotated[str, Option("--to", help="kohya, onetrainer, comfyui, diffusers or official.")] = "kohya",
) -> None:
    """See EXTRACT."""
    from triptych.checkpoints.lora_merge import extract_between
    from triptych.checkpoints.lora_write import write_lora

    refuse_existing(out)
    lora, kept = extract_between(base, tuned, rank, only)
    write_lora(out, lora, to)
    held = sum(kept.values()) / len(kept)
    typer.echo(f"{out}: {len(kept)} matrices, rank {rank}, holding {100 * held:.1f} % of their difference")


def read(file: Path, model: str | None) -> tuple[Lora, str]:
    """A LoRA, and the model or size it fits: `model`, or the first that its shapes fit."""
    from triptych.checkpoints.fit import identify
    from triptych.checkpoints.lora import read_lora
    from triptych.errors import CheckpointError

    if model is not None:
        return read_lora(file, shapes_of(model)), model
    identify(file)
    errors: list[CheckpointError] = []
    for name in ("mini", "cascade-lite", "cascade"):
        try:
            return read_lora(file, shapes_of(name)), name
        except CheckpointError as error:
            errors.append(error)
    raise CheckpointError(f"{file} fits none of mini, cascade-lite and cascade: {errors[-1]}") from None


def shapes_of(model: str) -> PartShapes:
    """Names and shapes of a model's networks; those of published sizes are known without their files."""
    from triptych.checkpoints.catalog import PUBLISHED, find_model
    from triptych.checkpoints.fit import identify
    from triptych.checkpoints.load import layout_shapes
    from triptych.checkpoints.lora_merge import published_shapes

    if model in PUBLISHED:
        return published_shapes(PUBLISHED[model].stage_c, PUBLISHED[model].stage_b)
    files = find_model(model)
    found = {}
    for part in ("stage_c", "stage_b"):
        header, sniffed = identify(getattr(files, part))
        found[part] = layout_shapes(header, sniffed, part)
    return found


def token_starts(model: str, given: list[str]) -> tuple[Any, dict[str, Any]]:
    """The token table of a model's text tower, and for each NAME=WORD the mean of the word's rows."""
    from triptych.checkpoints.catalog import find_model
    from triptych.conditioning.encode import load_text_encoder

    files = find_model(model)
    encoder = load_text_encoder(files.text_encoder, files.tokenizer)
    owner, name = encoder.tower.token_table()
    starts = {}
    for text in given:
        token, _, word = text.partition("=")
        starts[token] = encoder.token_vectors(word).mean(0) if word else None
    return owner.get_submodule(name).weight, starts


def kinds(lora: Lora) -> str:
    """The kinds of change in a file, such as "lora" or "lora with magnitudes (DoRA)"."""
    found = {(change.kind, change.magnitude is not None) for own in lora.changes.values() for change in own}
    return ", ".join(sorted(kind + (" with magnitudes (DoRA)" if dora else "") for kind, dora in found))


def refuse_existing(out: Path) -> None:
    """Raise CheckpointError where something stands already."""
    from triptych.errors import CheckpointError

    if out.exists():
        raise CheckpointError(f"{out} exists: choose another name or remove it.")
