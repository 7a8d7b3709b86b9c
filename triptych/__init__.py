"""Run, edit with, teach and measure three-stage cascade models.

    from triptych import Cascade

    cascade = Cascade.load("mini")
    cascade.generate("a red apple", seed=7).images[0].save("apple.png")

Importing the package is light; torch is imported with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.errors import (
        CapacityError,
        CheckpointError,
        DataError,
        MissingExtra,
        RequestError,
        SettingsError,
        TrainingError,
        TriptychError,
    )
    from triptych.pipelines.cascade import Cascade, Event
    from triptych.pipelines.request import Request, Result

__version__ = "0.1.0"

_HOMES = {
    "Cascade": "triptych.pipelines.cascade",
    "Event": "triptych.pipelines.cascade",
    "Request": "triptych.pipelines.request",
    "Result": "triptych.pipelines.request",
    "CapacityError": "triptych.errors",
    "CheckpointError": "triptych.errors",
    "DataError": "triptych.errors",
    "MissingExtra": "triptych.errors",
    "RequestError": "triptych.errors",
    "SettingsError": "triptych.errors",
    "TrainingError": "triptych.errors",
    "TriptychError": "triptych.errors",
}

__all__ = [
    "CapacityError",
    "Cascade",
    "CheckpointError",
    "DataError",
    "Event",
    "MissingExtra",
    "Request",
    "RequestError",
    "Result",
    "SettingsError",
    "TrainingError",
    "TriptychError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'triptych' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
