"""Everything triptych raises on purpose.

    TriptychError
    ├── RequestError        a generation request cannot be met (also a ValueError)
    ├── SettingsError       a settings file, option or key is wrong (also a ValueError)
    ├── CheckpointError     a weight file is missing, damaged, foreign or does not fit
    ├── DataError           pictures or captions cannot be read
    ├── TrainingError       a run cannot start, or went wrong in a way training cannot repair
    ├── CapacityError       not enough memory or disk (also a MemoryError)
    └── MissingExtra        an optional dependency is needed (also an ImportError)

Every message is one or two sentences: what came, what was expected, what to do. The command line
prints that message alone and ends with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TriptychError(Exception):
    """The root of the tree; catching it catches every mistake that triptych can name."""


class RequestError(TriptychError, ValueError):
    """A generation request cannot be met: unknown name, unreachable size, value out of range."""


class SettingsError(TriptychError, ValueError):
    """A settings file, an option or a key of it is wrong."""


class CheckpointError(TriptychError):
    """A weight file is missing, damaged, in an unknown layout, or made for another network."""


class DataError(TriptychError):
    """Pictures, captions or shards cannot be read."""


class TrainingError(TriptychError):
    """A training run cannot start or continue."""


class CapacityError(TriptychError, MemoryError):
    """Memory or disk space is too small for what was asked."""


class MissingExtra(TriptychError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: install it with `pip install 'triptych[{extra}]'`.")


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase that helps after a misspelling: the nearest known name, then all of them.

    >>> nearest("ddpn", ["ddpm", "euler"])
    'did you mean "ddpm"? Known: ddpm, euler'
    """
    names = [str(k) for k in known]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listing = f"Known: {', '.join(names)}"
    return f'did you mean "{close[0]}"? {listing}' if close else listing
