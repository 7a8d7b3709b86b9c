"""`triptych study`: people vote on the pictures of a comparison, and the votes become a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from triptych.errors import SettingsError

HELP = """Let people vote between the pictures of `triptych compare`, blindly, and report who wins.

Examples:

  triptych study runs/tiny/study

  triptych study runs/tiny/study --plan

  triptych study runs/tiny/study --report

  triptych study runs/tiny/study --sheet crowd

Serves a page where voters see two pictures at a time on random sides and press 1, 2, 0 (equal) or S (skip).
Alignment with the prompt and looks are asked apart, some ballots are attention checks, each pair is shown to
at least three voters. Votes are kept in FOLDER/study; --report can be asked for at any time. --sheet writes
the same ballots as CSV with a folder of pictures, for voting elsewhere; --import reads the answers back.
"""


def study(
    folder: Annotated[Path, Argument(help="A folder that `triptych compare` made.")],
    plan: Annotated[bool, Option("--plan", help="Say what the votes can tell, and stop.")] = False,
    report: Annotated[
        bool, Option("--report", help="Write the report of the votes so far, and stop.")
    ] = False,
    sheet: Annotated[Path | None, Option(help="Write ballots as CSV into this folder, and stop.")] = None,
    filled: Annotated[
        Path | None, Option("--import", help="Take the answers of a filled-in sheet, and stop.")
    ] = None,
    reference: Annotated[
        str | None, Option(help="The system to compare the others with. [the first]")
    ] = None,
    all_pairs: Annotated[bool, Option("--all-pairs", help="Compare every two systems.")] = False,
    raters: Annotated[int | None, Option(min=1, help="Voters who see each pair. [3]")] = None,
    session: Annotated[int | None, Option(min=2, help="Votes asked of a voter at a time. [40]")] = None,
    host: Annotated[str, Option(help="Address to serve on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to serve on.")] = 8765,
    json_output: Annotated[bool, Option("--json", help="With --report: print JSON alone.")] = False,
) -> None:
    if sum((plan, report, sheet is not None, filled is not None)) > 1:
        raise SettingsError("Give one of --plan, --report, --sheet and --import at a time.")
    from triptych.evaluation.ballots import open_design

    wanted = {"reference": reference, "all_pairs": all_pairs or None, "raters": raters, "session": session}
    design = open_design(folder, **wanted)
    if report:
        return tell(folder, json_output)
    if plan:
        from triptych.evaluation.study import plan as sentences

        for sentence in sentences(folder, design):
            typer.echo(sentence)
        return None
    from triptych.evaluation.ballots import Poll

    poll = Poll(folder, design)
    try:
        if sheet is not None:
            from triptych.evaluation.crowd import write_sheet

            typer.echo(f"{sheet / 'sheet.csv'}: {write_sheet(poll, sheet)} ballots")
        elif filled is not None:
            from triptych.evaluation.crowd import read_sheet

            taken = read_sheet(poll, filled)
            typer.echo(
                f"{taken.votes} votes taken, {taken.unanswered} rows without an answer, "
                f"{taken.known} known already. Report: triptych study {folder} --report"
            )
        else:
            from triptych.apps.study.server import serve

            done, all_votes = poll.progress()
            typer.echo(f"http://{host}:{port}  {done} of {all_votes} votes are there; Ctrl-C ends it.")
            serve(poll, host, port)
    finally:
        poll.close()
    return None


def tell(folder: Path, json_output: bool) -> None:
    """Write the report and print the results."""
    from triptych.evaluation.report import as_json, lines, write_report
    from triptych.evaluation.study import outcome

    found = outcome(folder)
    path = write_report(found, folder)
    if json_output:
        typer.echo(json.dumps({"report": str(path), **as_json(found)}, ensure_ascii=False, indent=2))
        return
    for line in lines(found):
        typer.echo(line)
    typer.echo(str(path))
