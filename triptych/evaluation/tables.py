"""Rows of results as files: JSON lines always, and Parquet where pyarrow is installed.

pyarrow comes with `datasets` (the extra `train`); nothing here needs it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from triptych.images import replace

Row = dict[str, Any]


def write_rows(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Write STEM.jsonl, a row a line, and with pyarrow STEM.parquet with the same columns; their paths.

    Columns are those of any row, in the order of their first appearance; what a row lacks is null.
    """
    lines = stem.with_name(stem.name + ".jsonl")
    replace(lines, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    if not rows or find_spec("pyarrow") is None:
        return [lines]
    import pyarrow
    from pyarrow import parquet

    names = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.table({name: _column([row.get(name) for row in rows]) for name in names})
    path = stem.with_name(stem.name + ".parquet")
    unfinished = stem.with_name(f".{stem.name}.{os.getpid()}.parquet.part")
    try:
        parquet.write_table(table, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return [lines, path]


def _column(values: list[Any]) -> Any:
    """A column of one type; values of several kinds become JSON text."""
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
        return pyarrow.array([None if v is None else json.dumps(v, ensure_ascii=False) for v in values])
