"""The settings of a training run: one TOML file, checked once, unknown keys refused.

`{here}` in a path stands for the folder of the TOML file, `{out}` for the run's output folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from triptych.data.shapes import KINDS, LARGE_SHARE, Kind
from triptych.errors import SettingsError, nearest
from triptych.training.optim import EmaSettings, OptimSettings
from triptych.training.rules import conflicts

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RecipeName = Literal["stage_a", "semantic", "image_encoder", "stage_b", "stage_c", "lora", "controlnet"]


class Settings(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(Settings):
    """The pictures of a run."""

    shards: tuple[str, ...] = Field((), description="tar shards or folders of captioned pictures")
    share_alike: bool = Field(False, description="use pictures under share-alike licences too")
    repeat: int = Field(1, ge=1, description="how often the shards appear beside the drawn shapes")
    shapes: int = Field(0, ge=0, description="number of procedural shapes pictures")
    shapes_seed: int = Field(0, ge=0, description="seed of the first one")
    shapes_large: float = Field(LARGE_SHARE, ge=0, le=1, description="share of large objects among them")
    shapes_kinds: dict[Kind, PositiveFloat] = Field(
        KINDS, min_length=1, description="how often each kind of drawn picture, as relative weights"
    )
    size: int = Field(256, ge=32, description="side of the square that gives the area of every canvas")
    ratios: tuple[float, ...] = Field((1.0,), description="aspect ratios width / height; inverses are added")
    canvases: tuple[tuple[int, int], ...] = Field(
        (), description="further canvases, [width, height], to which pictures are brought by force"
    )
    canvas_share: float = Field(0.2, gt=0, lt=1, description="share of pictures on those canvases")
    factor: int = Field(32, ge=4, description="canvas sides are multiples of this")
    random_share: float = Field(0.05, ge=0, le=1, description="share of pictures sent to any canvas")
    random_crop: bool = Field(True, description="crop at random, not at the centre")
    zoom: float = Field(1.0, ge=1, description="crop from pictures resized to this many times the canvas")
    captions: int = Field(
        100, ge=1, description="at most this many captions of a picture, the main one first"
    )
    main_caption: float = Field(0.5, ge=0, le=1, description="how often the main caption is chosen")
    shuffle_tags: bool = Field(False, description="tags of a caption, separated by commas, in any order")
    keep_tags: int = Field(0, ge=0, description="so many tags at its beginning stay where they are")
    drop_tags: float = Field(0.0, ge=0, lt=1, description="share of the other tags left out")
    prototypes: bool = Field(
        False, description="Stage C's guess learns the picture that a sample's JSON names as `prototype`"
    )
    cache: str = Field("", description="folder for latents and embeddings made once, before training")
    readers: int = Field(1, ge=0, description="batches read ahead in the background")


class PartsSettings(Settings):
    """Weight files of frozen parts; a name such as "mini" takes the part of that model."""

    stage_a: str = Field("mini", description="Stage A, for Stage B")
    stage_c: str = Field("mini", description="the frozen Stage C of a ControlNet")
    semantic: str = Field("mini", description="semantic encoder, for Stages B and C")
    previewer: str = Field("mini", description="previewer, for the sample grids of Stage C")
    text_encoder: str = Field("mini", description="text encoder")
    image_encoder: str | None = Field(None, description="image encoder; none: Stage C learns from text alone")
    offload: bool = Field(
        False, description="frozen towers stay in their mapped files, a layer at a time on the device"
    )


class AutoencoderSettings(Settings):
    """Stage A, and the semantic encoder with its previewer."""

    quantised: float = Field(1.0, ge=0, le=1, description="share of samples decoded from codes (Stage A)")
    l1: float = Field(1.0, ge=0, description="weight of the absolute error")
    l2: float = Field(1.0, ge=0, description="weight of the squared error")
    codebook: float = Field(1.0, ge=0, description="weight of the codebook and commitment loss")
    restart_codes: int = Field(0, ge=0, description="steps between moves of unused codes; 0 never")
    adversarial: float = Field(0.0, ge=0, description="weight of the discriminator's judgement")
    adversarial_start: int = Field(0, ge=0, description="step at which the discriminator joins")
    discriminator: str = Field("mini", description="size of the discriminator")
    latent_noise: float = Field(0.0, ge=0, description="deviation of noise added to semantic latents")
    decoder_only: bool = Field(
        False, description="Stage A: encoder and codes of `init` stay, so latents made by them stay right"
    )


class ImageEncoderSettings(Settings):
    """The small image encoder."""

    look: float = Field(0.0, ge=0, description="weight of giving a small view back from the embedding")


class DiffusionSettings(Settings):
    """Stages B and C: what is predicted, how it is weighted, what is dropped."""

    prediction: Literal["eps", "v", "x0"] = Field("eps", description="what the network answers")
    weight: Literal["p2", "adaptive", "min_snr", "none"] = Field(
        "p2", description="loss weight over noise levels"
    )
    time_power: float = Field(
        1.0,
        gt=0,
        le=1,
        description="training times are drawn as uniform^this: below 1 more of the noisy ones",
    )
    offset_noise: float = Field(0.0, ge=0, description="weight of noise that is constant per channel")
    pyramid_noise: bool = Field(True, description="coarse structure in Stage B's noise, as published")
    masked: bool = Field(
        False, description="learn where masks (KEY-mask.png, or a picture's opacity) are white"
    )
    unmasked: float = Field(0.0, ge=0, le=1, description="weight of the rest of such a picture")
    drop_text: float = Field(0.05, ge=0, le=1, description="share of captions replaced by the empty one")
    keep_image: float = Field(0.1, ge=0, le=1, description="share of samples that see the image embedding")
    picture_only: float = Field(
        0.0, ge=0, le=1,
        description="Stage C: share told by the image embedding alone, in the caption's place too",
    )  # fmt: skip
    grounding: float = Field(
        0.0, ge=0,
        description="Stage C: weight of naming what stands where, on drawn shapes, from inside the network",
    )  # fmt: skip
    guess: float = Field(
        1.0, ge=0, description="Stage C: weight of its guess's own error, where the network has one"
    )
    guess_noise: float = Field(
        0.0, ge=0,
        description="Stage C: most noise on the text its guess sees, so that like words guess alike",
    )  # fmt: skip
    guess_rewording: float = Field(
        0.0, ge=0,
        description="Stage C: at most that much of what another caption changes, on the text its guess sees",
    )  # fmt: skip
    image_from_text: bool = Field(
        False, description="without an image encoder: the caption's vector stands in"
    )
    drop_semantic: float = Field(0.1, ge=0, le=1, description="share of samples without semantic latents")
    semantic_noise: float = Field(
        0.0, ge=0, description="Stage B: deviation, at most, of noise on the semantic latents it is told"
    )
    semantic_scale: tuple[float, float] = Field((0.5, 1.0), description="Stage B: range of f, see the docs")
    train_text: bool = Field(False, description="Stage C: let the text encoder learn too")
    sampling: dict[str, Any] = Field(default_factory=dict, description="defaults written for generation")


class ControlSettings(Settings):
    """What a ControlNet is told (recipe "controlnet")."""

    hint: str = Field("canny", description="kind of hint, such as canny, inpainting, super_resolution")
    pretrained: bool = Field(True, description="its EfficientNet begins as the semantic encoder's")
    other_caption: float = Field(
        0.0, ge=0, le=1, description="share of samples told another picture's caption: the hint outranks it"
    )
    box_share: float = Field(0.0, ge=0, le=1, description="inpainting: share of masks that are boxes")
    shrink: Literal["nearest", "area"] = Field(
        "nearest", description="super-resolution: how pictures are made small; nearest as published"
    )
    saliency: str | None = Field(None, description="inpainting: a saliency network; none: contrast")
    pidinet: str | None = Field(None, description="soft edges: the edge network")
    face_model: str | None = Field(None, description="identity: an ONNX file that reads faces")
    face_detector: str | None = Field(None, description="identity: an ONNX file that finds faces")


class LoraSettings(Settings):
    """Teaching a base network a subject or a style (recipe "lora")."""

    model: str = Field("mini", description="the model that is taught; gives all frozen parts")
    parts: tuple[Literal["stage_c", "stage_b"], ...] = Field(("stage_c",), min_length=1)
    base: Literal["float32", "bfloat16", "int8"] = Field("float32", description="how frozen weights are held")
    kind: Literal["lora", "dora", "rslora", "loha", "lokr"] = Field("lora", description="of change, by peft")
    rank: int = Field(16, ge=1, description="inner side of each change")
    alpha: float = Field(16.0, gt=0, description="its strength is alpha / rank (rslora: / sqrt(rank))")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the change while training")
    modules: tuple[str, ...] = Field(("attn",), min_length=1, description="parts of names of the matrices")
    token: bool = Field(True, description="also learn a token [name] for prompts")
    gate: bool = Field(
        True, description="act on prompts with the token only; other programs than triptych do not know this"
    )
    token_vectors: int = Field(1, ge=1, le=32, description="vectors the token stands for")
    word: str = Field("object", description="the word the token starts from, and of what the subject is one")
    templates: tuple[str, ...] = Field(
        ("a picture of {token}", "a drawing of {token}", "{token}"), min_length=1,
        description="captions of pictures that have none",
    )  # fmt: skip
    caption: str = Field("{token}, {caption}", description="caption of a picture that has one")
    prior: float = Field(1.0, ge=0, description="weight of prior preservation; 0 leaves it out")
    prior_pictures: int = Field(16, ge=1, description="pictures the base draws for it, before training")
    prior_prompts: tuple[str, ...] = Field(
        ("a picture of {word}", "a red apple", "a blue circle", "a green tree", "a yellow star", "a house",
         "a smiling face", ""), min_length=1, description="what it draws them for",
    )  # fmt: skip
    check: int = Field(
        0, ge=0, description="pictures a prompt drawn at the end, to measure what was taught; 0: none"
    )
    layout: Literal["kohya", "onetrainer", "comfyui", "diffusers", "official"] = Field(
        "kohya", description="names in the file that is written"
    )


class DistilSettings(Settings):
    """A LoRA of Stage C that learns from its own base (recipe "lora")."""

    kind: Literal["none", "guidance", "consistency"] = Field(
        "none", description="what is learned instead of pictures: see training/distil.py"
    )
    guidance: float = Field(4.0, ge=1, description="guidance of the base that is learned from")
    levels: int = Field(20, ge=2, description="consistency: noise levels on the base's path")


class RunSettings(Settings):
    """Everything a run depends on."""

    recipe: RecipeName = Field(description="what is trained")
    name: str = Field("", description="shown in logs and stored in the weights")
    out: str = Field(description="folder for checkpoints, weights, log and samples")
    size: str = Field("tiny", description="network size: a preset of its file")
    network: dict[str, Any] = Field(
        default_factory=dict, description="fields of the network's config to change"
    )
    init: str | None = Field(None, description="folder with weights to start from (say, an EMA)")
    seed: int = Field(0, ge=0)
    steps: int = Field(1000, ge=1, description="updates")
    batch: int = Field(16, ge=1, description="pictures per update, over all processes")
    accumulate: int = Field(1, ge=1, description="parts in which a batch is worked through")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of matrix products")
    weights: Literal["float32", "bfloat16"] = Field(
        "float32", description="how trained weights are held; bfloat16 is rounded at random"
    )
    checkpointing: bool = Field(False, description="recompute blocks in the backward pass, for memory")
    not_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="after a loss or gradient that is no number: end the run, or leave that update out",
    )
    shard: bool = Field(False, description="split weights and moments over processes (FSDP2); Stages B and C")
    device: str = Field("auto", description="auto, cpu, cuda or mps")
    log_every: int = Field(10, ge=1)
    save_every: int = Field(1000, ge=1, description="updates between checkpoints")
    sample_every: int = Field(1000, ge=1, description="updates between sample grids")
    sample_prompts: tuple[str, ...] = Field(
        ("a red apple", "a blue circle", "a smiling face", "a green tree")
    )
    tensorboard: bool = Field(True, description="also write TensorBoard files, where it is installed")
    store: Literal["float32", "bfloat16", "float16", "int8"] = Field(
        "float32", description="format of weights written; int8: rows of matrices with a scale each"
    )
    licence: str = Field("", description="licence of the weights written")
    notice: str = Field("", description="attribution that travels with them")
    optim: OptimSettings = OptimSettings()
    ema: EmaSettings = EmaSettings()
    data: DataSettings = DataSettings()
    parts: PartsSettings = PartsSettings()
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    image_encoder: ImageEncoderSettings = ImageEncoderSettings()
    diffusion: DiffusionSettings = DiffusionSettings()
    control: ControlSettings = ControlSettings()
    lora: LoraSettings = LoraSettings()
    distil: DistilSettings = DistilSettings()

    @model_validator(mode="after")
    def _savings_go_together(self) -> RunSettings:
        for conflict in conflicts(self):
            raise ValueError(conflict)
        return self


def read_settings(path: Path, changes: Sequence[str] = ()) -> RunSettings:
    """Settings from a TOML file, then `key=value` changes (dots reach into tables, values are TOML).

    Raises SettingsError naming the file, the key, what is wrong with it and the nearest known key.
    """
    raw = read_toml(path, changes)
    out = raw.get("out")
    places = {"here": str(path.parent), "out": str(out)}
    raw = substitute(raw, places)
    if isinstance(raw.get("sample_prompts"), list):  # a recipe for any name shows its token by {token}
        token = f"[{raw.get('name', '')}]"
        raw["sample_prompts"] = [str(prompt).replace("{token}", token) for prompt in raw["sample_prompts"]]
    return check_settings(raw, str(path))


def shipped_recipe(name: str) -> Path:
    """The file of a recipe that comes with the package. Raises SettingsError naming those that do."""
    folder = Path(__file__).parent.parent / "recipes"
    known = sorted(path.stem for path in folder.glob("*.toml"))
    if name not in known:
        raise SettingsError(f'--recipe "{name}": {nearest(name, known)}.')
    return folder / f"{name}.toml"


def read_toml(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of a TOML file after `key=value` changes, not yet checked. Raises SettingsError naming the
    file and what is wrong with it."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path} does not exist.") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}.") from None
    for change in changes:
        apply_change(raw, change)
    return raw


def apply_change(raw: dict[str, Any], change: str) -> None:
    """Set one `key=value` in nested tables; a value that is not TOML is taken as a string."""
    name, separator, text = change.partition("=")
    if not separator or not name.strip():
        raise SettingsError(f'--set "{change}" is not of the form key=value, for example optim.lr=3e-4.')
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, last = name.strip().split(".")
    for table in tables:
        raw = raw.setdefault(table, {})
        if not isinstance(raw, dict):
            raise SettingsError(f'--set "{change}": "{table}" is a value, not a table.')
    raw[last] = value


def substitute(value: Any, places: dict[str, str]) -> Any:
    """Fill {here} and {out} into all strings."""
    if isinstance(value, str):
        for name, place in places.items():
            value = value.replace("{" + name + "}", place)
        return value
    if isinstance(value, list):
        return [substitute(item, places) for item in value]
    if isinstance(value, dict):
        return {name: substitute(item, places) for name, item in value.items()}
    return value


def check_settings(raw: dict[str, Any], origin: str) -> RunSettings:
    """Validate; the first mistake becomes one sentence."""
    try:
        return RunSettings.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            *tables, last = (str(part) for part in first["loc"])
            known = known_keys(tables)
            raise SettingsError(f'{origin}: unknown key "{name}"; {nearest(last, known)}.') from None
        if first["type"] == "missing":
            raise SettingsError(f'{origin}: "{name}" is missing.') from None
        if not name:  # settings that are right one by one
            raise SettingsError(f"{origin}: {first['ctx']['error']}.") from None
        got = repr(first.get("input"))[:80]
        raise SettingsError(f'{origin}: "{name}" is {got}: {first["msg"]}.') from None


def known_keys(tables: Sequence[str]) -> list[str]:
    """The keys of a table, by its path."""
    model: Any = RunSettings
    for table in tables:
        model = model.model_fields[table].annotation
    return list(model.model_fields)
