"""What a generation is asked for, and what comes back.

A `Request` is complete on its own: command line, API and evaluation build one, `Cascade` carries it out,
and every PNG stores it. A setting left at None means "the model's own default", which its weight file
names; `resolve` fills those in. Everything that can be wrong is found here, before any weight is loaded.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

from triptych import __version__
from triptych.diffusion.samplers import SAMPLERS
from triptych.errors import RequestError, nearest
from triptych.pipelines.fast import FAST
from triptych.sizes import SIDE_MULTIPLE, nearest_sides

BYTES = r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([KMGT]i?)?B?\s*"
MAX_SEED = 2**63 - 1
MAX_BATCH = 4  # pictures that share one network call unless the request says otherwise


def parse_size(value: Any) -> Any:
    """Turn "512x384" into (512, 384), width first; other values pass on to be checked."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*[xX×]\s*([0-9]{1,9})\s*", value, re.ASCII)
        if match is None:
            raise ValueError(f'"{value}" is not a size; write width x height, such as 512x384')
        return int(match[1]), int(match[2])
    return value


def parse_interval(value: Any) -> Any:
    """Turn "0.2-0.9" into (0.2, 0.9); other values pass on to be checked."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*-\s*([0-9]*\.?[0-9]+)\s*", value, re.ASCII)
        if match is None:
            raise ValueError(f'"{value}" is not an interval; write two noise levels such as 0.2-0.9')
        return float(match[1]), float(match[2])
    return value


def parse_bytes(value: Any) -> Any:
    """Turn "8GiB", "500 MB" or "3e9" into a number of bytes; other values pass on to be checked."""
    if isinstance(value, str):
        match = re.fullmatch(
            r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([KMGT]i?)?B?\s*", value, re.I | re.ASCII
        )
        if match is None:
            raise ValueError(f'"{value}" is not an amount of memory; write one such as 8GiB or 500MB')
        unit = (match[2] or "").upper()
        power = " KMGT".index(unit[0]) if unit else 0
        return int(float(match[1]) * (1024 if unit.endswith("I") else 1000) ** power)
    return value


def parse_text(value: Any) -> Any:
    """Refuse text that cannot be written as UTF-8 (half a surrogate pair): no tokenizer reads it, no message
    can quote it."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    for text in texts:
        if isinstance(text, str):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("the text is not valid Unicode") from None
    return value


