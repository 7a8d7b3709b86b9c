"""Ending a run when someone asks: SIGTERM and Ctrl-C let the update finish, save, and stop.

Launchers and terminals may send both signals at once, so a second one counts only after a while; then it ends
the process where it is, which loses what came after the last checkpoint and nothing else.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HASTE = 3.0  # seconds after which a second request means "at once"


class Stop:
    """Whether a run was asked to end.

    The loop sets `patient` while it can save, and `step` when it ended before its last one.
    """

    def __init__(self) -> None:
        self.asked = False
        self.patient = False
        self.step: int | None = None
        self._since = 0.0

    def ask(self) -> None:
        """Ask for an end; raises KeyboardInterrupt where nothing would be lost by it, or asked again."""
        if not self.patient or (self.asked and time.monotonic() - self._since > HASTE):
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._since = True, time.monotonic()


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """A `Stop` that SIGTERM and Ctrl-C ask; the former handlers come back afterwards."""
    stop = Stop()

    def handle(number: int, frame: Any) -> None:
        stop.ask()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
