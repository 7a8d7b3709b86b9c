"""The networks of one cascade: loaded when their turn comes, placed, and given back after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triptych.checkpoints.catalog import ModelFiles
from triptych.checkpoints.files import check_finite, read_tensors
from triptych.checkpoints.headers import PartInfo
from triptych.checkpoints.load import load_part, read_part
from triptych.conditioning.encode import TextEncoder, load_minilm
from triptych.errors import CapacityError, CheckpointError
from triptych.pipelines.placement import Placement, Weights, place

FLOAT32_PARTS = ("stage_a", "previewer")  # they make pixels: bfloat16 would show as banding


class Parts:
    """What is loaded, and how to load the rest. `weights` says where each part's weights live."""

    def __init__(self, files: ModelFiles, device: torch.device, dtype: torch.dtype) -> None:
        self.files = files
        self.device = device
        self.dtype = dtype
        self.weights: dict[str, Weights] = {}
        self.keep = True
        self.load_seconds = 0.0
        self._loaded: dict[str, Any] = {}
        self._described: dict[str, PartInfo] = {}

    def path(self, part: str) -> Path:
        """Where a part's weights are. Raises CheckpointError when this model has none."""
        path = getattr(self.files, part)
        if path is None:
            raise CheckpointError(f"The model {self.files.name} has no {part}.")
        return Path(path)

    def info(self, part: str) -> PartInfo:
        """Config and settings of a part, from the header of its file; weights are mapped and not read."""
        if part not in self._described:
            self._described[part] = read_part(self.path(part), part).info
        return self._described[part]

    @contextmanager
    def turn(self, part: str) -> Iterator[Any]:
        """The network of `part` (a TextEncoder for "text_encoder"), released after unless parts are kept."""
        with memory_errors(part):
            if part not in self._loaded:
                start = time.perf_counter()
                self._loaded[part] = self._load(part)
                self.load_seconds += time.perf_counter() - start
            try:
                yield self._loaded[part]
            finally:
                if not self.keep:
                    self.release(part)

    def release(self, *parts: str) -> None:
        """Let go of the named parts, or of all of them."""
        for part in parts or tuple(self._loaded):
            self._loaded.pop(part, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def _load(self, part: str) -> nn.Module | TextEncoder:
        dtype = torch.float32 if part in FLOAT32_PARTS else self.dtype
        placement = Placement(self.device, dtype, self.weights.get(part, "resident"))
        if part == "text_encoder":
            encoder = load_minilm(self.path(part), self.files.tokenizer)
            place(encoder.tower, placement)
            return encoder
        network, _ = load_part(self.path(part), part, finite=False)
        return place(network, placement)

    def blame(self, part: str) -> CheckpointError:
        """The error for a network that answered NaN or infinity: the file's fault, or the precision's."""
        check_finite(read_tensors(self.path(part)), self.path(part))
        return CheckpointError(
            f"{part} of {self.files.name} computed numbers that are not finite in {self.dtype}, although its "
            "weights are; try --dtype float32."
        )


@contextmanager
def memory_errors(part: str) -> Iterator[None]:
    """Turn an allocator's failure into a CapacityError that names the stage."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, CapacityError):
            raise
        text = str(error).lower()
        starved = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if starved or "can't allocate memory" in text or "not enough memory" in text or "cannot allocate" in text:
            raise CapacityError(
                f"Memory ran out in {part}. Try --low-memory, a smaller --size, or --batch 1."
            ) from error
        raise
