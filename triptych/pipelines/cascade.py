"""The cascade: what it can be asked for, in Python.

    cascade = Cascade.load("mini")
    result = cascade.generate("a red apple", count=4, seed=7)
    for event in cascade.stream("a red apple"):
        print(event.stage, event.step, event.steps)
    result = cascade.vary("photo.png", count=4)
    result = cascade.img2img("photo.png", "as a watercolour", strength=0.6)

Every method fills in a `Request`, checks it and what came with it, and hands both to a `Run` (stages.py),
where prompt -> Conditioning -> latents_c -> latents_b -> pixels happens.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from triptych.checkpoints.catalog import ModelFiles, find_model
from triptych.conditioning.masks import SHOWN_THRESHOLD
from triptych.errors import RequestError
from triptych.images import cover, to_pixels
from triptych.models.stage_b import StageBConfig
from triptych.pipelines.adapters import student_sampling
from triptych.pipelines.control import (
    FACTORS,
    Steering,
    check_controls,
    hint_images,
    sized_for_controls,
    steered,
)
from triptych.pipelines.inputs import NOTHING, Inputs
from triptych.pipelines.latents import Latents
from triptych.pipelines.parts import Parts
from triptych.pipelines.pictures import (
    REFERENCE,
    START,
    Brought,
    Given,
    bring,
    bring_again,
    bring_latents,
    encode_semantic,
    latents_as_inputs,
    sized,
    with_latents,
)
from triptych.pipelines.placement import choose_device, choose_dtype
from triptych.pipelines.planning import plan_requests
from triptych.pipelines.request import Request, Result
from triptych.pipelines.speed import Speed
from triptych.pipelines.stages import Event, Run
from triptych.sizes import PIXELS_PER_LATENT_C, SIDE_MULTIPLE, latent_size_b

__all__ = ["Cascade", "Event"]

IDENTITY = ("model", "stage_a", "stage_b", "stage_c", "text_encoder", "device", "dtype", "low_memory")


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
        speed: Speed | None = None,
    ) -> Cascade:
        """A cascade by name ("mini", "cascade", "cascade-lite"), folder or hub name; any C goes with any B.

        No weight is read yet. `speed` switches off what makes sampling faster at the same result, or has
        blocks compiled. Raises CheckpointError for an unknown model or a file that does not fit and
        RequestError for a device or a compiler that is not there.
        """
        overrides = {"stage_c": stage_c, "stage_b": stage_b, "stage_a": stage_a, "text_encoder": text_encoder}
        chosen = {name: None if value is None else str(value) for name, value in overrides.items()}
        return cls.for_request(
            Request(prompt="", model=str(model), device=device, dtype=dtype, low_memory=low_memory, **chosen),
            speed,
        )

    @classmethod
    def for_request(cls, request: Request, speed: Speed | None = None) -> Cascade:
        """The cascade that `request` names; see `load`."""
        files = find_model(
            request.model,
            stage_c=request.stage_c,
            stage_b=request.stage_b,
            stage_a=request.stage_a,
            text_encoder=request.text_encoder,
        )
        cascade = cls(files, request)
        if speed is not None:
            cascade.parts.speed = speed.ready(cascade.device)
        return cascade

    def resolve(self, request: Request, brought: Sequence[Brought] | None = None) -> Request:
        """The request with every default filled in from this model's files, and checked against them.

        `brought` are the pictures it names, which are read when not given and when its size depends on them.
        """
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
        if brought is None:
            brought = bring_again(request) if request.size is None and request.sources else ()
        width, height = stage_c.settings["default_size"]
        multiple = int(stage_c.settings.get("size_multiple", SIDE_MULTIPLE))
        request = sized_for_controls(request.replaced(**own), brought, (width, height), multiple, min_side)
        request = sized(request, brought, stage_c.settings, min_side)
        return request.resolve(sampling_defaults(stage_c.settings, request), stage_b.settings, min_side)

    def generate(
        self, prompt: str | Sequence[str] | Request, inputs: Inputs = NOTHING, **settings: Any
    ) -> Result:
        """Make the pictures of a request. `settings` are the fields of `Request`, `inputs` what steers beside
        the text.

        `prompt` may be a list, with `seeds=[...]` one for each picture. Raises RequestError before any
        weight is loaded, CapacityError when memory is too small, CheckpointError for weights that fail.
        """
        return _last(self.stream(prompt, inputs, **settings))

    def stream(
        self, prompt: str | Sequence[str] | Request, inputs: Inputs = NOTHING, **settings: Any
    ) -> Generator[Event, None, None]:
        """As `generate`, but yields an Event for every step; the last one carries the result.

        The request is checked and the pictures it names are read at once. Closing the generator cancels the
        rest.
        """
        if isinstance(prompt, Request):
            request = prompt.replaced(**settings) if settings else prompt
        else:
            request = Request(prompt=prompt if isinstance(prompt, str) else tuple(prompt), **settings)
        inputs = with_latents(inputs, request, self._pixels_per_latent())
        return self._start(request, inputs, bring_again(request))

    def vary(
        self,
        picture: Given,
        prompt: str = "",
        *,
        weight: float = 1.0,
        references: Sequence[Given | tuple[Given, float]] = (),
        **settings: Any,
    ) -> Result:
        """New pictures of what `picture` (a PIL image or a file) shows, of a prompt, or of both.

        `weight` says how much the picture counts, `references` are more pictures, alone or with a weight;
        one of 0 leaves a picture out. Raises as `generate` does, and DataError for unreadable files.
        """
        brought = [bring(picture, REFERENCE, weight)]
        for reference in references:
            other, own = reference if isinstance(reference, tuple) else (reference, 1.0)
            brought.append(bring(other, REFERENCE, own))
        return _last(self._start(_naming(brought, prompt, settings), NOTHING, brought))

    def img2img(self, picture: Given, prompt: str = "", *, strength: float = 0.6, **settings: Any) -> Result:
        """Change `picture` (a PIL image or a file) towards a prompt.

        Its semantic latents are noised to the level `strength` in [0, 1] of the sampling and sampled from
        there: 0 gives the reconstruction, 1 what `generate` gives with the same seed and size. The size is
        the picture's own, as near as the model makes it, unless `size` says otherwise. Raises as `vary`.
        """
        brought = [bring(picture, START)]
        request = _naming(brought, prompt, {**settings, "strength": strength})
        return _last(self._start(request, NOTHING, brought))

    def reconstruct(self, picture: Given, prompt: str = "", **settings: Any) -> Result:
        """`picture` through the semantic encoder and back: `img2img` at strength 0. A prompt, if given, is
        told to Stage B. Raises as `vary`."""
        return self.img2img(picture, prompt, strength=0.0, **settings)

    def encode(
        self, picture: Given, *, stage: Literal["c", "b"] = "c", size: tuple[int, int] | str | None = None
    ) -> Latents:
        """The latents of `picture` (a PIL image or a file): `latents_c`, and with `stage="b"` also Stage A's
        `latents_b`. Raises RequestError for a size that cannot be made, DataError for an unreadable file."""
        if stage not in ("c", "b"):
            raise RequestError(f'There are latents of stage "c" and "b", not of "{stage}".')
        brought = [bring(picture, START)]
        request = self.resolve(_naming(brought, "", {"size": size}), brought)
        assert request.size is not None
        pixels = to_pixels([cover(brought[0].image, request.size)])
        latents_b = None
        if stage == "b":
            with self.parts.turn("stage_a") as network, torch.no_grad():
                latents_b = network.encode(pixels.to(self.device)).float().cpu()
        return Latents(
            encode_semantic(self.parts, pixels).cpu(),
            request.size,
            self.files.name,
            self._pixels_per_latent(),
            latents_b,
            self.files.licence,
            self.files.notice,
        )

    def decode(self, latents: Latents | Path | str, prompt: str = "", **settings: Any) -> Result:
        """The picture of latents, given or in a file: through Stages B and A, or through Stage A alone when
        `latents_b` are among them. `settings` are the fields of `Request`.

        Raises CheckpointError for another file, RequestError for latents of another kind of model.
        """
        if isinstance(latents, Latents):
            inputs = latents_as_inputs(latents, self._pixels_per_latent())
            return self.generate(prompt, inputs, size=latents.size, **settings)
        read, source = bring_latents(latents)
        return self.generate(prompt, size=read.size, sources=(source,), **settings)

    def steer(self, prompt: str, *controls: Steering, **settings: Any) -> Result:
        """Pictures of a prompt that follow any number of controls at once, each with its own weight and share
        of the steps.

            cascade.steer("a house", Steering("canny", "lines.png"), Steering("palette", "colours.png",
                settings={"weight": 0.5, "end": 0.4}))

        Raises as `generate`, and DataError for unreadable pictures.
        """
        request, brought = steered(prompt, controls, settings)
        return _last(self._start(request, NOTHING, brought))

    def canny(
        self,
        picture: Given,
        prompt: str = "",
        *,
        sketch: bool = False,
        low: float = 100.0,
        high: float = 200.0,
        control: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Result:
        """A picture of `prompt` with the edges of `picture`, or with the lines of a sketch.

        `low` and `high` are Canny's thresholds; `control` are further fields of `ControlRequest` (weight,
        begin, end, controlnet), here and in the methods below. Raises as `steer`.
        """
        own = {"sketch": sketch, "low": low, "high": high, **(control or {})}
        return self.steer(prompt, Steering("canny", picture, settings=own), **settings)

    def inpaint(
        self,
        picture: Given,
        prompt: str = "",
        *,
        mask: Given | None = None,
        box: tuple[int, int, int, int] | None = None,
        salient: float | None = None,
        control: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Result:
        """`picture` with one part drawn anew: the white of `mask`, `box` (x, y, width, height), or what
        stands out more than `salient` in [0,1] (0.2 when none of the three is given).

        Pixels outside are exactly those of the picture, and so is its size. Raises as `steer`, and
        RequestError when nothing is masked.
        """
        if mask is None and box is None and salient is None:
            salient = SHOWN_THRESHOLD
        own = {"box": box, "salient": salient, **(control or {})}
        return self.steer(prompt, Steering("inpainting", picture, mask, own), **settings)

    def outpaint(
        self,
        picture: Given,
        prompt: str = "",
        *,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        control: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Result:
        """`picture` with so many pixels drawn further at its sides; its own stay exactly as they are.

        Raises as `steer`, and RequestError when no side grows.
        """
        own = {"extend": (left, top, right, bottom), **(control or {})}
        return self.steer(prompt, Steering("inpainting", picture, settings=own), **settings)

    def upscale(
        self,
        picture: Given,
        prompt: str = "",
        *,
        factor: int = 2,
        control: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Result:
        """`picture` drawn `factor` (2 or 4) times as large: 2 from its semantic latents, 4 from its pixels.

        What Stage C makes is upscaled without pixels by `generate(..., upscale=2)`. Raises as `steer`.
        """
        kinds = {factor: hint for hint, factor in FACTORS.items()}
        if factor not in kinds:
            raise RequestError(f"Pictures are made 2 or 4 times as large, not {factor} times.")
        return self.steer(prompt, Steering(kinds[factor], picture, settings=dict(control or {})), **settings)

    def identity(
        self,
        picture: Given,
        prompt: str = "",
        *,
        face_model: str | Path,
        face_detector: str | Path | None = None,
        box: tuple[int, int, int, int] | None = None,
        control: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Result:
        """A picture of `prompt` with the face of `picture`, read by ONNX models that the user brings.

        Without a detector, `box` (x, y, width, height) or the whole picture is the face. Raises as `steer`,
        MissingExtra without onnxruntime, and RequestError when there is no face.
        """
        own = {
            "face_model": str(face_model),
            "face_detector": None if face_detector is None else str(face_detector),
            "box": box,
            **(control or {}),
        }
        return self.steer(prompt, Steering("identity", picture, settings=own), **settings)

    def hints(self, request: Request) -> list[Image.Image]:
        """What the ControlNets of a request are told, one picture for each control. Raises as `steer`."""
        brought = bring_again(request)
        return hint_images(self.parts, self.resolve(request, brought), brought)

    def _start(
        self, request: Request, inputs: Inputs, brought: Sequence[Brought]
    ) -> Generator[Event, None, None]:
        """Check a request and what came with it, and plan it; nothing has run when this returns."""
        request = self.resolve(request, brought)
        self._check_inputs(request, inputs, brought)
        int8 = self._arrange([request])
        return Run(self.parts, request.replaced(int8=int8), inputs, brought).events()

    def runs(self, requests: Sequence[Request]) -> list[Run]:
        """Requests that wear the same LoRAs, checked and planned together, to be carried out stage by stage
        (see `bulk`). Raises as `generate` does."""
        runs = []
        for asked in requests:
            brought = bring_again(asked)
            request = self.resolve(asked, brought)
            inputs = with_latents(NOTHING, request, self._pixels_per_latent())
            self._check_inputs(request, inputs, brought)
            runs.append(Run(self.parts, request, inputs, brought))
        int8 = self._arrange([run.request for run in runs])
        for run in runs:
            run.request = run.request.replaced(int8=int8)
        return runs

    def _arrange(self, requests: Sequence[Request]) -> bool | None:
        """Settle where weights live for requests that are carried out together; returns whether some are
        rounded to int8, which their pictures tell."""
        if self.parts.speed.compiled and any(one.max_memory or one.low_memory for one in requests):
            raise RequestError(
                "Compiled blocks take memory that no plan counts: leave out compiling, or the memory limit."
            )
        chosen = plan_requests(self.parts, requests)
        self.parts.arrange(chosen)
        self.parts.wear(requests[0].lora)
        return True if chosen.int8 else requests[0].int8

    def _check_inputs(self, request: Request, inputs: Inputs, brought: Sequence[Brought]) -> None:
        """Raise RequestError unless the inputs belong to pictures of this number and size, CheckpointError
        when the model has no encoder for the pictures it is to read."""
        if request.upscale is not None and inputs.latents():
            raise RequestError("Upscaling draws what Stage C made again, and takes no latents from outside.")
        if request.draft:
            self.parts.path("previewer")
            if inputs.latents_b is not None:
                raise RequestError("A draft is made from Stage C's latents; these are Stage A's already.")
        pictures, sides = len(request.prompts) * request.count, request.sides()
        shapes = {"latents_c": self.parts.size_c(*sides), "latents_b": latent_size_b(*sides)}
        for kind, latents in inputs.latents():
            shape = shapes[kind]
            if len(latents) not in (1, pictures) or tuple(latents.shape[2:]) != shape:
                raise RequestError(
                    f"Latents of shape {tuple(latents.shape)} were given for {pictures} pictures, whose "
                    f"{kind} are {shape[0]}x{shape[1]}."
                )
        check_controls(self.parts, request)
        roles = {one.source.role for one in brought}
        if request.strength is not None and inputs.start is None and START not in roles:
            raise RequestError("A strength was given, but no picture to start from.")
        for role, part in ((REFERENCE, "image_encoder"), (START, "semantic")):
            if role in roles:
                self.parts.path(part)

    def _pixels_per_latent(self) -> float:
        settings = self.parts.info("stage_c").settings
        return float(settings.get("pixels_per_latent", PIXELS_PER_LATENT_C))


def _naming(brought: Sequence[Brought], prompt: str, settings: dict[str, Any]) -> Request:
    """The request for pictures that were brought."""
    return Request(prompt=prompt, sources=tuple(one.source for one in brought), **settings)


def sampling_defaults(settings: dict[str, Any], request: Request) -> dict[str, Any]:
    """Stage C's settings for a request.

    Guidance is `guidance_with_picture`, where its file has that, when a control or a reference says what to
    draw: text has less to add then, and pushed hard it spoils both. A distilled LoRA is drawn as it says.
    """
    told = bool(request.controls) or any(source.role == REFERENCE for source in request.sources)
    if told and "guidance_with_picture" in settings:
        settings = {**settings, "guidance": settings["guidance_with_picture"]}
    student = student_sampling(request.lora)
    return {**settings, **student, "fast": {**settings.get("fast", {}), **student}}


def _last(events: Generator[Event, None, None]) -> Result:
    result = None
    for event in events:
        result = event.result
    assert result is not None
    return result
