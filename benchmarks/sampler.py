"""How much memory this process takes at most, watched from a thread."""

from __future__ import annotations

import re
import threading
from pathlib import Path

SAMPLE_SECONDS = 0.004


class Sampler:
    """The most memory above that at the start: `private`, which no file backs, and `mapped`, pages of files.

    Bytes since the last `reset`, until `close`. Linux only.
    """

    def __init__(self) -> None:
        self._start = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.reset()
        self._thread.start()

    def reset(self) -> None:
        self.private = self.mapped = 0

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _now(self) -> tuple[int, ...]:
        said = dict(re.findall(r"(RssAnon|RssFile):\s+(\d+)", Path("/proc/self/status").read_text()))
        return tuple(1024 * int(said[name]) for name in ("RssAnon", "RssFile"))

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            private, mapped = (now - start for now, start in zip(self._now(), self._start, strict=True))
            self.private, self.mapped = max(self.private, private), max(self.mapped, mapped)
