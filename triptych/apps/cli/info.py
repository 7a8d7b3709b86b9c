"""`triptych info`: what a weight file is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

if TYPE_CHECKING:
    from triptych.checkpoints.headers import Header
    from triptych.checkpoints.sniff import Sniffed

HELP = """Say what a weight file is: part, layout, size, parameters, precision, licence and configuration.

Only the header is read, so large files answer at once; --check reads every number.

Examples:

  triptych info stage_c_lite_bf16.safetensors

  triptych info downloaded.safetensors --check

  triptych info stage_b.safetensors --json
"""


def info(
    file: Annotated[Path, Argument(help="A .safetensors file in any layout.", metavar="FILE")],
    check: Annotated[bool, Option("--check", help="Look for NaN and infinity in every tensor.")] = False,
    json_output: Annotated[bool, Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """The command; see HELP."""
    from triptych.checkpoints.fit import identify

    header, sniffed = identify(file)
    facts = describe(header, sniffed)
    if check:
        from triptych.checkpoints.files import check_finite, read_tensors

        check_finite(read_tensors(file, header=header), file)
        facts["numbers"] = "all finite"
    if json_output:
        typer.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
        if value not in ("", None):
            typer.echo(f"{name:<11} {_plain(value)}")


def describe(header: Header, sniffed: Sniffed) -> dict[str, Any]:
    """The facts in the order they are shown."""
    import math

    from triptych.checkpoints.headers import part_info
    from triptych.checkpoints.sniff import PART_NAMES

    stored = part_info(header)
    numbers: dict[str, int] = {}
    for entry in header.entries.values():
        numbers[entry.dtype] = numbers.get(entry.dtype, 0) + math.prod(entry.shape)
    return {
        "file": str(header.path),
        "part": sniffed.part,
        "contents": ", ".join(PART_NAMES.get(part, part) for part in sniffed.parts or (sniffed.part,)),
        "layout": sniffed.layout,
        "size": sniffed.size or (stored.size if stored else None),
        "parameters": sum(numbers.values()),
        "tensors": len(header.entries),
        "dtype": ", ".join(sorted(numbers, key=lambda dtype: -numbers[dtype])),
        "bytes": header.size,
        "step": stored.step if stored else None,
        "recipe": stored.recipe if stored else "",
        "licence": stored.licence if stored else _published_licence(sniffed),
        "notice": stored.notice if stored else "",
        "settings": stored.settings if stored else {},
        "config": stored.config if stored else _inferred_config(header, sniffed),
    }


def _published_licence(sniffed: Sniffed) -> str:
    from triptych.checkpoints.catalog import PUBLISHED_LICENCE

    return f"{PUBLISHED_LICENCE}, if it comes from the published weights" if sniffed.size else ""


def _inferred_config(header: Header, sniffed: Sniffed) -> dict[str, Any]:
    """The configuration read off the shapes; empty for files that are no network of the cascade."""
    from triptych.checkpoints.load import NETWORKS, describe_part

    return describe_part(header.path).config if sniffed.part in NETWORKS else {}


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    return str(value)
