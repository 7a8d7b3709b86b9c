"""`triptych doctor`: what this machine has, and what each model would take on it."""

from __future__ import annotations

import json
import platform
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

if TYPE_CHECKING:
    import torch

    from triptych.pipelines.forecast import Forecast

HELP = """Say what this machine can run: memory and time to expect for each model, and what is missing.

Examples:

  triptych doctor

  triptych doctor --model cascade-lite --size 768x768

  triptych doctor --max-memory 6GiB

  triptych doctor --json

Nothing is downloaded. Times are estimates from the number of operations and a short trial of this machine.
"""

EXTRAS = {  # extra -> the modules it brings and what they are for
    "train": (("peft", "datasets", "tensorboard"), "LoRA training, preparing data, TensorBoard"),
    "control": (("cv2", "onnxruntime"), "edges and faces"),
    "eval": (("scipy",), "judging pictures"),
    "compare": (("diffusers",), "comparing with other systems"),
    "serve": (("fastapi", "uvicorn"), "pages in the browser"),
}
WORDS = {
    "resident": "in memory",
    "narrow": "as stored",
    "int8": "int8",
    "streamed": "streamed",
}
STAGES = {"text_encoder": "text", "stage_c": "C", "stage_b": "B", "stage_a": "A"}
LEGEND = """Weights are in memory as they compute (from the mapped file where that is the same), as stored and
widened block by block, as int8 rows, or streamed from the file. Memory is private, over that of an empty
process."""


def doctor(
    model: Annotated[
        list[str] | None, Option(help="A model to ask about; repeatable. [mini, cascade-lite, cascade]")
    ] = None,
    size: Annotated[str | None, Option(help="Width x height in pixels. [the model's own]")] = None,
    device: Annotated[str, Option(help="auto, cuda, cuda:1, mps or cpu.")] = "auto",
    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    low_memory: Annotated[bool, Option("--low-memory", help="Plan with weights left on disk.")] = False,
    max_memory: Annotated[str | None, Option(help="Plan within this, such as 8GiB. [what is free]")] = None,
    int8: Annotated[bool, Option("--int8", help="Plan with weights rounded to 8 bits.")] = False,
    json_output: Annotated[bool, Option("--json", help="Print JSON alone.")] = False,
) -> None:
    from triptych.checkpoints.catalog import MODEL_NAMES
    from triptych.pipelines.capacity import room_on
    from triptych.pipelines.forecast import forecast, matmul_speed
    from triptych.pipelines.placement import choose_device, choose_dtype
    from triptych.pipelines.request import Request

    where = choose_device(device)
    precision = choose_dtype(dtype, where)
    asked = Request(prompt="", size=size, max_memory=max_memory)
    free, speed = room_on(where, asked.max_memory), matmul_speed(where, precision)
    rounded = True if int8 else None if max_memory else False
    names = model or ["mini", *sorted(set(MODEL_NAMES) - {"mini"}, reverse=True)]
    forecasts = [
        forecast(name, where, precision, free, speed, asked.size, low_memory, rounded) for name in names
    ]
    machine = describe_machine(where, precision, free, speed)
    if json_output:
        typer.echo(json.dumps({**machine, "models": [as_json(one) for one in forecasts]}, indent=1))
    else:
        show(machine, forecasts)


def describe_machine(where: torch.device, precision: torch.dtype, free: int, speed: float) -> dict[str, Any]:
    import torch

    from triptych import __version__

    return {
        "triptych": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(where),
        "graphics": torch.cuda.get_device_name(where) if where.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "precision": str(precision).removeprefix("torch."),
        "free_bytes": free,
        "operations_per_second": speed,
        "extras": {name: missing_of(modules) for name, (modules, _) in EXTRAS.items()},
    }


def missing_of(modules: tuple[str, ...]) -> list[str]:
    """Those that are not installed."""
    return [module for module in modules if find_spec(module) is None]


def as_json(one: Forecast) -> dict[str, Any]:
    return {
        "model": one.model,
        "size": list(one.size),
        "fits": one.plan is not None,
        "weights": None if one.plan is None else one.plan.weights,
        "tile": None if one.plan is None else one.plan.tile,
        "peak_bytes": one.peak,
        "file_bytes": one.stored,
        "operations": one.operations,
        "seconds": one.seconds,
    }


def show(machine: dict[str, Any], forecasts: list[Forecast]) -> None:
    from triptych.pipelines.capacity import gigabytes

    graphics = f" ({machine['graphics']})" if machine["graphics"] else ""
    typer.echo(
        f"triptych {machine['triptych']}, Python {machine['python']}, torch {machine['torch']}, "
        f"{machine['system']}"
    )
    typer.echo(
        f"Computes on {machine['device']}{graphics} in {machine['precision']}, {machine['threads']} threads, "
        f"{machine['operations_per_second'] / 1e9:.0f} GFLOPS in matrix products, "
        f"{gigabytes(machine['free_bytes'])} to use."
    )
    lines = [("model", "size", "files", "memory", "weights", "one picture")]
    for one in forecasts:
        width, height = one.size
        lines.append(
            (
                one.model,
                f"{width}x{height}",
                gigabytes(one.stored),
                gigabytes(one.peak),
                placed(one),
                duration(one.seconds),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    typer.echo("")
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    typer.echo(f"\n{LEGEND}\n")
    for name, (modules, purpose) in EXTRAS.items():
        missing = missing_of(modules)
        state = (
            "installed" if not missing else f"without {', '.join(missing)}: pip install 'triptych[{name}]'"
        )
        typer.echo(f"extra {name} ({purpose}): {state}")


def placed(one: Forecast) -> str:
    """The plan in words: where the weights of each stage live, and Stage A's tiles."""
    if one.plan is None:
        return "does not fit"
    stages: dict[str, list[str]] = {}
    for stage, weights in one.plan.weights.items():
        stages.setdefault(WORDS[weights], []).append(STAGES[stage])
    told = [f"{', '.join(names)} {words}" for words, names in stages.items()]
    if one.plan.tile is not None:
        told.append("A in tiles of {}x{}".format(*(4 * side for side in reversed(one.plan.tile))))
    return "; ".join(told) if len(told) > 1 else next(iter(stages))


def duration(seconds: float) -> str:
    """Seconds for people, rounded: it is an estimate."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"
