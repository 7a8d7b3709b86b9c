"""Files of JSON lines that one process appends to: what was written stays, whatever ends the process.

A line is written with one call and forced to the disk. A line cut off in the middle, which only a crash of
the machine leaves, is passed over when reading and closed before the next one is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from triptych.errors import DataError


class LineWriter:
    """Appends objects to a file; threads may share one. Only one process may hold a file (DataError)."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = threading.Lock()
        self._file = open(path, "a+b")  # noqa: SIM115  closed by close()
        try:
            _hold(self._file.fileno())
        except OSError:
            self._file.close()
            raise DataError(f"{path} is being written by another process; end that one first.") from None
        if self._cut_off():
            self._write(b"\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one object; it is on the disk when this returns."""
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"
        with self._lock:
            self._write(line)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _cut_off(self) -> bool:
        if self._file.seek(0, os.SEEK_END) == 0:
            return False
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) != b"\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, none if it is not there; lines that are no objects are passed over."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict):
                        yield row
    except FileNotFoundError:
        return


def _hold(descriptor: int) -> None:
    """Keep other processes from writing; where the system has no such locks, nothing is held."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
