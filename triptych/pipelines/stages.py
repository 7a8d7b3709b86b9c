"""One request on its way: text and pictures -> Conditioning -> latents_c -> latents_b -> pixels.

Pictures go through the networks in batches; each has its own noise (see `noise`), and a picture's result
depends on the others of its batch by rounding only.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from triptych.conditioning.encode import Conditioning, cat, condition
from triptych.diffusion.denoiser import Denoised, Denoiser, Guidance, hold
from triptych.diffusion.prediction import add_noise
from triptych.diffusion.samplers import SAMPLERS, Step
from triptych.diffusion.schedule import Schedule
from triptych.images import to_images
from triptych.models.scratch import Scratch, spread
from triptych.models.stage_c import StageCConfig
from triptych.pipelines.control import upscaling, with_controls
from triptych.pipelines.inputs import Control, Inputs, Known, combine, rows
from triptych.pipelines.noise import START, draw_batch
from triptych.pipelines.parts import Parts
from triptych.pipelines.pictures import Brought, with_pictures
from triptych.pipelines.request import Picture, Request, Result, Sampling, picture_metadata
from triptych.pipelines.speed import Answer, Branches
from triptych.pipelines.tiles import decode_in_tiles
from triptych.sizes import latent_size_b


@dataclass
class Event:
    """Something that happened: `step` of `steps` in `stage` is done, for the pictures named.

    Stages come in the order "text", "stage_c", "stage_b", "stage_a", from "stage_c" on once per batch; where
    memory is short, "stage_c" of all batches comes before "stage_b" of the first. "done" is last. `images`
    and `metadata` belong to "stage_a", one finished picture each time; so it is for drafts, too.
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


