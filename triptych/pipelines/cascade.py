"""The cascade: prompt -> Conditioning -> latents_c -> latents_b -> pixels.

    cascade = Cascade.load("mini")
    result = cascade.generate("a red apple", count=4, seed=7)
    for event in cascade.stream("a red apple"):
        print(event.stage, event.step, event.steps)

Pictures go through the networks in batches; each has its own noise (see `noise`), and a picture's result
depends on the others of its batch by rounding only.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from triptych.checkpoints.catalog import ModelFiles, find_model
from triptych.conditioning.encode import Conditioning, cat, condition
from triptych.diffusion.denoiser import Branch, Denoiser, Guidance, Predict
from triptych.diffusion.prediction import add_noise
from triptych.diffusion.samplers import SAMPLERS, Step
from triptych.diffusion.schedule import Schedule
from triptych.errors import RequestError
from triptych.images import to_images
from triptych.models.stage_a import StageAConfig
from triptych.models.stage_b import StageBConfig
from triptych.models.stage_c import StageCConfig
from triptych.pipelines.capacity import (
    Need,
    Plan,
    decode_working,
    free_memory,
    measure,
    plan,
    refusal,
    text_working,
    trunk_working,
)
from triptych.pipelines.inputs import NOTHING, Inputs, combine, rows
from triptych.pipelines.noise import START, draw_batch
from triptych.pipelines.parts import Parts
from triptych.pipelines.placement import choose_device, choose_dtype
from triptych.pipelines.request import Picture, Request, Result, Sampling, picture_metadata
from triptych.sizes import PIXELS_PER_LATENT_C, latent_size_b, latent_size_c

PLANNED = ("text_encoder", "stage_c", "stage_b", "stage_a")
IDENTITY = ("model", "stage_a", "stage_b", "stage_c", "text_encoder", "device", "dtype", "low_memory")


@dataclass
class Event:
    """Something that happened: `step` of `steps` in `stage` is done, for the pictures named.

    Stages come in the order "text", "stage_c", "stage_b", "stage_a", once per batch from "stage_c" on;
    "done" is last. `images` and `metadata` belong to "stage_a", one finished picture each time.
    """

    stage: str
    step: int
    steps: int
    pictures: list[Picture] = field(default_factory=list)
    previews: list[Image.Image] | None = None  # of the pictures, while Stage C runs, when asked for
    image: Image.Image | None = None
    metadata: dict[str, Any] | None = None  # what the PNG of `image` stores
    result: Result | None = None


@dataclass
class Batch:
    """Pictures that share their network calls, and what is known of them so far."""

    pictures: list[Picture]
    cond: Conditioning
    uncond: Conditioning
    latents_c: Tensor | None = None
    latents_b: Tensor | None = None

    @property
    def seeds(self) -> list[int]:
        return [picture.seed for picture in self.pictures]


class Cascade:
    """A three-stage cascade. Weights are mapped from their files when a stage has its first turn."""

    def __init__(self, files: ModelFiles, request: Request) -> None:
        self._chosen = {name: getattr(request, name) for name in IDENTITY}
        self.files = files
        self.device = choose_device(request.device)
        self.dtype = choose_dtype(request.dtype, self.device)
        self.parts = Parts(files, self.device, self.dtype)

    @classmethod
    def load(
        cls,
        model: str | Path = "mini",
        *,
        stage_c: str | Path | None = None,
        stage_b: str | Path | None = None,
        stage_a: str | Path | None = None,
        text_encoder: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        low_memory: bool = False,
    ) -> Cascade:
        """A cascade by name ("mini", "cascade", "cascade-lite"), folder or hub name; any C goes with any B.

        No weight is read yet. Raises CheckpointError for an unknown model or a file that does not fit and
        RequestError for a device that is not there.
        """
        overrides = {"stage_c": stage_c, "stage_b": stage_b, "stage_a": stage_a, "text_encoder": text_encoder}
        chosen = {name: None if value is None else str(value) for name, value in overrides.items()}
        return cls.for_request(
            Request(prompt="", model=str(model), device=device, dtype=dtype, low_memory=low_memory, **chosen)
        )

    @classmethod
    def for_request(cls, request: Request) -> Cascade:
        """The cascade that `request` names."""
        files = find_model(
            request.model,
            stage_c=request.stage_c,
            stage_b=request.stage_b,
            stage_a=request.stage_a,
            text_encoder=request.text_encoder,
        )
        return cls(files, request)

    def resolve(self, request: Request) -> Request:
        """The request with every default filled in from this model's files, and checked against them."""
        own = {**self._chosen, "device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}
        for name in IDENTITY:
            asked, default = getattr(request, name), Request.model_fields[name].default
            if asked not in (default, own[name], self._chosen[name]):
                raise RequestError(
                    f'The request asks for {name} "{asked}", this cascade was loaded with "{own[name]}"; '
                    "load another one with Cascade.for_request."
                )
        stage_b, stage_c = self.parts.info("stage_b"), self.parts.info("stage_c")
        config = StageBConfig(**stage_b.config)
        min_side = config.patch * 4 * 2 ** (len(config.widths) - 1)
        return request.replaced(**own).resolve(stage_c.settings, stage_b.settings, min_side)

    def generate(
        self, prompt: str | Sequence[str] | Request, inputs: Inputs = NOTHING, **settings: Any
    ) -> Result:
        """Make the pictures of a request. `settings` are the fields of `Request`, `inputs` what steers beside
        the text.

        `prompt` may be a list, with `seeds=[...]` one for each picture. Raises RequestError before any
        weight is loaded, CapacityError when memory is too small, CheckpointError for weights that fail.
        """
        result = None
        for event in self.stream(prompt, inputs, **settings):
            result = event.result
        assert result is not None
        return result

    def stream(
        self, prompt: str | Sequence[str] | Request, inputs: Inputs = NOTHING, **settings: Any
    ) -> Generator[Event, None, None]:
        """As `generate`, but yields an Event for every step; the last one carries the result.

        The request is checked at once. Closing the generator cancels the rest.
        """
        if isinstance(prompt, Request):
            request = prompt.replaced(**settings) if settings else prompt
        else:
            request = Request(prompt=prompt if isinstance(prompt, str) else tuple(prompt), **settings)
        request = self.resolve(request)
        self._check_inputs(request, inputs)
        chosen = self._plan(request)
        self.parts.weights, self.parts.keep = chosen.weights, chosen.keep
        return self._run(request, inputs)

    def _run(self, request: Request, inputs: Inputs) -> Generator[Event, None, None]:
        self.parts.timings = {}
        pictures = request.pictures()
        yield Event("text", 0, 1, pictures)
        batches = self._read_prompts(request, pictures, inputs)
        yield Event("text", 1, 1, pictures)
        images: dict[int, Image.Image] = {}
        metadata: dict[int, dict[str, Any]] = {}
        for batch in batches:
            yield from self._stage_c(request, batch, inputs)
            yield from self._stage_b(request, batch)
            for event in self._stage_a(request, batch, inputs):
                if event.image is not None and event.metadata is not None:
                    index = batch.pictures[event.step - 1].index
                    images[index], metadata[index] = event.image, event.metadata
                yield event
        result = Result(
            images=[images[picture.index] for picture in pictures],
            latents_c=_in_order(batches, "latents_c"),
            latents_b=_in_order(batches, "latents_b"),
            request=request,
            timings=dict(self.parts.timings),
            metadata=[metadata[picture.index] for picture in pictures],
        )
        yield Event("done", 1, 1, pictures, result=result)

    def _check_inputs(self, request: Request, inputs: Inputs) -> None:
        """Raise RequestError unless the inputs belong to pictures of this number and size."""
        pictures, shape = len(request.prompts) * request.count, self._size_c(request)
        for latents in inputs.latents():
            if len(latents) not in (1, pictures) or tuple(latents.shape[2:]) != shape:
                raise RequestError(
                    f"Latents of shape {tuple(latents.shape)} were given for {pictures} pictures, whose "
                    f"latents are {shape[0]}x{shape[1]}."
                )
        if request.strength is not None and inputs.start is None:
            raise RequestError("A strength was given, but no picture to start from.")

    def _read_prompts(
        self, request: Request, pictures: Sequence[Picture], inputs: Inputs = NOTHING
    ) -> list[Batch]:
        """Encode every different prompt, and group pictures whose prompts are equally long into batches.

        No attention mask reaches Stage C, so padding a prompt to its neighbour's length would change its
        picture; each prompt is therefore read alone, beside its negative.
        """
        width = StageCConfig(**self.parts.info("stage_c").config).image_width
        read: dict[str, Conditioning] = {}
        with self.parts.turn("text_encoder") as encoder, self.parts.timed("text"):
            for prompt in request.prompts:
                if prompt not in read:
                    read[prompt] = condition(encoder, [prompt, request.negative], image_width=width)
                    self._check(read[prompt].text_hidden, "text_encoder")
        groups: dict[int, list[Picture]] = {}
        for picture in pictures:
            groups.setdefault(read[picture.prompt].text_hidden.shape[1], []).append(picture)
        size = request.batch or 1
        batches = []
        for group in groups.values():
            for start in range(0, len(group), size):
                together = group[start : start + size]
                told = [read[picture.prompt] for picture in together]
                cond, uncond = _rows(told, 0), _rows(told, 1)
                if inputs.image_embed is not None:  # guidance is measured against text and picture left out
                    embed = rows(inputs.image_embed.to(cond.image_embed), together)
                    cond = replace(cond, image_embed=embed)
                    uncond = replace(uncond, image_embed=torch.zeros_like(embed))
                batches.append(Batch(together, cond, uncond))
        return batches

    def _stage_c(self, request: Request, batch: Batch, inputs: Inputs) -> Iterator[Event]:
        """Text and inputs -> latents_c."""
        if inputs.latents_c is not None or (inputs.start is not None and request.strength == 0):
            given = inputs.start if inputs.latents_c is None else inputs.latents_c
            assert given is not None
            batch.latents_c = rows(given.float(), batch.pictures).contiguous()
            yield Event("stage_c", 1, 1, batch.pictures)
            return
        cond, uncond = (part.to(self.device, self.dtype) for part in (batch.cond, batch.uncond))
        both = cat(cond, uncond)
        acting: list[Tensor | None] = []
        with self.parts.turn("stage_c") as network:
            shape = (network.config.channels, *self._size_c(request))

            def predict(x: Tensor, t: Tensor, branches: Sequence[Branch]) -> Sequence[Tensor]:
                told = both if len(branches) == 2 else cond
                x, t = _repeated(x.to(self.dtype), t, len(branches))
                residuals = [
                    None if residual is None else torch.cat([residual] * len(branches)).to(x)
                    for residual in acting
                ]
                with torch.no_grad():
                    answer = network(
                        x,
                        t,
                        told.text_hidden,
                        told.text_pooled,
                        told.image_embed,
                        residuals=residuals or None,
                    )
                return answer.float().chunk(len(branches))

            start = (
                None if inputs.start is None else rows(inputs.start.float().to(self.device), batch.pictures)
            )
            how = request.sampling("stage_c")
            acting[:] = combine(inputs.controls, 0, how.steps, batch.pictures)
            for step in self._sample("stage_c", predict, shape, batch, how, start):
                batch.latents_c = step.x0
                acting[:] = combine(inputs.controls, step.index + 1, step.steps, batch.pictures)
                previews = self._preview(step.x0) if request.preview else None
                yield Event("stage_c", step.index + 1, step.steps, batch.pictures, previews)

    def _stage_b(self, request: Request, batch: Batch) -> Iterator[Event]:
        """latents_c and pooled text -> latents_b."""
        assert batch.latents_c is not None
        width, height = _size(request)
        semantic = batch.latents_c.to(self.device, self.dtype)
        both = torch.cat([semantic, torch.zeros_like(semantic)])
        pooled = cat(batch.cond, batch.uncond).text_pooled.to(self.device, self.dtype)
        with self.parts.turn("stage_b") as network:
            shape = (network.config.channels, *latent_size_b(height, width))

            def predict(x: Tensor, t: Tensor, branches: Sequence[Branch]) -> Sequence[Tensor]:
                rows = len(branches) * len(batch.pictures)
                x, t = _repeated(x.to(self.dtype), t, len(branches))
                with torch.no_grad():
                    answer = network(x, t, both[:rows], pooled[:rows])
                return answer.float().chunk(len(branches))

            for step in self._sample("stage_b", predict, shape, batch, request.sampling("stage_b")):
                batch.latents_b = step.x0
                yield Event("stage_b", step.index + 1, step.steps, batch.pictures)
        batch.latents_c = batch.latents_c.cpu()

    def _stage_a(self, request: Request, batch: Batch, inputs: Inputs) -> Iterator[Event]:
        """latents_b -> pixels, in float32 and one picture at a time: it is the largest map of all."""
        assert batch.latents_b is not None
        with self.parts.turn("stage_a") as network:
            for row in range(len(batch.pictures)):
                with self.parts.timed("stage_a"), torch.no_grad():
                    pixels = network.decode(batch.latents_b[row : row + 1].float())
                    self._check(pixels, "stage_a")
                    (image,) = to_images(pixels)
                    if inputs.finish is not None:
                        image = inputs.finish(image, batch.pictures[row])
                stored = picture_metadata(request, batch.pictures, row)
                yield Event("stage_a", row + 1, len(batch.pictures), batch.pictures, None, image, stored)
        batch.latents_b = batch.latents_b.cpu()

    def _sample(
        self,
        stage: str,
        predict: Predict,
        shape: tuple[int, ...],
        batch: Batch,
        how: Sampling,
        start: Tensor | None = None,
    ) -> Iterator[Step]:
        """Run the sampler of one stage from noise, or from `start` noised to the level `how.strength`.

        The state is float32 whatever the network computes in.
        """
        settings = self.parts.info(stage).settings
        schedule = Schedule(settings["shift"])
        guidance = None if how.guidance == 1 else Guidance(how.guidance, rescale=settings["rescale"])
        denoise = Denoiser(predict, schedule, settings["prediction"], guidance)

        def noise(step: int) -> Tensor:
            return draw_batch(batch.seeds, stage, step, shape).to(self.device)

        x = noise(START)
        steps = max(1, round(how.steps * how.strength))
        times, logsnrs = schedule.grid(steps, how.strength)
        if start is not None and how.strength < 1:  # at 1 the little that is left of `start` is left out
            x = add_noise(start, x, logsnrs[0].to(self.device))
        run = SAMPLERS[how.sampler](denoise, x, times, logsnrs, noise)
        while True:
            with self.parts.timed(stage):
                step = next(run, None)
            if step is None:
                return
            self._check(step.x0, stage)
            yield step

    def _check(self, numbers: Tensor, part: str) -> None:
        """Raise CheckpointError when a network answered NaN or infinity: no such picture is ever written."""
        if not bool(torch.isfinite(numbers).all()):
            raise self.parts.blame(part)

    def _preview(self, latents_c: Tensor) -> list[Image.Image]:
        with self.parts.turn("previewer") as network, torch.no_grad():
            return to_images(network(latents_c.float()))

    def _plan(self, request: Request) -> Plan:
        """Where weights live for this request. Raises CapacityError naming what would fit."""
        item, free = self.dtype.itemsize, free_memory(self.device)
        needs = self._needs(request)
        chosen = plan(needs, item, free, request.low_memory)
        if chosen is not None:
            return chosen
        raise refusal(needs, item, free, str(self.device), self._advice(request, item, free))

    def _advice(self, request: Request, item: int, free: int) -> str:
        width, height = _size(request)
        smaller = [request.replaced(batch=1)]
        while min(width, height) >= 256:
            width, height = width // 2 // 128 * 128, height // 2 // 128 * 128
            smaller.append(request.replaced(batch=1, size=(max(width, 128), max(height, 128))))
        for attempt in smaller:
            if plan(self._needs(attempt), item, free, request.low_memory) is not None:
                size = "x".join(map(str, _size(attempt)))
                return f"It would fit with --batch 1 --size {size}."
        return "No size of this model fits; a smaller model (--stage-c 1b --stage-b 700m, or mini) may."

    def _needs(self, request: Request) -> list[Need]:
        item, pictures = self.dtype.itemsize, min(request.batch or 1, len(request.prompts) * request.count)
        width, height = _size(request)
        stage_c = StageCConfig(**self.parts.info("stage_c").config)
        stage_b = StageBConfig(**self.parts.info("stage_b").config)
        stage_a = StageAConfig(**self.parts.info("stage_a").config)
        shapes = {part: self.parts.shapes(part) for part in PLANNED}
        working = {
            "text_encoder": text_working(shapes["text_encoder"], item),
            "stage_c": trunk_working(stage_c, *self._size_c(request), pictures, item),
            "stage_b": trunk_working(stage_b, *latent_size_b(height, width), pictures, item),
            "stage_a": decode_working(stage_a, height, width),
        }
        return [measure(part, shapes[part], self.parts.header(part), working[part]) for part in working]

    def _size_c(self, request: Request) -> tuple[int, int]:
        """Rows and columns of latents_c."""
        width, height = _size(request)
        settings = self.parts.info("stage_c").settings
        return latent_size_c(height, width, settings.get("pixels_per_latent", PIXELS_PER_LATENT_C))


def _size(request: Request) -> tuple[int, int]:
    assert request.size is not None  # the request is resolved
    return request.size


def _rows(read: Sequence[Conditioning], row: int) -> Conditioning:
    """Row `row` of each, stacked."""
    return Conditioning(
        torch.stack([one.text_hidden[row] for one in read]),
        torch.stack([one.text_pooled[row] for one in read]),
        torch.stack([one.image_embed[row] for one in read]),
    )


def _repeated(x: Tensor, t: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    return torch.cat([x] * branches), torch.cat([t] * branches)


def _in_order(batches: Sequence[Batch], name: str) -> Tensor:
    """Latents of all pictures, in the order of the request."""
    rows: dict[int, Tensor] = {}
    for batch in batches:
        latents = getattr(batch, name)
        rows.update((picture.index, latents[row]) for row, picture in enumerate(batch.pictures))
    return torch.stack([rows[index] for index in sorted(rows)])
