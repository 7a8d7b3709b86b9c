"""`triptych compare`: several systems draw the same prompts; or two measured runs, picture by picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from triptych.errors import SettingsError

if TYPE_CHECKING:
    from triptych.evaluation.metrics import Estimate
    from triptych.evaluation.scores import Standing

DETECTOR = "detector"
HELP = """Let several systems draw the same prompts, or compare two measured runs.

Examples:

  triptych compare recipes/tiny/study.toml

  triptych compare study.toml --set count=100 --out runs/study

  triptych compare recipes/mini/study.toml --report docs/evaluation/mini

  triptych compare before/shapes_single.jsonl after/shapes_single.jsonl

A system is a triptych model with settings, a published competitor (preset sdxl, sdxl-turbo, playground-v2,
wuerstchen-v2 or stable-cascade), any pipeline of diffusers, or a folder of pictures. Everything goes into one
folder with a contact sheet, index.html; running again goes on where it stopped; several processes share the
work (torchrun --nproc-per-node 2 -m triptych.apps.cli.main compare study.toml). `triptych study FOLDER` asks
people. --report writes tables, plots of quality against seconds and small pictures into a folder of at most
3 MB. `judges` in the file (clipscore, pickscore, hps, imagereward, aesthetic, detector) has networks look at
every picture. With two files of rows, which evaluate --out writes, it says how much higher the second run
is on the same pictures.
"""


def compare(
    files: Annotated[list[Path], Argument(help="study.toml, or two files of rows (.jsonl).")],
    out: Annotated[Path | None, Option(help="Folder for everything, in place of the file's `out`.")] = None,
    change: Annotated[
        list[str] | None, Option("--set", help="Change a setting: key=value, as often as needed.")
    ] = None,
    report: Annotated[
        Path | None, Option(help="Also write a small report, to be kept beside code, into this folder.")
    ] = None,
    report_size: Annotated[float, Option(min=0.1, help="Largest size of the report in megabytes.")] = 3.0,
    weights: Annotated[
        Path | None, Option(help="Folder of the judges' weights, in place of the file's `judge_weights`.")
    ] = None,
    json_output: Annotated[bool, Option("--json", help="Print JSON alone.")] = False,
) -> None:
    if all(file.suffix == ".jsonl" for file in files) and len(files) == 2:
        compare_runs(files[0], files[1], json_output)
    elif len(files) == 1 and files[0].suffix != ".jsonl":
        folder, found = compare_systems(files[0], out, change or [], weights)
        if found:
            tell(folder, found, report, report_size, json_output)
    else:
        raise SettingsError("Give one study.toml, or two files of rows (.jsonl).")


def compare_systems(
    file: Path, out: Path | None, changes: list[str], weights: Path | None
) -> tuple[Path, list[Standing]]:
    """Draw and judge; the folder and how every system did (nothing while other processes still draw)."""
    from triptych.evaluation import compare as comparing
    from triptych.evaluation.judge_weights import find_judge
    from triptych.evaluation.scores import score_pictures, standings
    from triptych.evaluation.study_file import read_study

    study = read_study(file, changes)
    folder = out or Path(study.settings.out or f"runs/{file.stem}")
    place = weights or (Path(study.settings.judge_weights) if study.settings.judge_weights else None)
    for name in study.settings.judges:
        find_judge(name, place)  # what is missing is told before hours of drawing
    process = comparing.Process.of_environment()
    complete = comparing.compare(study, folder, process, say_progress(process.rank))
    if not complete:
        print(f"Process {process.rank} has made its pictures; others are not done yet.", file=sys.stderr)
        return folder, []
    names = [name for name in study.settings.judges if name != DETECTOR]
    scorers, detector = [], None
    if names:
        from triptych.evaluation.scorers import open_scorers

        scorers = open_scorers(names, place)
    if DETECTOR in study.settings.judges:
        from triptych.evaluation.detector import open_detector

        detector = open_detector(place)
    elif unseen := sum("include" in prompt.truth for prompt in study.prompts):
        print(f'{unseen} prompts ask for things that only judges = ["{DETECTOR}"] sees.', file=sys.stderr)
    return folder, standings(folder, score_pictures(folder, scorers, detector), names)


def tell(
    folder: Path, found: list[Standing], report: Path | None, megabytes: float, json_output: bool
) -> None:
    """Write the pages and print the table."""
    from triptych.evaluation.sheet import write_sheet

    sheet = write_sheet(folder, found)
    written = None
    if report is not None:
        from triptych.evaluation.digest import MEGABYTE, write_digest

        written = write_digest(folder, found, report, int(megabytes * MEGABYTE))
    if json_output:
        typer.echo(json.dumps(summary(folder, sheet, found), ensure_ascii=False, indent=2))
        return
    for line in table(found):
        typer.echo(line)
    typer.echo(str(sheet) if written is None else f"{sheet}\n{written}")
    typer.echo(f"Votes: triptych study {folder}")


def say_progress(rank: int) -> Callable[[str, int, int], None]:
    """A line on standard error about every tenth of a system's pictures."""
    told: dict[str, int] = {}

    def say(system: str, done: int, total: int) -> None:
        if done == total or done - told.get(system, 0) >= max(1, total // 10):
            told[system] = done
            process = f" (process {rank})" if rank else ""
            print(f"{system}: {done} of {total} pictures{process}", file=sys.stderr)

    return say


def table(found: list[Standing]) -> list[str]:
    """A line a system: seconds, and the measures with their intervals."""
    from triptych.evaluation.sheet import difference, mean, score_difference

    lines = []
    for one in found:
        lines.append(f"{one.name}: {one.pictures} pictures, {one.seconds:.3g} s a picture")
        for name, e in one.measures.items():
            told = f"{100 * e.value:5.1f} %   {100 * e.low:5.1f} to {100 * e.high:5.1f}   of {e.count}"
            lines.append(f"  {name:12s} {told}")
        if one.ahead is not None:
            lines.append(f"  ahead of {found[0].name} by {difference(one.ahead)} points (same pictures)")
        for name, e in one.scores.items():
            gap = score_difference(one.scores_ahead.get(name))
            lines.append(f"  {name:12s} {mean(e)}" + (f"   ahead of {found[0].name} by {gap}" if gap else ""))
    return lines


def summary(folder: Path, sheet: Path, found: list[Standing]) -> dict[str, Any]:
    from dataclasses import asdict

    return {"folder": str(folder), "sheet": str(sheet), "systems": [asdict(one) for one in found]}


def compare_runs(first: Path, second: Path, json_output: bool) -> None:
    """Paired differences of two files of rows."""
    from triptych.evaluation.runs import compare_rows, read_rows

    differences = compare_rows(read_rows(first), read_rows(second))
    if json_output:
        from dataclasses import asdict

        typer.echo(json.dumps({name: asdict(e) for name, e in differences.items()}, indent=2))
        return
    for name, estimate in differences.items():
        typer.echo(sentence(name, estimate, str(first), str(second)))


def sentence(name: str, estimate: Estimate, first: str, second: str) -> str:
    """ "right: B higher than A by 3.1 ± 1.2 ..." in words that hold for measures of any direction."""
    half = (estimate.high - estimate.low) / 2
    sure = "" if estimate.low > 0 or estimate.high < 0 else "; no difference is sure"
    more = "higher" if estimate.value >= 0 else "lower"
    return (
        f"{name}: {second} {more} than {first} by {abs(estimate.value):.4g} ± {half:.2g} "
        f"({estimate.count} pairs{sure})"
    )
