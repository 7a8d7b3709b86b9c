"""The `triptych` command: one file per command beside this one, heavy imports inside the commands.

Whatever a user can get wrong ends in one line on standard error and exit status 2. Interrupting keeps what
is finished and ends with 130. TRIPTYCH_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from triptych.apps.cli import (
    bench,
    canny,
    compare,
    convert,
    decode,
    doctor,
    encode,
    evaluate,
    generate,
    identity,
    img2img,
    info,
    inpaint,
    lora,
    models,
    outpaint,
    prepare,
    reconstruct,
    study,
    train,
    upscale,
    vary,
)
from triptych.errors import TriptychError, nearest

USAGE_STATUS = 2
INTERRUPTED_STATUS = 130
INTERRUPTED = "Interrupted; what was finished is kept."

app = typer.Typer(
    name="triptych",
    help="Make pictures from text with a three-stage cascade, teach it, and measure it.\n\n"
    'Example: triptych generate "a red apple"',
    add_completion=False,
    rich_markup_mode=None,  # plain help: it starts in a third of the time and reads the same everywhere
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(value: bool) -> None:
    if value:
        from triptych import __version__

        typer.echo(f"triptych {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


app.command(help=generate.HELP)(generate.generate)
app.command(help=vary.HELP)(vary.vary)
app.command(help=img2img.HELP)(img2img.img2img)
app.command(help=inpaint.HELP)(inpaint.inpaint)
app.command(help=outpaint.HELP)(outpaint.outpaint)
app.command(help=canny.HELP)(canny.canny)
app.command(help=upscale.HELP)(upscale.upscale)
app.command(help=identity.HELP)(identity.identity)
app.command(help=encode.HELP)(encode.encode)
app.command(help=decode.HELP)(decode.decode)
app.command(help=reconstruct.HELP)(reconstruct.reconstruct)
app.command(help=prepare.HELP)(prepare.prepare)
app.command(help=train.HELP)(train.train)
app.command(help=evaluate.HELP)(evaluate.evaluate)
app.command(help=compare.HELP)(compare.compare)
app.command(help=study.HELP)(study.study)
app.command(help=bench.HELP)(bench.bench)
app.command(help=doctor.HELP)(doctor.doctor)
app.command(help=models.HELP)(models.models)
app.command(help=info.HELP)(info.info)
app.command(help=convert.HELP)(convert.convert)
app.add_typer(lora.app, name="lora")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; the entry point of the `triptych` script."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status. Mistakes become one line on standard error."""
    try:
        status = app(args=list(arguments), prog_name="triptych", standalone_mode=False)
        sys.stdout.flush()
        if status == INTERRUPTED_STATUS:  # typer has already turned Ctrl-C into a status
            return _end(INTERRUPTED, INTERRUPTED_STATUS)
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt:
        return _end(INTERRUPTED, INTERRUPTED_STATUS)
    except Exception as error:
        if os.environ.get("TRIPTYCH_DEBUG") == "1":
            raise
        return _status(error)


def _status(error: Exception) -> int:
    """What an exception means to the person at the terminal."""
    if isinstance(error, typer.Abort):
        return _end(INTERRUPTED, INTERRUPTED_STATUS)
    if isinstance(error, typer.Exit):
        return int(error.exit_code)
    if isinstance(error, TriptychError):
        return _end(str(error), USAGE_STATUS)
    if isinstance(error, BrokenPipeError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the reader has gone; nothing more can be said
        return 0
    if isinstance(error, OSError):
        return _end(describe_os_error(error), USAGE_STATUS)
    if isinstance(error, MemoryError):
        return _end("Memory ran out. Try --low-memory or a smaller --size.", USAGE_STATUS)
    if hasattr(error, "format_message"):  # typer's own usage errors; their classes have no public name
        return _end(_usage_message(error), USAGE_STATUS)
    return _end(
        f"This is a defect of triptych, not of your request: {type(error).__name__}: {error}. "
        "Run again with TRIPTYCH_DEBUG=1 to see where.",
        1,
    )


def _usage_message(error: Any) -> str:
    message = error.format_message().strip()
    context = getattr(error, "ctx", None)
    wrong = getattr(error, "option_name", None)
    if wrong is not None and context is not None:
        options = [name for parameter in context.command.params for name in parameter.opts if "--" in name]
        meant = difflib.get_close_matches(wrong, options, n=1, cutoff=0.5)
        advice = f"did you mean {meant[0]}?" if meant else f"`{context.command_path} --help` lists them."
        return f"There is no option {wrong}: {advice}"
    if message.startswith("No such command") and context is not None:
        typed = message.split("'")[1] if "'" in message else message
        return f'There is no command "{typed}": {nearest(typed, context.command.commands)}.'
    return message


def describe_os_error(error: OSError) -> str:
    """One sentence for a failed file operation: what could not be done, to which file, and why."""
    where = error.filename if error.filename is not None else "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {where} could not be written. Free some space or choose another --out."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where} may not be written or read: {error.strerror}. Choose another --out."
    return f"{where}: {error.strerror or error}."


def _end(message: str, status: int) -> int:
    print("Error: " + " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
