"""Measured tables inside hand-written Markdown pages."""

from __future__ import annotations

from pathlib import Path

from triptych.errors import RequestError
from triptych.images import replace


def put_table(page: Path, name: str, table: str | None) -> None:
    """Replace what stands between the comments `<!-- name -->` and `<!-- end of name -->` of a page.

    None only looks whether they are there. Raises RequestError when the page cannot be read or lacks them.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    try:
        whole = page.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{page} cannot be read: {error.strerror}.") from None
    start, end = whole.find(first), whole.find(last)
    if start < 0 or end < start:
        raise RequestError(f"{page} has no place for the table; write {first.strip()} and {last.strip()}.")
    if table is not None:
        replace(page, f"{whole[:start]}{first}\n{table.strip()}\n\n{whole[end:]}".encode())
