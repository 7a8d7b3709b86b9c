"""What the training loop needs to know about a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn

from triptych.checkpoints.files import PartInfo
from triptych.data.batches import BatchOrder, BatchPlan
from triptych.training.draws import Draws


class Stateful(Protocol):
    """Something small beside the networks that a run must save, such as a table of running losses."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass
class Losses:
    """The loss of one part of a batch. `total` () is minimised; the rest is for the log."""

    total: Tensor
    per_sample: Tensor | None = None  # (B,) unweighted, with `t`: the loss by noise level
    t: Tensor | None = None  # (B,) noise level in [0, 1]
    terms: dict[str, Tensor] = field(default_factory=dict)  # name -> scalar


@dataclass
class Task:
    """A recipe made ready to run.

    `networks` are trained and written, each to `PART.safetensors`; `helpers` are trained but not written
    (a discriminator). `players` name which of them each update moves, in turn. `load` reads the places of a
    batch and may run in a background thread; `loss` is called once per player and part of a batch.
    """

    networks: dict[str, nn.Module]
    order: BatchOrder
    load: Callable[[BatchPlan, Sequence[int]], Any]
    loss: Callable[[str, Any, Draws, int], Losses]
    info: Callable[[str, nn.Module], PartInfo]
    sample: Callable[[dict[str, nn.Module], Path], Image.Image | None]
    players: dict[str, list[str]]
    helpers: dict[str, nn.Module] = field(default_factory=dict)
    tables: dict[str, Stateful] = field(default_factory=dict)
    start_of: dict[str, int] = field(default_factory=dict)  # step at which a player joins
    skipped: Callable[[], list[str]] = list  # samples that could not be read, and why
    key_of: Callable[[int], str] = str  # what a sample is called, by its number
    trunks: list[nn.Module] = field(default_factory=list)  # networks in whose blocks memory can be saved
    # Writes one trained part (folder, part, averaged network, info) where that is no plain part file.
    write: Callable[[Path, str, nn.Module, PartInfo], None] | None = None

    @property
    def trained(self) -> dict[str, nn.Module]:
        """All networks that an optimiser moves."""
        return {**self.networks, **self.helpers}
