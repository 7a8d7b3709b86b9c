"""`triptych models`: which models have a name, and what of them is on this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from typer import Option

HELP = """List the models that have a name: sizes, parameters, what is on this machine, memory needed.

Any other model is given as a path: a folder or file in any layout that `triptych info` knows.

Examples:

  triptych models

  triptych models --json
"""

BYTES = {"float32": 4, "bfloat16": 2}


def models(
    json_output: Annotated[bool, Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """The command; see HELP."""
    rows = [packaged_row(), *published_rows()]
    if json_output:
        typer.echo(json.dumps(rows, indent=2))
        return
    header = ("model", "stage C", "stage B", "parameters", "here", "memory float32 / bfloat16")
    lines = [
        (
            row["name"],
            row["stage_c"],
            row["stage_b"],
            _count(row["parameters"]),
            _presence(row),
            f"{row['memory']['float32'] / 1e9:.1f} / {row['memory']['bfloat16'] / 1e9:.1f} GB",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    for line in [header, *lines]:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    typer.echo(
        "\nStages C and B of any size go together: --model cascade --stage-c 1b. Memory is that of the"
    )
    typer.echo("weights in use at a time; stages are loaded when their turn comes.")


def packaged_row() -> dict[str, Any]:
    """The cascade inside the package, with those of its parts that are there."""
    import math

    from triptych.checkpoints.catalog import package_folder
    from triptych.checkpoints.headers import part_info, read_header
    from triptych.errors import CheckpointError

    counts: dict[str, int] = {}
    for path in sorted(package_folder("mini").glob("*.safetensors")):
        try:
            header = read_header(path)
            stored = part_info(header)
        except CheckpointError:
            continue
        if stored is not None:
            counts[stored.part] = sum(math.prod(entry.shape) for entry in header.entries.values())
    missing = [part for part in ("stage_c", "stage_b", "stage_a", "text_encoder") if part not in counts]
    return _row("mini", "small", "small", counts, sorted(counts), missing)


def published_rows() -> list[dict[str, Any]]:
    """The published cascades, with the parts that were downloaded before."""
    from triptych.checkpoints.catalog import (
        PUBLISHED,
        SHARED_FILES,
        STAGE_B_FILES,
        STAGE_C_FILES,
        TOWER_PARAMETERS,
        published_files,
    )
    from triptych.checkpoints.hub import cached

    rows = []
    for name, published in PUBLISHED.items():
        counts = {
            "stage_c": STAGE_C_FILES[published.stage_c][2],
            "stage_b": STAGE_B_FILES[published.stage_b][2],
            **{part: place[2] for part, place in SHARED_FILES.items()},
            **TOWER_PARAMETERS,
        }
        files = published_files(name)
        present = [part for part, place in files.items() if cached(*place) is not None]
        missing = [part for part in files if part not in present]
        rows.append(_row(name, published.stage_c, published.stage_b, counts, present, missing))
    return rows


def _row(
    name: str, stage_c: str, stage_b: str, counts: dict[str, int], present: list[str], missing: list[str]
) -> dict[str, Any]:
    largest = max(counts.values(), default=0)
    return {
        "name": name,
        "stage_c": stage_c,
        "stage_b": stage_b,
        "parameters": sum(counts.values()),
        "present": present,
        "missing": missing,
        "memory": {dtype: largest * size for dtype, size in BYTES.items()},
    }


def _presence(row: dict[str, Any]) -> str:
    if not row["missing"]:
        return "all parts"
    if not row["present"]:
        return "not yet"
    return f"without {', '.join(row['missing'])}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
