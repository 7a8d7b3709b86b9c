"""Pipelines of diffusers as systems, and the published competitors by name.

    preset          steps                       guidance    pictures
    sdxl            50                          5.0         1024x1024
    sdxl-turbo      1                           0.0         512x512
    playground-v2   50                          3.0         1024x1024
    wuerstchen-v2   30 noise levels, then 12    4.0, 0.0    1024x1024
    stable-cascade  20, then 10                 4.0, 0.0    1024x1024

Steps are those of the announcement of Stable Cascade, guidance is each model card's. diffusers belongs to
the extra `compare` and is imported here only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from triptych import __version__
from triptych.errors import CheckpointError, MissingExtra, SettingsError, nearest
from triptych.evaluation.systems import Drawn, Task
from triptych.pipelines.placement import choose_device, choose_dtype
from triptych.pipelines.request import Size, Steps, Weight

LENT = ("prior_steps", "prior_guidance", "prior_timesteps")  # settings that only a pipeline with a prior has


class DiffusersSettings(BaseModel):
    """How a pipeline is loaded and called. None leaves the pipeline's own default."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    pipeline: str = Field(description="a pipeline class of diffusers, such as StableDiffusionXLPipeline")
    model: str = Field(description="a hub name or a folder in the hub's layout")
    variant: str | None = Field(None, description="which files of the repository, such as fp16")
    prior_pipeline: str | None = Field(None, description="the class of a prior that makes image embeddings")
    prior_model: str | None = Field(None, description="the prior's hub name or folder")
    size: Size | None = Field(None, description="width x height in pixels")
    steps: Steps | None = None
    guidance: Weight | None = None
    prior_steps: Steps | None = None
    prior_guidance: Weight | None = None
    prior_timesteps: tuple[float, ...] | None = Field(None, description="noise levels in place of steps")
    negative: str = ""
    arguments: dict[str, Any] = Field(default_factory=dict, description="further arguments of the call")
    batch: int = Field(1, ge=1, description="pictures per call")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    offload: bool = Field(False, description="keep only the part at work on the device")


# 20 levels down to two thirds, then 10 to zero: the published sampling of Würstchen v2's prior.
WUERSTCHEN_LEVELS = tuple(1 - i / 57 for i in range(20)) + tuple(2 / 3 * (1 - i / 10) for i in range(1, 11))

PRESETS: dict[str, dict[str, Any]] = {
    "sdxl": {
        "pipeline": "StableDiffusionXLPipeline",
        "model": "stabilityai/stable-diffusion-xl-base-1.0",
        "variant": "fp16",
        "size": (1024, 1024),
        "steps": 50,
        "guidance": 5.0,
    },
    "sdxl-turbo": {
        "pipeline": "StableDiffusionXLPipeline",
        "model": "stabilityai/sdxl-turbo",
        "variant": "fp16",
        "size": (512, 512),
        "steps": 1,
        "guidance": 0.0,
    },
    "playground-v2": {
        "pipeline": "StableDiffusionXLPipeline",
        "model": "playgroundai/playground-v2-1024px-aesthetic",
        "variant": "fp16",
        "size": (1024, 1024),
        "steps": 50,
        "guidance": 3.0,
    },
    "wuerstchen-v2": {
        "pipeline": "WuerstchenDecoderPipeline",
        "model": "warp-ai/wuerstchen",
        "prior_pipeline": "WuerstchenPriorPipeline",
        "prior_model": "warp-ai/wuerstchen-prior",
        "size": (1024, 1024),
        "steps": 12,
        "guidance": 0.0,
        "prior_timesteps": WUERSTCHEN_LEVELS,
        "prior_guidance": 4.0,
    },
    "stable-cascade": {
        "pipeline": "StableCascadeDecoderPipeline",
        "model": "stabilityai/stable-cascade",
        "variant": "bf16",
        "prior_pipeline": "StableCascadePriorPipeline",
        "prior_model": "stabilityai/stable-cascade-prior",
        "size": (1024, 1024),
        "steps": 10,
        "guidance": 0.0,
        "prior_steps": 20,
        "prior_guidance": 4.0,
    },
}