class Run:
    """A resolved request, carried out on the parts of a model.

    What it follows comes as tensors (`inputs`) and as pictures that are still to be encoded (`brought`).
    """

    def __init__(
        self, parts: Parts, request: Request, inputs: Inputs, brought: Sequence[Brought] = ()
    ) -> None:
        self.parts = parts
        self.request = request
        self.inputs = inputs
        self.brought = brought

    def events(self) -> Generator[Event, None, None]:
        """Every step of every stage; the last event carries the result."""
        self.parts.timings = {}
        pictures = self.request.pictures()
        batches = yield from self.read()
        images: dict[int, Image.Image] = {}
        metadata: dict[int, dict[str, Any]] = {}
        for event, batch in self._carried_out(batches):
            if event.image is not None and event.metadata is not None:
                index = batch.pictures[event.step - 1].index
                images[index], metadata[index] = event.image, event.metadata
            yield event
        result = Result(
            images=[images[picture.index] for picture in pictures],
            latents_c=_in_order(batches, "latents_c"),
            latents_b=_in_order(batches, "latents_b"),
            request=self.request,
            timings=dict(self.parts.timings),
            metadata=[metadata[picture.index] for picture in pictures],
        )
        yield Event("done", 1, 1, pictures, result=result)

    def _carried_out(self, batches: Sequence[Batch]) -> Iterator[tuple[Event, Batch]]:
        """Stages C, B and A of all batches: one batch after the other, so that pictures come soon, or, where
        stages leave memory after their turn, one stage after the other, so that each is loaded once."""
        if self.parts.keep:
            for batch in batches:
                yield from ((event, batch) for event in self.compose(batch))
                yield from ((event, batch) for event in self.finish(batch))
            return
        with self.parts.held("stage_c", "previewer"):
            for batch in batches:
                yield from ((event, batch) for event in self.compose(batch))
        with self.parts.held(*("stage_b", "stage_a") if len(batches) > 1 else ()):
            for batch in batches:
                yield from ((event, batch) for event in self.finish(batch))

    def read(self) -> Generator[Event, None, list[Batch]]:
        """What comes before Stage C: prompts and pictures are encoded, and pictures put into batches."""
        pictures = self.request.pictures()
        yield Event("text", 0, 1, pictures)
        self.inputs = with_pictures(self.inputs, self.parts, self.request, self.brought)
        self.inputs = with_controls(self.inputs, self.parts, self.request, self.brought)
        batches = self._read_prompts(pictures)
        yield Event("text", 1, 1, pictures)
        return batches

    def compose(self, batch: Batch) -> Iterator[Event]:
        """Stage C of one batch, unless it has its latents_c already."""
        if batch.latents_c is None:
            self.parts.dress(batch.pictures[0].prompt)
            yield from self._stage_c(batch)

    def finish(self, batch: Batch) -> Iterator[Event]:
        """Stages B and A of one batch, whose latents_c are there, or its draft."""
        if self.request.draft:
            yield from self._draft(batch)
            return
        self.parts.dress(batch.pictures[0].prompt)
        yield from self._stage_b(batch)
        yield from self._stage_a(batch)

    def _read_prompts(self, pictures: Sequence[Picture]) -> list[Batch]:
        """Encode every different prompt, and group pictures whose prompts are equally long, and wear the same
        LoRAs, into batches.

        No attention mask reaches Stage C, so padding a prompt to its neighbour's length would change its
        picture; each prompt is therefore read alone, beside its negative.
        """
        width = StageCConfig(**self.parts.info("stage_c").config).image_width
        read: dict[str, Conditioning] = {}
        with self.parts.turn("text_encoder") as encoder, self.parts.timed("text"):
            for prompt in self.request.prompts:
                if prompt not in read:
                    read[prompt] = condition(encoder, [prompt, self.request.negative], image_width=width)
                    self._check(read[prompt].text_hidden, "text_encoder")
        groups: dict[tuple[tuple[str, ...], int], list[Picture]] = {}
        for picture in pictures:
            tokens, length = self.parts.opened(picture.prompt), read[picture.prompt].text_hidden.shape[1]
            groups.setdefault((tuple(sorted(tokens)), length), []).append(picture)
        size = self.request.batch or 1
        batches = []
        for _, group in sorted(groups.items(), key=lambda entry: entry[0][0]):
            for start in range(0, len(group), size):
                together = group[start : start + size]
                told = [read[picture.prompt] for picture in together]
                cond, uncond = _rows(told, 0), _rows(told, 1)
                batches.append(self._follow_pictures(Batch(together, cond, uncond)))
        return batches

    def _follow_pictures(self, batch: Batch) -> Batch:
        """Add the embeddings of pictures. Guidance is measured against text and pictures left out."""
        if self.inputs.image_embed is None:
            return batch
        embed = rows(self.inputs.image_embed.to(batch.cond.image_embed), batch.pictures)
        batch.uncond = replace(batch.uncond, image_embed=torch.zeros_like(embed))
        batch.cond = replace(batch.cond, image_embed=embed)
        if self.inputs.text_pooled is not None:
            own = rows(self.inputs.text_pooled.to(batch.cond.text_pooled), batch.pictures)
            silent = torch.tensor([not picture.prompt.strip() for picture in batch.pictures])
            silent = silent.to(own.device)[:, None, None]
            pooled = torch.where(silent, own, batch.cond.text_pooled)
            batch.cond = replace(batch.cond, text_pooled=pooled)
        return batch

    def _stage_c(self, batch: Batch) -> Iterator[Event]:
        """Text and inputs -> latents_c."""
        start = self.inputs.start
        given = self.inputs.latents_c if start is None or self.request.strength != 0 else start
        if given is not None:
            batch.latents_c = rows(given.float().cpu(), batch.pictures).contiguous()
            yield Event("stage_c", 1, 1, batch.pictures)
            return
        size = self.parts.size_c(*self.request.base_sides())
        yield from self._draw(batch, "stage_c", size, self.inputs.controls, start, self.inputs.known)
        if self.request.upscale is not None:
            assert batch.latents_c is not None
            controls = (upscaling(self.parts, batch.latents_c),)
            size = self.parts.size_c(*self.request.sides())
            yield from self._draw(batch, "upscale", size, controls, None)

    def _draw(
        self,
        batch: Batch,
        purpose: str,
        size: tuple[int, int],
        controls: Sequence[Control],
        start: Tensor | None,
        known: Known | None = None,
    ) -> Iterator[Event]:
        """Latents of `size` by Stage C, from noise of its own for each purpose, or from `start`."""
        cond, uncond = (part.to(self.parts.device, self.parts.dtype) for part in (batch.cond, batch.uncond))
        both = cat(cond, uncond)
        acting: list[Tensor | None] = []
        with self.parts.turn("stage_c") as network:
            shape = (network.config.channels, *size)

            def answer(x: Tensor, t: Tensor, asked: slice, scratch: Scratch) -> Tensor:
                x = x.to(self.parts.dtype)
                residuals = [None if one is None else spread(one.to(x), len(x)) for one in acting]
                predicted: Tensor = network(
                    x,
                    t,
                    both.text_hidden[asked],
                    both.text_pooled[asked],
                    both.image_embed[asked],
                    residuals=residuals or None,
                    scratch=scratch,
                )
                return predicted

            if start is not None:
                start = rows(start.float().to(self.parts.device), batch.pictures)
            how = self.request.sampling("stage_c")
            if start is None:  # from pure noise, in all the steps asked for
                how = replace(how, steps=self.request.steps or how.steps, strength=1.0)
            if purpose == "upscale":  # what is there already says what to draw
                most = self.parts.info("stage_c").settings.get("guidance_with_picture", how.guidance)
                how = replace(how, guidance=min(how.guidance, most))
            acting[:] = combine(controls, 0, how.steps, batch.pictures)
            for step in self._sample("stage_c", answer, shape, batch, how, start, purpose, known):
                batch.latents_c = step.x0
                acting[:] = combine(controls, step.index + 1, step.steps, batch.pictures)
                previews = self._preview(step.x0) if self.request.preview else None
                yield Event("stage_c", step.index + 1, step.steps, batch.pictures, previews)

    def _stage_b(self, batch: Batch) -> Iterator[Event]:
        """latents_c and pooled text -> latents_b."""
        assert batch.latents_c is not None
        if self.inputs.latents_b is not None:
            batch.latents_b = rows(self.inputs.latents_b.float().to(self.parts.device), batch.pictures)
            yield Event("stage_b", 1, 1, batch.pictures)
            return
        height, width = self.request.sides()
        semantic = batch.latents_c.to(self.parts.device, self.parts.dtype)
        both = torch.cat([semantic, torch.zeros_like(semantic)])
        pooled = cat(batch.cond, batch.uncond).text_pooled.to(self.parts.device, self.parts.dtype)
        with self.parts.turn("stage_b") as network:
            shape = (network.config.channels, *latent_size_b(height, width))

            def answer(x: Tensor, t: Tensor, asked: slice, scratch: Scratch) -> Tensor:
                x = x.to(self.parts.dtype)
                predicted: Tensor = network(x, t, both[asked], pooled[asked], scratch=scratch)
                return predicted

            for step in self._sample("stage_b", answer, shape, batch, self.request.sampling("stage_b")):
                batch.latents_b = step.x0
                yield Event("stage_b", step.index + 1, step.steps, batch.pictures)
        batch.latents_c = batch.latents_c.cpu()

    def _stage_a(self, batch: Batch) -> Iterator[Event]:
        """latents_b -> pixels, in float32 and one picture at a time: it is the largest map of all."""
        assert batch.latents_b is not None
        with self.parts.turn("stage_a") as network:
            for row in range(len(batch.pictures)):
                with self.parts.timed("stage_a"), torch.no_grad():
                    latents = batch.latents_b[row : row + 1].float()
                    pixels = decode_in_tiles(network, latents, self.parts.tile, self.parts.speed.fused)
                    self._check(pixels, "stage_a")
                    (image,) = to_images(pixels)
                yield self._finished(batch, row, image)
        batch.latents_b = batch.latents_b.cpu()

    def _draft(self, batch: Batch) -> Iterator[Event]:
        """latents_c -> the previewer's picture, 8 pixels a latent, enlarged: no detail, but no Stage B."""
        assert batch.latents_c is not None
        height, width = self.request.sides()
        with self.parts.timed("draft"):
            shown = self._preview(batch.latents_c.to(self.parts.device))
        for row, image in enumerate(shown):
            yield self._finished(batch, row, image.resize((width, height), Image.Resampling.BICUBIC))
        batch.latents_c = batch.latents_c.cpu()
        batch.latents_b = torch.zeros(len(batch.pictures), 4, 0, 0)

    def _finished(self, batch: Batch, row: int, image: Image.Image) -> Event:
        if self.inputs.finish is not None:
            image = self.inputs.finish(image, batch.pictures[row])
        stored = picture_metadata(self.request, batch.pictures, row)
        return Event("stage_a", row + 1, len(batch.pictures), batch.pictures, None, image, stored)

    def _sample(
        self,
        stage: str,
        answer: Answer,
        shape: tuple[int, ...],
        batch: Batch,
        how: Sampling,
        start: Tensor | None = None,
        purpose: str | None = None,
        known: Known | None = None,
    ) -> Iterator[Step]:
        """Run the sampler of one stage from noise, or from `start` noised to the level `how.strength`.

        The state is float32 whatever the network computes in.
        """
        settings = self.parts.info(stage).settings
        schedule = Schedule(settings["shift"])
        guidance = None
        if how.guidance != 1:
            guidance = Guidance(how.guidance, settings["rescale"], how.interval, how.agreement)

        def noise(step: int) -> Tensor:
            return draw_batch(batch.seeds, purpose or stage, step, shape).to(self.parts.device)

        x = noise(START)
        times, logsnrs = schedule.grid(how.steps, how.strength)
        told = [float(schedule.time(logsnr)) for logsnr in logsnrs[:-1]]
        branches = Branches(answer, self.parts.speed, told, how.reuse)
        denoiser = Denoiser(branches, schedule, settings["prediction"], guidance)
        if known is not None:
            held = rows(known.latents_c, batch.pictures).to(x), known.drawn.to(x)

        def denoise(x: Tensor, logsnr: Tensor, t: float) -> Denoised:
            branches.time = float(schedule.time(logsnr))
            found = denoiser(x, logsnr, t)
            return found if known is None else hold(found, x, logsnr, *held)

        if start is not None and how.strength < 1:  # at 1 the little that is left of `start` is left out
            x = add_noise(start, x, logsnrs[0].to(self.parts.device))
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


def _rows(read: Sequence[Conditioning], row: int) -> Conditioning:
    """Row `row` of each, stacked."""
    return Conditioning(
        torch.stack([one.text_hidden[row] for one in read]),
        torch.stack([one.text_pooled[row] for one in read]),
        torch.stack([one.image_embed[row] for one in read]),
    )


def _in_order(batches: Sequence[Batch], name: str) -> Tensor:
    """Latents of all pictures, in the order of the request."""
    rows: dict[int, Tensor] = {}
    for batch in batches:
        latents = getattr(batch, name)
        rows.update((picture.index, latents[row]) for row, picture in enumerate(batch.pictures))
    return torch.stack([rows[index] for index in sorted(rows)])
