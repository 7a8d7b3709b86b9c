"""`triptych bench`: our network and sampling loop against diffusers', measured in one run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from triptych.errors import RequestError

if TYPE_CHECKING:
    from triptych.evaluation.bench import Bench, Measured
    from triptych.pipelines.speed import Speed

HELP = """Measure speed against diffusers: same weights, inputs, precision and threads, in turn.

Examples:

  triptych bench --quick

  triptych bench --json

  triptych bench --compiled --full

  triptych bench --quick --without fused --without once

  triptych bench --into docs/performance.md --mark "bench bfloat16"

Networks have random weights at full size (1B and 700M), so nothing is downloaded. A ratio of 1.2 means that
diffusers takes 1.2 times as long; the floor is the matrix products and attention alone. --quick lowers the
depth of the networks, --full runs every step of the pipeline. Among what makes triptych faster, --without
switches off `once` (conditions are read once per picture), `fused` (blocks work in place, in spans), `share`
(branches of guidance share what is equal) or `together` (both branches in one batch). --into writes the
table between the marks <!-- bench --> and <!-- end of bench --> of a page, or those that --mark names: one
table for each machine and precision. Below float32, a column tells how far each program is from what float32
gives with the same weights. Needs diffusers (extra `test`).
"""

QUICK_SIDE = 512


def bench(
    quick: Annotated[
        bool, Option("--quick", help="Fewer blocks and smaller pictures: minutes less.")
    ] = False,
    full: Annotated[bool, Option("--full", help="All 20 and 10 steps, not two of each.")] = False,
    compiled: Annotated[bool, Option("--compiled", help="Also diffusers under torch.compile.")] = False,
    repeats: Annotated[int, Option(min=1, help="Steps of each contender that are counted.")] = 2,
    size: Annotated[int | None, Option(min=128, help="Side of the picture. [1024]")] = None,
    no_loading: Annotated[bool, Option("--no-loading", help="Leave loading out: it writes 4 GB.")] = False,
    device: Annotated[str, Option(help="auto, cuda, cuda:1, mps or cpu.")] = "auto",
    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int | None, Option(min=1, help="Threads of the processor. [all]")] = None,
    without: Annotated[
        list[str] | None, Option(help="Switch off once, fused, share or together; may be repeated.")
    ] = None,
    into: Annotated[Path | None, Option(help="Put the table into this page, between its two marks.")] = None,
    mark: Annotated[str, Option(help="What the marks say, where a page has several tables.")] = "bench",
    markdown: Annotated[bool, Option("--markdown", help="Print the table that --into writes.")] = False,
    json_output: Annotated[bool, Option("--json", help="Print JSON alone.")] = False,
) -> None:
    if quick and full:
        raise RequestError("--quick and --full ask for opposite things; choose one.")
    from triptych.evaluation.bench import Plan, run_bench, use_threads
    from triptych.evaluation.pages import put_table
    from triptych.pipelines.placement import choose_device, choose_dtype

    where = choose_device(device)
    side = size or (QUICK_SIDE if quick else 1024)
    if side % 128:
        raise RequestError(f"A side of {side} pixels cannot be measured; take a multiple of 128.")
    speed = switched_off(without or [])
    if into is not None:
        put_table(into, mark, None)  # a page without marks is known before an hour of measuring, not after
    plan = Plan(
        side, repeats, reduced=quick, whole=full, compiled=compiled, loading=not no_loading, speed=speed
    )
    with use_threads(threads):
        result = run_bench(
            plan, where, choose_dtype(dtype, where), lambda text: print(text, file=sys.stderr, flush=True)
        )
    if into is not None:
        put_table(into, mark, table(result))
    if json_output:
        typer.echo(json.dumps(result.as_json(), indent=1))
    elif markdown:
        typer.echo(table(result))
    else:
        show(result)


SWITCHES = ("once", "fused", "share", "together")


def switched_off(names: list[str]) -> Speed:
    from triptych.pipelines.speed import Speed

    for name in names:
        if name not in SWITCHES:
            raise RequestError(f'There is no switch "{name}"; choose from {", ".join(SWITCHES)}.')
    return replace(Speed(), **dict.fromkeys(names, False))


COLUMNS = ("what", "triptych", "diffusers", "ratio", "floor", "above the floor", "outputs differ by")
ERRORS = "off float32: ours, theirs"  # a further column where the precision is below float32


def columns(result: Bench) -> list[str]:
    return [*COLUMNS, ERRORS] if has_errors(result) else [*COLUMNS]


def has_errors(result: Bench) -> bool:
    return any(case.errors for case in result.cases.values())


def cells(name: str, case: Measured) -> list[str]:
    ours, theirs = case.seconds["triptych"], case.seconds["diffusers"]
    spread = max(case.spread["triptych"], case.spread["diffusers"])
    return [
        name.replace("_", " "),
        f"{ours:.3g} s",
        f"{theirs:.3g} s",
        f"{case.ratio():.2f} (spread {spread:.0%})",
        f"{case.floor:.3g} s" if case.floor else "",
        f"{case.above_floor():.2f}" if case.floor else "",
        f"{case.difference:.1e}" if case.difference else "",
        f"{case.errors['triptych']:.2%}, {case.errors['diffusers']:.2%}" if case.errors else "",
    ]


def rows(result: Bench) -> list[list[str]]:
    """The rows of the table; what was also measured under torch.compile comes last."""
    from triptych.evaluation.bench import Measured

    found = [cells(name, case) for name, case in result.cases.items()]
    for name, case in result.cases.items():
        if "diffusers compiled" in case.seconds:
            names = ("triptych", "diffusers")
            both = Measured(
                {own: case.seconds[f"{own} compiled"] for own in names},
                {own: case.spread[f"{own} compiled"] for own in names},
                case.floor,
            )
            found.append(cells(f"{name}, compiled", both))
    return [row[: len(columns(result))] for row in found]


def table(result: Bench) -> str:
    """The result as a Markdown table with the machine above it."""
    alone = "one thread (seconds of the processor)" if result.device == "cpu" else "one thread"
    threads = alone if result.threads == 1 else f"{result.threads} threads"
    lines = [
        f"{result.machine['processor']}, {threads}, {result.dtype} on {result.device}, "
        f"torch {result.machine['torch']}; {describe(result)}.",
        "",
        "| " + " | ".join(columns(result)) + " |",
        "|" + "---|" * len(columns(result)),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows(result)]
    return "\n".join(lines)


def describe(result: Bench) -> str:
    depth = "at reduced depth" if result.plan.reduced else "whole"
    side = result.plan.side
    off = [name for name in SWITCHES if not getattr(result.plan.speed, name)]
    without = f", without {', '.join(off)}" if off else ""
    return f"Stage C {result.plan.stage_c} and Stage B {result.plan.stage_b}, {depth}, {side}x{side}{without}"


def show(result: Bench) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(
        *columns(result), caption=f"{describe(result)}; peak memory {result.peak_bytes / 2**30:.1f} GiB"
    )
    for row in rows(result):
        shown.add_row(*row)
    Console().print(shown)
