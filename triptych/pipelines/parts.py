"""The networks of one cascade: loaded when their turn comes, placed, and given back after."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from triptych.checkpoints.catalog import ModelFiles
from triptych.checkpoints.files import check_finite, read_tensors
from triptych.checkpoints.fit import identify
from triptych.checkpoints.headers import Header, PartInfo, read_header
from triptych.checkpoints.load import describe_part, layout_shapes, load_part
from triptych.checkpoints.precision import repair_float16
from triptych.checkpoints.sniff import PART_NAMES
from triptych.conditioning.encode import ImageEncoder, TextEncoder, load_image_encoder, load_text_encoder
from triptych.conditioning.towers import file_names, weight_file
from triptych.errors import CapacityError, CheckpointError
from triptych.models.lora import merge, merged, set_weight
from triptych.pipelines.adapters import ADAPTED, Adapters, Wardrobe, split_scale, stack
from triptych.pipelines.capacity import Plan
from triptych.pipelines.heap import return_memory
from triptych.pipelines.placement import Placement, Weights, place
from triptych.pipelines.speed import Speed
from triptych.pipelines.tiles import Tile
from triptych.sizes import PIXELS_PER_LATENT_C, latent_size_c

ALLOCATORS_SAY = ("can't allocate memory", "cannot allocate memory", "not enough memory")
# Stage A and the previewer make pixels, where bfloat16 would show as banding; encoders run once a request.
FLOAT32_PARTS = ("stage_a", "previewer", "semantic", "image_encoder")

TOKEN_TABLES = ("tokens.weight", "token_embedding.weight")  # of our small tower, and of CLIP's


class Parts:
    """What is loaded, and how to load the rest. `weights` says where each part's weights live."""

    def __init__(self, files: ModelFiles, device: torch.device, dtype: torch.dtype) -> None:
        self.files = files
        self.device = device
        self.dtype = dtype
        self.weights: dict[str, Weights] = {}
        self.keep = True
        self.tile: Tile | None = None  # of Stage A's decode; None decodes pictures whole
        self.speed = Speed()
        self._held: set[str] = set()  # parts that stay loaded between their turns for now
        self.timings: dict[str, float] = {}  # seconds by stage; loading is counted here
        self._loaded: dict[str, Any] = {}
        self._described: dict[str, PartInfo] = {}
        self._checked: set[str] = set()  # parts whose numbers were all looked at once
        self._wardrobe = Wardrobe()
        self._chosen = Adapters()  # everything asked for
        self._worn = Adapters()  # what acts on the prompt whose turn it is
        self._untouched: dict[str, dict[str, Tensor]] = {}  # weights as the file maps them, by part and name
        self._resident: set[str] = set()  # parts whose weights can be exchanged one by one

    def path(self, part: str) -> Path:
        """Where a part's weights are. Raises CheckpointError when this model has none."""
        path = getattr(self.files, part)
        if path is None:
            missing = PART_NAMES.get(part, part).removeprefix("the ").removeprefix("an ").removeprefix("a ")
            raise CheckpointError(f"The model {self.files.name} has no {missing}, which this needs.")
        return Path(path)

    def info(self, part: str) -> PartInfo:
        """Config and settings of a part, from the header of its file; no weight is read."""
        if part not in self._described:
            self._described[part] = describe_part(self.path(part), part)
        return self._described[part]

    def size_c(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of this model's latents_c for a picture of `height` x `width` pixels."""
        settings = self.info("stage_c").settings
        return latent_size_c(height, width, settings.get("pixels_per_latent", PIXELS_PER_LATENT_C))

    def header(self, part: str) -> Header:
        """The header of a part's weights; those of a tower may be in a folder."""
        return read_header(weight_file(self.path(part), part))

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a part's tensors, from its header; of a tower, of everything in its file."""
        header, sniffed = identify(self.header(part).path)
        return dict(header.shapes) if part == "text_encoder" else layout_shapes(header, sniffed, part)

    def arrange(self, chosen: Plan) -> None:
        """Follow a plan from now on. What is loaded and should live elsewhere is let go of."""
        for part in tuple(self._loaded):
            if chosen.weights.get(part, "resident") != self.weights.get(part, "resident"):
                self.release(part)
        self.weights, self.keep, self.tile = chosen.weights, chosen.keep, chosen.tile
        self.speed = replace(self.speed, kept_bytes=chosen.kept_bytes)

    def wear(self, loras: Sequence[str]) -> None:
        """From now on wear these LoRA files ("FILE" or "FILE:SCALE"), in place of those worn before.

        Loaded weights are computed anew from the untouched ones, which stay mapped; where the file's numbers
        are rescaled or streamed, the part is mapped again at its next turn. Changes that wait for their token
        are put on by `dress`. Raises CheckpointError for files that do not fit this model.
        """
        wanted = Adapters()
        if loras:
            shapes = {part: self.shapes(part) for part in ADAPTED}
            chosen = [split_scale(text) for text in loras]
            read = [(path, scale, self._wardrobe.get(path, shapes)) for path, scale in chosen]
            wanted = stack(read, token_width(shapes["text_encoder"]))
        self._chosen = wanted
        self.dress("")
        if "text_encoder" in self._loaded:
            self._loaded["text_encoder"].learn(wanted.tokens)

    def dress(self, prompt: str) -> None:
        """Wear what acts on `prompt`: all of it, but for LoRAs that act with their token only."""
        wanted = self._chosen.for_prompt(prompt)
        before, self._worn = self._worn, wanted
        for part in ADAPTED:
            if part in self._loaded and not before.alike(wanted, part):
                self._change(part, before.targets(part) | wanted.targets(part))

    def opened(self, prompt: str) -> frozenset[str]:
        """Which tokens of such LoRAs a prompt has."""
        return self._chosen.opened(prompt)

    def _change(self, part: str, names: set[str]) -> None:
        """Bring the weights `names` of a loaded part up to date with what is worn."""
        if part not in self._resident:
            self.release(part)
            return
        changes = self._worn.changes.get(part, [])
        for name in names:
            weight = self._untouched[part][name]
            own = [(change, scale) for change, scale in changes if f"{change.target}.weight" == name]
            new = merged(weight, own) if own else weight
            set_weight(self._loaded[part], name, new.to(self.device, self.dtype))

    @contextmanager
    def turn(self, part: str) -> Iterator[Any]:
        """The network of `part`, released after unless parts are kept.

        It is a TextEncoder for "text_encoder" and an ImageEncoder for "image_encoder".
        """
        with memory_errors(part):
            if part not in self._loaded:
                with self.timed("load"):
                    return_memory(self.device)  # of the part before, which its user has let go of by now
                    self._loaded[part] = self._load(part)
            try:
                yield self._loaded[part]
            finally:
                if not self.keep and part not in self._held:
                    self.release(part)

    @contextmanager
    def held(self, *parts: str) -> Iterator[None]:
        """The named parts, once loaded, stay so until the end, whatever `keep` says."""
        before, self._held = self._held, self._held | {*parts}
        try:
            yield
        finally:
            self._held = before
            for part in () if self.keep else {*parts} - before:
                self.release(part)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent inside to `timings[stage]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - start

    def release(self, *parts: str) -> None:
        """Let go of the named parts, or of all of them."""
        for part in parts or tuple(self._loaded):
            self._loaded.pop(part, None)
            self._untouched.pop(part, None)
            self._resident.discard(part)
        return_memory(self.device)

    def _load(self, part: str) -> nn.Module | TextEncoder | ImageEncoder:
        """Build and place a part; its first time, refuse weights that are NaN or infinite.

        All of its numbers are read then anyway, so looking costs little, and nothing has run on them yet.
        """
        dtype = torch.float32 if part in FLOAT32_PARTS else self.dtype
        placement = Placement(self.device, dtype, self.weights.get(part, "resident"))
        first = part not in self._checked
        if part in ("text_encoder", "image_encoder"):
            encoder: TextEncoder | ImageEncoder
            if part == "text_encoder":
                encoder = load_text_encoder(self.path(part), self.files.tokenizer)
            else:
                encoder = load_image_encoder(self.path(part))
            tower = cast(nn.Module, encoder.tower)
            if first:
                check_finite(file_names(tower), weight_file(self.path(part), part))
            if isinstance(encoder, TextEncoder):
                merge(getattr(tower, "network", tower), self._worn.changes.get(part, []), dtype)
            place(tower, placement)
            if isinstance(encoder, TextEncoder):
                encoder.learn(self._worn.tokens)
            self._checked.add(part)
            return encoder
        network, _ = load_part(self.path(part), part, finite=first)
        self._checked.add(part)
        if part in ADAPTED:
            self._untouched[part] = {name: weight.detach() for name, weight in network.named_parameters()}
            if placement.weights == "resident" and dtype != torch.float16:
                self._resident.add(part)
            merge(network, self._worn.changes.get(part, []), dtype)
        if dtype == torch.float16:
            repair_float16(
                network
            )  # after merging and before placing: it reads the weights as they are stored
        place(network, placement)
        if placement.weights == "int8":
            return_memory(self.device)  # of what was read to be rounded
        return network

    def blame(self, part: str) -> CheckpointError:
        """The error for a network that answered NaN or infinity: the file's fault, or the precision's."""
        header = self.header(part)
        check_finite(read_tensors(header.path, header=header), header.path)
        return CheckpointError(
            f"{part} of {self.files.name} computed numbers that are not finite in {self.dtype}, although its "
            "weights are; try --dtype float32."
        )


def token_width(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers the token vectors of a text tower have, from the shapes in its file."""
    tables = [shape for name, shape in shapes.items() if name.endswith(TOKEN_TABLES) and len(shape) == 2]
    return tables[0][1] if tables else 0


@contextmanager
def memory_errors(part: str) -> Iterator[None]:
    """Turn an allocator's failure into a CapacityError that names the stage."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, CapacityError):
            raise
        said = str(error).lower()
        starved = isinstance(error, MemoryError | torch.OutOfMemoryError)
        starved = starved or any(phrase in said for phrase in ALLOCATORS_SAY)
        if starved:
            raise CapacityError(
                f"Memory ran out in {part}. Try --low-memory, a smaller --size, or --batch 1."
            ) from error
        raise