Size = Annotated[
    tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]],
    BeforeValidator(parse_size),
    BeforeValidator(parse_text),  # the last is the first to look
]
Bytes = Annotated[int, Field(ge=1), BeforeValidator(parse_bytes), BeforeValidator(parse_text)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Weight = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Strength = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Interval = Annotated[tuple[Strength, Strength], BeforeValidator(parse_interval), BeforeValidator(parse_text)]
Reuse = Annotated[int, Field(ge=1, le=1000)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Extent = Annotated[int, Field(ge=0, le=16384)]


class Source(BaseModel):
    """A picture that a request follows or starts from: what for, which file, and the SHA-256 of its bytes.

    `role` is "reference" (Stage C is told its embedding, times `weight`) or "start" (its latents are where
    Stage C begins); controls have roles of their own. `file` is None for a picture that was in no file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str = Field(min_length=1)
    file: str | None = None
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    weight: Weight = 1.0


class ControlRequest(BaseModel):
    """One ControlNet's part in a request. Raises RequestError, in one sentence, for what is wrong in itself.

    `picture` and `mask` are places among the request's `sources`. The residuals are multiplied by `weight`
    and added on the steps between the fractions `begin` and `end` of the sampling. Every kind of hint has
    settings of its own; those of others say nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hint: str = Field(min_length=1, description="Kind of control, such as canny.")
    picture: int = Field(ge=0)
    controlnet: str | None = Field(None, description="Another ControlNet: a file.")
    weight: Weight = 1.0
    begin: Strength = 0.0
    end: Strength = 1.0
    low: float = Field(100.0, ge=0, description="Canny: weaker changes are no edges.")
    high: float = Field(200.0, ge=0, description="Canny: stronger changes always are.")
    sketch: bool = Field(False, description="Canny: the picture is a sketch, its lines are the edges.")
    mask: int | None = Field(None, ge=0)
    box: tuple[int, int, int, int] | None = Field(None, description="x, y, width, height of hole or face.")
    salient: Strength | None = Field(None, description="Inpainting: what stands out more than this.")
    extend: tuple[Extent, Extent, Extent, Extent] | None = Field(
        None, description="Outpainting: pixels added left, above, right, below."
    )
    hold: bool | None = Field(
        None, description="Inpainting: latents outside stay the picture's; none: what Stage C's file says."
    )
    face_model: str | None = Field(None, description="Identity: an ONNX file that reads a face.")
    face_detector: str | None = Field(None, description="Identity: an ONNX file that finds faces.")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RequestError(explain(error, ControlRequest)) from None
        if self.begin >= self.end:
            raise RequestError(
                f"A control from {self.begin:g} to {self.end:g} of the sampling never acts: begin before end."
            )


class Request(BaseModel):
    """Everything one generation needs. Raises RequestError, in one sentence, for what is wrong in itself.

    >>> Request(prompt="a red apple", size="256x256", seed=7).size
    (256, 256)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    prompt: Annotated[str | tuple[str, ...], BeforeValidator(parse_text)] = Field(
        description="What to draw, taken literally; several prompts make `count` pictures each."
    )
    negative: Annotated[str, BeforeValidator(parse_text)] = Field("", description="What to steer away from.")
    size: Size | None = Field(None, description="Width and height in pixels.")
    count: int = Field(1, ge=1, le=10_000, description="Pictures per prompt; picture i has seed + i.")
    seed: Seed | None = Field(None, description="Seed of the first picture; None draws one.")
    seeds: tuple[Seed, ...] | None = Field(None, description="One seed per picture, instead of `seed`.")
    steps: Steps | None = Field(None, description="Steps of Stage C.")
    guidance: Weight | None = Field(None, description="Guidance weight of Stage C; 1 switches it off.")
    guidance_interval: Interval | None = Field(
        None, description="Noise levels, 0 (none) to 1 (nothing else), between which Stage C is guided."
    )
    guidance_agreement: Weight | None = Field(
        None, description="Guide no longer once both branches differ relatively by less; 0 goes on."
    )
    sampler: str | None = Field(None, description="Sampler of Stage C.")
    reuse: Reuse | None = Field(
        None, description="Work out Stage C's deep levels at every so many-th step only; 1 at all."
    )
    strength: Strength | None = Field(
        None, description="How far from the source picture: 0 keeps, 1 forgets."
    )
    sources: tuple[Source, ...] = Field((), description="Pictures to follow or to start from.")
    controls: tuple[ControlRequest, ...] = Field((), description="ControlNets that steer Stage C.")
    upscale: Literal[2] | None = Field(None, description="Draw Stage C's latents again, twice as large.")
    decoder_steps: Steps | None = Field(None, description="Steps of Stage B.")
    decoder_guidance: Weight | None = Field(None, description="Guidance weight of Stage B.")
    decoder_sampler: str | None = Field(None, description="Sampler of Stage B.")
    decoder_reuse: Reuse | None = Field(None, description="As `reuse`, for Stage B.")
    fast: bool = Field(False, description="Fill what is not given in with settings that need far less work.")
    draft: bool = Field(
        False, description="Stop after Stage C: the previewer's small picture, enlarged, and blurred."
    )
    model: str = Field("mini", min_length=1, description="A model's name, a folder, or a hub name.")
    stage_a: str | None = Field(None, description="Another Stage A: a file.")
    stage_b: str | None = Field(None, description="Another Stage B: a size or a file.")
    stage_c: str | None = Field(None, description="Another Stage C: a size or a file.")
    text_encoder: str | None = Field(None, description="Another text tower: a file or folder.")
    lora: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="LoRA files to wear, each FILE or FILE:SCALE; they add up."
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$", description="Where to compute.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Precision.")
    low_memory: bool = Field(False, description="Keep one stage in memory at a time, its weights on disk.")
    max_memory: Bytes | None = Field(None, description="Memory the process may take, such as 8GiB.")
    int8: bool | None = Field(
        None, description="Round weights to int8 rows; None: only where max_memory asks for it."
    )
    batch: int | None = Field(None, ge=1, le=1024, description="Pictures that share one network call.")
    preview: bool = Field(False, exclude=True, description="Show pictures while Stage C runs.")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RequestError(explain(error, Request)) from None
        self._check_names()
        self._check_seeds()
        if self.guidance_interval is not None and self.guidance_interval[0] > self.guidance_interval[1]:
            low, high = self.guidance_interval
            raise RequestError(f"guidance_interval = {low:g}-{high:g}: the lower noise level comes first.")

    def _check_names(self) -> None:
        for name in (self.sampler, self.decoder_sampler):
            if name is not None and name not in SAMPLERS:
                raise RequestError(f'There is no sampler "{name}": {nearest(name, SAMPLERS)}.')

    def _check_seeds(self) -> None:
        if not self.prompts:
            raise RequestError("An empty list of prompts was given; at least one prompt is needed.")
        pictures = len(self.prompts) * self.count
        if self.seeds is not None and len(self.seeds) != pictures:
            raise RequestError(
                f"{len(self.seeds)} seeds were given for {pictures} pictures; give one seed per picture."
            )
        if self.seed is not None and self.seed + self.count - 1 > MAX_SEED:
            raise RequestError(f"Seed {self.seed} leaves no room for {self.count} pictures below 2^63.")

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, always as a tuple."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    def base_sides(self) -> tuple[int, int]:
        """Height and width in pixels, before `upscale`. The request must be resolved."""
        if self.size is None:
            raise RequestError("This request has no size yet; resolve it first.")
        return self.size[1], self.size[0]

    def sides(self) -> tuple[int, int]:
        """Height and width of the finished picture in pixels. The request must be resolved."""
        height, width = self.base_sides()
        return height * (self.upscale or 1), width * (self.upscale or 1)

    def pictures(self) -> list[Picture]:
        """One entry per picture, prompt by prompt. The seed must be known (see `resolve`)."""
        if self.seed is None and self.seeds is None:
            raise RequestError("This request has no seed yet; resolve it first.")
        found: list[Picture] = []
        for prompt in self.prompts:
            for number in range(self.count):
                seed = self.seeds[len(found)] if self.seeds is not None else (self.seed or 0) + number
                found.append(Picture(len(found), prompt, seed))
        return found

    def sampling(self, stage: str) -> Sampling:
        """How "stage_c" or "stage_b" is sampled. The request must be resolved."""
        of_stage = {
            "stage_c": (self.steps, self.guidance, self.sampler),
            "stage_b": (self.decoder_steps, self.decoder_guidance, self.decoder_sampler),
        }
        steps, guidance, sampler = of_stage[stage]
        if steps is None or guidance is None or sampler is None:
            raise RequestError("This request still has defaults to fill in; resolve it first.")
        if stage == "stage_b":
            return Sampling(steps, guidance, sampler, reuse=self.decoder_reuse or 1)
        how = Sampling(
            steps,
            guidance,
            sampler,
            interval=self.guidance_interval or (0.0, 1.0),
            agreement=self.guidance_agreement or 0.0,
            reuse=self.reuse or 1,
        )
        if not self.strength:
            return how
        return replace(how, steps=max(1, round(steps * self.strength)), strength=self.strength)

    def replaced(self, **changes: Any) -> Request:
        """A checked copy with some fields changed."""
        return Request(**{**self.model_dump(), "preview": self.preview, **changes})

    def resolve(self, stage_c: Mapping[str, Any], stage_b: Mapping[str, Any], min_side: int) -> Request:
        """Fill every None from the settings of the weight files, `fast` before them, and check the size.

        `stage_c` and `stage_b` are the `settings` tables of the two files; `min_side` is the shortest side
        in pixels that Stage B's levels can halve. Raises RequestError naming the nearest sizes.
        """
        width, height = self.size or stage_c["default_size"]
        check_size(width, height, int(stage_c.get("size_multiple", SIDE_MULTIPLE)), min_side)
        seed = self.seed
        if seed is None and self.seeds is None:
            seed = secrets.randbelow(2**32)  # short enough to be typed again
        plain = {
            **{name: stage_c[name] for name in ("steps", "guidance", "sampler")},
            **{f"decoder_{name}": stage_b[name] for name in ("steps", "guidance", "sampler")},
            "batch": 1 if self.low_memory or self.max_memory else MAX_BATCH,
        }
        fewest = {name: min(FAST[name], plain[name]) for name in ("steps", "decoder_steps")}
        fast = {**FAST, **fewest, **stage_c.get("fast", {})} if self.fast else {}
        filled = {name: value for name, value in {**plain, **fast}.items() if getattr(self, name) is None}
        return self.replaced(size=(width, height), seed=seed, **filled)


@dataclass(frozen=True)
class Sampling:
    """How one stage is sampled, with every default filled in."""

    steps: int  # that are taken: from a lower level fewer than were asked for
    guidance: float
    sampler: str
    strength: float = 1.0  # the noise level at which it starts
    interval: tuple[float, float] = (0.0, 1.0)  # of noise levels in which guidance acts
    agreement: float = 0.0  # relative difference of the branches below which guidance ends
    reuse: int = 1  # steps that share what the deep levels gave


@dataclass(frozen=True)
class Picture:
    """One picture of a request: its place in the result, its prompt and its seed."""

    index: int
    prompt: str
    seed: int


@dataclass
class Result:
    """What a generation made. `latents_c` (N,16,h,w) and `latents_b` (N,4,H/4,W/4) are float32 on the CPU."""

    images: list[Image.Image]
    latents_c: Tensor
    latents_b: Tensor
    request: Request  # with every setting resolved
    timings: dict[str, float] = field(default_factory=dict)  # seconds by stage
    metadata: list[dict[str, Any]] = field(default_factory=list)  # per picture, as its PNG stores it


def picture_metadata(request: Request, together: Sequence[Picture], index: int) -> dict[str, Any]:
    """What the PNG of `together[index]` stores: a request for exactly the pictures that shared its batch.

    Rounding in the last bit depends on the batch, so repeating a picture bit for bit means repeating
    the batch and keeping one picture of it; `recall` gives both back.
    """
    prompts = {picture.prompt for picture in together}
    first = together[0].seed
    seeds = [picture.seed for picture in together]
    plain = len(prompts) == 1 and seeds == list(range(first, first + len(seeds)))
    chunk = request.replaced(
        prompt=together[0].prompt if plain else tuple(picture.prompt for picture in together),
        count=len(together) if plain else 1,
        seed=first if plain else None,
        seeds=None if plain else seeds,
    )
    stored = {key: value for key, value in chunk.model_dump(mode="json").items() if value not in (None, [])}
    own = together[index]
    return {"version": __version__, "prompt": own.prompt, "seed": own.seed, "request": stored, "index": index}


def recall(metadata: Mapping[str, Any], path: object) -> tuple[Request, Picture]:
    """The request stored in a PNG (`images.read_metadata`) and the picture of it that the PNG shows.

    `path` is named in errors. Raises RequestError when the settings are damaged or of a newer version.
    """
    stored, index = metadata.get("request"), metadata.get("index", 0)
    if not isinstance(stored, dict) or not isinstance(index, int):
        raise RequestError(f"The settings stored in {path} are damaged: no request is in them.")
    try:
        request = Request(**stored)
        return request, request.pictures()[index]
    except (RequestError, IndexError) as error:
        version = metadata.get("version", "an unknown version")
        raise RequestError(
            f"The settings in {path}, written by triptych {version}, cannot be used: {error}"
        ) from None


def check_size(width: int, height: int, multiple: int, min_side: int) -> None:
    """Raise RequestError, naming the nearest sizes, unless a picture of this size can be made exactly."""
    smallest = -(-min_side // multiple) * multiple
    if width >= smallest and height >= smallest and width % multiple == 0 and height % multiple == 0:
        return
    below_w, above_w = (max(side, smallest) for side in nearest_sides(width, multiple))
    below_h, above_h = (max(side, smallest) for side in nearest_sides(height, multiple))
    sizes = dict.fromkeys((f"{below_w}x{below_h}", f"{above_w}x{above_h}"))
    raise RequestError(
        f"Size {width}x{height} cannot be made: sides are multiples of {multiple} from {smallest} pixels on; "
        f"the nearest {'size is' if len(sizes) == 1 else 'sizes are'} {' and '.join(sizes)}."
    )


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One sentence per mistake that pydantic found; an unknown key names the nearest known one."""
    sentences = []
    for mistake in error.errors(include_url=False):
        place = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            key = str(mistake["loc"][-1])
            sentences.append(
                f'There is no setting "{place}": {nearest(key, _fields(model, mistake["loc"]))}.'
            )
        elif mistake["type"] == "missing":
            sentences.append(f"The setting {place} is missing.")
        else:
            reason = mistake["msg"].removeprefix("Value error, ")
            shown = repr(mistake["input"])
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            sentences.append(f"{place} = {shown}: {reason[:1].lower()}{reason[1:].rstrip('.')}.")
    return " ".join(dict.fromkeys(sentences)).replace("\n", " ")


def _fields(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """Names of the settings beside the unknown one at `place`, looking into nested models."""
    for part in place[:-1]:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)