def with_preset(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The settings of a preset with some changed. A local folder as `model` has no variants unless named."""
    if name not in PRESETS:
        raise SettingsError(f'There is no preset "{name}": {nearest(name, PRESETS)}.')
    settings = {**PRESETS[name], **changes}
    if "model" in changes and "variant" not in changes:
        settings.pop("variant", None)
    return settings


@dataclass
class DiffusersSystem:
    """One pipeline, or a prior and a decoder one after the other."""

    name: str
    settings: DiffusersSettings
    preset: str = ""
    _pipe: Any = field(default=None, repr=False)
    _prior: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        has_prior = self.settings.prior_pipeline is not None
        stray = [key for key in LENT if getattr(self.settings, key) is not None and not has_prior]
        if stray:
            raise SettingsError(f'The system "{self.name}" has {stray[0]}, but no prior_pipeline.')
        if has_prior != (self.settings.prior_model is not None):
            raise SettingsError(f'The system "{self.name}" needs both prior_pipeline and prior_model.')

    @property
    def chunk(self) -> int:
        return self.settings.batch

    def describe(self) -> dict[str, Any]:
        told = self.settings.model_dump(mode="json", exclude_defaults=True)
        return {"kind": "diffusers", **({"preset": self.preset} if self.preset else {}), **told}

    def load(self) -> None:
        s = self.settings
        if s.prior_pipeline is not None and s.prior_model is not None:
            self._prior = self._open(s.prior_pipeline, s.prior_model)
        self._pipe = self._open(s.pipeline, s.model)

    def draw(self, tasks: Sequence[Task]) -> Iterator[Drawn]:
        for start in range(0, len(tasks), self.settings.batch):
            together = tasks[start : start + self.settings.batch]
            for task, image in zip(together, self._pictures(together), strict=True):
                yield Drawn(task, image.convert("RGB"), self._metadata(task))

    def close(self) -> None:
        self._pipe = self._prior = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _pictures(self, tasks: Sequence[Task]) -> list[Any]:
        s = self.settings
        prompts = [task.prompt for task in tasks]
        # Every picture has a generator of its own, on the CPU, so that neither batch nor device changes it.
        generators = [torch.Generator("cpu").manual_seed(task.seed) for task in tasks]
        said: dict[str, Any] = {"prompt": prompts, "generator": generators}
        if s.negative:
            said["negative_prompt"] = [s.negative] * len(prompts)
        size = {} if s.size is None else {"width": s.size[0], "height": s.size[1]}
        final = {"num_inference_steps": s.steps, "guidance_scale": s.guidance}
        if self._prior is None:
            return list(self._pipe(**said, **size, **_given(final), **s.arguments).images)
        levels = None if s.prior_timesteps is None else list(s.prior_timesteps)
        first = {
            "num_inference_steps": s.prior_steps,
            "guidance_scale": s.prior_guidance,
            "timesteps": levels,
        }
        embeddings = self._prior(**said, **size, **_given(first)).image_embeddings
        embeddings = embeddings.to(self._pipe.dtype)
        return list(self._pipe(image_embeddings=embeddings, **said, **_given(final), **s.arguments).images)

    def _open(self, kind: str, model: str) -> Any:
        """A pipeline loaded the ordinary way, on its device, without progress bars."""
        s = self.settings
        diffusers = _diffusers()
        pipeline = getattr(diffusers, kind, None)
        if pipeline is None or not hasattr(pipeline, "from_pretrained"):
            raise SettingsError(f'diffusers {diffusers.__version__} has no pipeline "{kind}".')
        device = choose_device(s.device)
        options: dict[str, Any] = {"torch_dtype": choose_dtype(s.dtype, device)}
        if s.variant is not None:
            options["variant"] = s.variant
        try:
            pipe = pipeline.from_pretrained(model, **options)
        except (OSError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"diffusers cannot load {kind} from {model}: {reason}") from error
        pipe.set_progress_bar_config(disable=True)
        if s.offload and device.type != "cpu":
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
        return pipe

    def _metadata(self, task: Task) -> dict[str, Any]:
        settings = {**self.describe(), "diffusers": _diffusers().__version__}
        return {"version": __version__, "prompt": task.prompt, "seed": task.seed, "settings": settings}


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _diffusers() -> Any:
    """The module, with the name under which published repositories know Würstchen's classes.

    Their model_index.json says ["wuerstchen", "PaellaVQModel"]; diffusers 0.42 has moved that folder.
    """
    try:
        import diffusers
        from diffusers import pipelines
    except ImportError:
        raise MissingExtra("diffusers", "compare", "A pipeline of diffusers as a system") from None
    if not hasattr(pipelines, "wuerstchen"):
        try:
            from diffusers.pipelines.deprecated import wuerstchen

            pipelines.wuerstchen = wuerstchen  # type: ignore[attr-defined]
        except ImportError:
            return diffusers  # a version without it: its own message will say so
    return diffusers
