"""`triptych convert`: weights from any layout to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

HELP = """Convert weights between the layouts of other programs, without losing a number.

SOURCE is a file, a folder, or a model name. A single official or ComfyUI file is written as a file where
TARGET ends in .safetensors; everything else becomes a new folder. `--to diffusers` writes a model as two,
`stable-cascade` and `stable-cascade-prior`, which StableCascadeDecoderPipeline and
StableCascadePriorPipeline of diffusers 0.42 load whole. Before diffusers moved Stage A's class, the index
had to say ["wuerstchen", "PaellaVQModel"]; for such a version, change that line of `model_index.json`.

Examples:

  triptych convert cascade-lite lite-diffusers --to diffusers

  triptych convert stage_c_lite_bf16.safetensors prior --to diffusers

  triptych convert stable_cascade_stage_c.safetensors parts --to official

  triptych convert stage_c.safetensors stage_c_bf16.safetensors --to official --dtype bfloat16
"""


def convert(
    source: Annotated[
        str, Argument(help="A weight file, a model folder, or a model name.", metavar="SOURCE")
    ],
    target: Annotated[Path, Argument(help="File or folder to write; must not exist.", metavar="TARGET")],
    to: Annotated[str, Option("--to", help="official, diffusers or comfyui.")] = "official",
    dtype: Annotated[
        str | None, Option(help="Store as float32, bfloat16 or float16. [as it is]", show_default=False)
    ] = None,
) -> None:
    """The command; see HELP."""
    from triptych.checkpoints.catalog import find_model
    from triptych.checkpoints.convert import TARGETS, convert_file, convert_model
    from triptych.checkpoints.files import STORAGE_DTYPES
    from triptych.errors import CheckpointError, SettingsError, nearest

    if to not in TARGETS:
        raise SettingsError(f'--to cannot be "{to}"; {nearest(to, TARGETS)}')
    dtypes = {str(known).removeprefix("torch."): known for known in STORAGE_DTYPES}
    if dtype is not None and dtype not in dtypes:
        raise SettingsError(f'--dtype cannot be "{dtype}"; {nearest(dtype, dtypes)}')
    if target.is_file():
        raise CheckpointError(f"{target} exists: choose another name or remove it.")
    stored = None if dtype is None else dtypes[dtype]
    if Path(source).is_file():
        written = convert_file(Path(source), target, to, stored)
    else:
        written = convert_model(find_model(source), target, to, stored)
    size = sum(path.stat().st_size for path in written)
    files = "1 file" if len(written) == 1 else f"{len(written)} files"
    typer.echo(f"{target}: {files}, {size / 1e6:,.1f} MB, {to} layout")
