"""`triptych encode`: a picture as latents, in a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from triptych.errors import RequestError

HELP = """Write the latents of a picture to a safetensors file.

Examples:

  triptych encode photo.png

  triptych encode photo.png --stage b --out photo-b.safetensors --check

The file says which size and model its latents have; `triptych decode` makes the picture again. --stage b adds
the latents of Stage A, a quarter of the picture's sides, from which it comes back nearly as it was.
"""


def encode(
    photo: Annotated[Path, Argument(help="The picture.")],
    out: Annotated[
        Path | None, Option(help="The new file. [NAME.safetensors, NAME from the picture]")
    ] = None,
    stage: Annotated[
        str, Option(help="c for the semantic latents alone, b for Stage A's beside them.")
    ] = "c",
    size: Annotated[str | None, Option(help="Width x height in pixels. [as the picture]")] = None,
    check: Annotated[bool, Option("--check", help="Decode again; tell PSNR and SSIM.")] = False,
    model: Annotated[str, Option(help="mini, cascade, cascade-lite, a hub name or a folder.")] = "mini",
    device: Annotated[str, Option(help="auto, cuda, cuda:1, mps or cpu.")] = "auto",
    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    json_output: Annotated[bool, Option("--json", help="Print JSON alone.")] = False,
) -> None:
    from triptych.evaluation.fidelity import compression, fidelity
    from triptych.images import read_picture
    from triptych.pipelines.cascade import Cascade

    if stage not in ("c", "b"):
        raise RequestError(f'--stage is c or b, not "{stage}".')
    target = Path(f"{photo.stem}.safetensors") if out is None else out
    if target.exists():
        raise RequestError(f"{target} is there already; choose another --out.")
    cascade = Cascade.load(model, device=device, dtype=dtype)
    latents = cascade.encode(photo, stage="b" if stage == "b" else "c", size=size)
    latents.save(target)
    deepest = latents.latents_c if latents.latents_b is None else latents.latents_b
    facts: dict[str, Any] = {
        "path": str(target),
        "size": "x".join(map(str, latents.size)),
        "latents": "x".join(map(str, deepest.shape[1:])),
        "bytes": target.stat().st_size,
        **compression(latents.size, deepest.shape),
    }
    if check:
        (made,) = cascade.decode(latents, seed=0).images
        facts |= fidelity(made, read_picture(photo))
    if json_output:
        typer.echo(json.dumps(facts, ensure_ascii=False, indent=2))
        return
    from triptych.apps.cli.making import tell

    tell(facts)
