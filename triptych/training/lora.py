"""Teaching Stage C (and B) a subject or a style: small changes of a frozen base, and a word for it.

The changes are peft's (LoRA, DoRA, rsLoRA, LoHa, LoKr), put into the base network's own layers; a learned
token stands in the text tower's input. Only these learn, and only these are kept by the run. What other
prompts draw is held in place by prior preservation [Ruiz 2023, DreamBooth, eq. 2]: pictures that the base
drew itself, on which the changed network must go on answering what the base answers.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from triptych.checkpoints.catalog import ModelFiles, find_model
from triptych.checkpoints.files import PartInfo
from triptych.checkpoints.load import load_part
from triptych.checkpoints.lora import GATE, STUDENT, STUDENT_SETTINGS, Lora
from triptych.checkpoints.lora_keys import matrices, split_name
from triptych.checkpoints.lora_write import write_lora
from triptych.conditioning.encode import TextEncoder
from triptych.data.batches import BatchPlan, draws
from triptych.diffusion.loss import AdaptiveWeight
from triptych.errors import MissingExtra, SettingsError
from triptych.models.lora import Change, TokenTable
from triptych.training.checkpointing import store_base
from triptych.training.config import LoraSettings, RunSettings
from triptych.training.distil import distil_loss
from triptych.training.draws import Draws
from triptych.training.encoders import Encoded, Encoders, encode_pictures, load_encoders, shrink_mask
from triptych.training.prior import gated, open_prior, prior_loss
from triptych.training.recipes import (
    open_diffusion_cache,
    sample_stage_c,
    stage_b_loss,
    stage_c_loss,
)
from triptych.training.sources import Pictures
from triptych.training.task import Losses, Task

WORDING = 5  # what a draw is for, after those of data/batches.py and sources.py
PRIOR_PLACES = 2**32  # prior samples draw beside the pictures of a batch, never like them


class Learned(nn.Module):
    """Everything that learns, as one module: the very parameters that stand in networks and text tower."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = list(parameters)
        self.values = nn.ParameterList(parameters.values())

    def named(self) -> dict[str, Tensor]:
        """Parameters by their names inside the networks."""
        return dict(zip(self.names, self.values, strict=True))


@dataclasses.dataclass
class Base:
    """The frozen networks with adapters in them, and the text encoder that knows the new token."""

    networks: dict[str, nn.Module]
    infos: dict[str, PartInfo]
    encoders: Encoders
    table: TokenTable | None
    scale: float  # of every change, when it is written
    files: ModelFiles


def lora_task(
    settings: RunSettings, pictures: Pictures, device: torch.device, progress: Callable[[int, int], None]
) -> Task:
    """Adapters and a token on a frozen base. Raises MissingExtra without peft."""
    own = settings.lora
    files = find_model(own.model)
    settings = following(settings, files)
    base = build_base(settings, files, device)
    learned = Learned(learning(base))
    text = base.encoders.text
    assert text is not None
    captions = [pictures.source.captions(number) for number in range(len(pictures.source))]
    needed = needed_parts(own)
    cache = open_diffusion_cache(settings, pictures, base.encoders, needed, device, progress)
    if cache is not None:
        base.encoders.release()
    prior = None
    if own.prior:
        size = drawn_size(base, settings.data.size)
        prior = open_prior(settings, text, size, device, progress)
    adaptive = AdaptiveWeight()

    def load(plan: BatchPlan, places: Sequence[int]) -> tuple[BatchPlan, Sequence[int], Any]:
        return plan, places, None if cache else pictures.load(plan, places)

    def loss(player: str, batch: Any, noise: Draws, step: int) -> Losses:
        plan, places, read = batch
        samples = [plan.samples[place] for place in places]
        told = [
            worded(pictures, captions[s], plan.step, place) for s, place in zip(samples, places, strict=True)
        ]
        hidden, pooled = text.encode_with_gradient(told)
        if cache is not None:
            latents_c = cache.stack("c", samples)
            latents_b = cache.stack("b", samples) if "stage_b" in own.parts else None
            mask = cache.masks(samples)
        else:
            latents_c, latents_b, _ = encode_pictures(base.encoders, read.pixels.to(device))
            mask = None if read.mask is None else shrink_mask(read.mask)
        encoded = Encoded(latents_c, latents_b, hidden, pooled, None, mask)
        losses = None
        for part in own.parts:
            loss_of: Any = stage_c_loss if part == "stage_c" else stage_b_loss
            loss_of = loss_of if settings.distil.kind == "none" else distil_loss
            network = base.networks[part]
            one = loss_of(settings, network, encoded, noise, adaptive, base.encoders, device)
            losses = one if losses is None else dataclasses.replace(losses, total=losses.total + one.total)
        assert losses is not None
        if prior is not None:
            apart = Draws(settings.seed, step, [PRIOR_PLACES + place for place in places])
            held = prior_loss(base.networks, prior, apart, device)
            terms = {"prior": held.detach()}
            losses = dataclasses.replace(losses, total=losses.total + own.prior * held, terms=terms)
        return losses

    def sample(trained: dict[str, nn.Module], out: Path) -> Image.Image | None:
        if "stage_c" not in own.parts:
            return None
        network: Callable[..., Tensor] = base.networks["stage_c"]
        if is_gated(own):
            token = token_name(settings.name)
            network = gated(base.networks["stage_c"], [token in text for text in settings.sample_prompts])
        with shown(learned, trained["lora"]), torch.no_grad():
            return sample_stage_c(settings, network, base.encoders, pictures, device)

    def info(part: str, network: nn.Module) -> PartInfo:
        return lora_info(settings, base)

    def write(out: Path, part: str, network: nn.Module, stated: PartInfo) -> None:
        name = settings.name or "lora"
        write_lora(out / f"{name}.safetensors", as_lora(settings, base, network, stated), own.layout)

    return Task(
        {"lora": learned}, pictures.order(cache.buckets if cache else None), load, loss, info, sample,
        players={"lora": ["lora"]}, tables={"adaptive": adaptive},
        skipped=pictures.skipped, key_of=pictures.source.key, write=write,
        trunks=[*base.networks.values(), text.tower],  # type: ignore[list-item]
    )  # fmt: skip


def following(settings: RunSettings, files: ModelFiles) -> RunSettings:
    """The settings with what the base decides: its parts, prediction and sampling defaults."""
    from triptych.checkpoints.load import describe_part

    if settings.lora.token and not settings.name:
        raise SettingsError("A learned token needs a name for the run: give --name, or name in the file.")
    stated = describe_part(files.stage_c, "stage_c").settings
    parts = {part: str(getattr(files, part)) for part in ("stage_a", "semantic", "text_encoder", "previewer")
             if getattr(files, part) is not None}  # fmt: skip
    diffusion = settings.diffusion.model_copy(
        update={"prediction": stated["prediction"], "sampling": {**stated, **settings.diffusion.sampling}}
    )
    return settings.model_copy(
        update={"parts": settings.parts.model_copy(update=parts), "diffusion": diffusion}
    )


def needed_parts(own: LoraSettings) -> list[str]:
    return ["semantic", "text_encoder", *(["stage_a"] if "stage_b" in own.parts else [])]


def build_base(settings: RunSettings, files: ModelFiles, device: torch.device) -> Base:
    """Frozen networks held as `lora.base` says, adapters in float32."""
    own = settings.lora
    encoders = load_encoders(settings.parts, needed_parts(own), device, as_stored=own.base != "float32")
    assert encoders.text is not None
    networks: dict[str, nn.Module] = {}
    infos: dict[str, PartInfo] = {}
    scale = 1.0
    for part in own.parts:
        dtype = torch.float32 if own.base == "float32" else None  # else as stored, and mapped where it can be
        network, infos[part] = load_part(getattr(files, part), part, device=device, dtype=dtype)
        network.requires_grad_(False).eval()
        scale = inject(network, own, part)
        if own.base != "float32":
            store_base(network, own.base)
        networks[part] = network.to(device)
    for parameter in encoders.text.tower.parameters():
        parameter.requires_grad_(False)
    if own.base != "float32":
        store_base(encoders.text.tower, own.base)  # type: ignore[arg-type]
    table = teach(encoders.text, own, settings.name) if own.token else None
    return Base(networks, infos, encoders, table, scale, files)


def inject(network: nn.Module, own: LoraSettings, part: str) -> float:
    """Put peft's adapters on the chosen matrices of a network; returns the scale of each change."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # peft looks for it, and it tells of GPU extensions
    try:
        import peft
    except ImportError:
        raise MissingExtra("peft", "train", "Training a LoRA") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    targets = [name for name in matrices(shapes, shapes) if any(word in name for word in own.modules)]
    if not targets:
        raise SettingsError(f"lora.modules = {list(own.modules)}: no matrix of {part} has such a name.")
    alpha: Any = own.alpha  # peft's hint says int, its arithmetic takes any number
    common: dict[str, Any] = {"r": own.rank, "target_modules": targets}
    if own.kind == "loha":
        config: Any = peft.LoHaConfig(**common, alpha=alpha, module_dropout=own.dropout)
    elif own.kind == "lokr":
        config = peft.LoKrConfig(**common, alpha=alpha, module_dropout=own.dropout)
    else:
        config = peft.LoraConfig(
            **common, lora_alpha=alpha, lora_dropout=own.dropout, use_dora=own.kind == "dora",
            use_rslora=own.kind == "rslora",
        )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, network)
    return own.alpha / (own.rank**0.5 if own.kind == "rslora" else own.rank)


def teach(text: TextEncoder, own: LoraSettings, name: str) -> TokenTable:
    """Make the text encoder know `[name]`, starting from a word."""
    start = text.token_vectors(own.word)
    if not len(start):
        raise SettingsError(f'lora.word = "{own.word}": a token starts from a word, and this is none.')
    vectors = start.mean(0, keepdim=True).repeat(own.token_vectors, 1)
    if own.token_vectors > 1:  # alike vectors would learn alike
        generator = torch.Generator().manual_seed(0)
        vectors = vectors + 0.01 * torch.randn(vectors.shape, generator=generator).to(vectors)
    table = text.learn({token_name(name): vectors})
    assert table is not None
    return table


def token_name(name: str) -> str:
    """What the token of a run is called in prompts."""
    return f"[{name}]"


def learning(base: Base) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    found: dict[str, nn.Parameter] = {}
    for part, network in base.networks.items():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                found[f"{part}.{name}"] = parameter
    if base.table is not None:
        base.table.vectors.requires_grad_(True)
        found["token"] = base.table.vectors
    return found


def worded(pictures: Pictures, captions: Sequence[str], step: int, place: int) -> str:
    """What is told of a picture: one of its captions with the token before it, or one of the templates."""
    settings, own = pictures.settings, pictures.settings.lora
    token = token_name(settings.name) if own.token else ""
    first, second = draws(settings.seed, step, WORDING, place, count=2)
    given = [caption for caption in captions if caption]
    if given:
        caption = pictures.rearranged(given[int(first * len(given))], step, place)
        return caption if not token or token in caption else own.caption.format(token=token, caption=caption)
    return own.templates[int(second * len(own.templates))].format(token=token or own.word)


def is_gated(own: LoraSettings) -> bool:
    """Whether the changes act on prompts with the token only."""
    return own.token and own.gate


def drawn_size(base: Base, side: int) -> tuple[int, int]:
    """The size in pixels at which the base draws latents like those of training pictures of `side`."""
    stated = next(iter(base.infos.values())).settings
    drawn = side * float(stated.get("pixels_per_latent", 32)) / 32
    drawn = max(128, round(drawn / 64) * 64)
    return int(drawn), int(drawn)


@contextmanager
def shown(learned: Learned, average: nn.Module) -> Iterator[None]:
    """The networks with the averaged values in place of those that learn."""
    values = [value.detach().clone() for value in learned.values]
    with torch.no_grad():
        for value, other in zip(learned.values, average.values, strict=True):  # type: ignore[arg-type, call-overload]
            value.copy_(other)
        try:
            yield
        finally:
            for value, kept in zip(learned.values, values, strict=True):
                value.copy_(kept)


# The file.


def lora_info(settings: RunSettings, base: Base) -> PartInfo:
    """What the file says of itself; licence and notice are the base's, with the run's own added."""
    own = settings.lora
    stated = next(iter(base.infos.values()))
    licences = dict.fromkeys(text for text in (base.files.licence, settings.licence) if text)
    notices = dict.fromkeys(text for text in (base.files.notice, settings.notice) if text)
    told = {"base": own.model, "kind": own.kind, "rank": own.rank, "modules": list(own.modules)}
    if own.token:
        told |= {"token": token_name(settings.name), "word": own.word, GATE: own.gate}
    if settings.distil.kind != "none":
        told |= {"distilled": settings.distil.kind, "guidance": settings.distil.guidance}
        decided = ("guidance",) if settings.distil.kind == "guidance" else STUDENT_SETTINGS
        told[STUDENT] = {name: settings.diffusion.sampling[name] for name in decided}
    return PartInfo(
        "lora", settings=told, recipe=settings.name or settings.recipe, licence="; ".join(licences),
        notice=" ".join(notices), size=stated.size,
    )  # fmt: skip


def as_lora(settings: RunSettings, base: Base, network: nn.Module, stated: PartInfo) -> Lora:
    """Peft's parameters as changes of our weights, and the token."""
    assert isinstance(network, Learned)
    factors: dict[tuple[str, str], dict[str, Tensor]] = {}
    tokens: dict[str, Tensor] = {}
    kinds: set[str] = set()
    for name, tensor in network.named().items():
        if name == "token":
            tokens[token_name(settings.name)] = tensor.detach()
            continue
        part, _, rest = name.partition(".")
        split = split_name(rest)
        assert split is not None, name
        module, kind, factor = split
        kinds |= {kind} - {""}
        factors.setdefault((part, module), {})[factor] = (
            tensor.detach().flatten(1) if tensor.ndim > 2 else tensor.detach()
        )
    (kind,) = kinds
    changes: dict[str, list[Change]] = {}
    for (part, module), own in factors.items():
        magnitude = own.pop("magnitude", None)
        length = None if magnitude is None else magnitude.reshape(-1, 1)
        change = Change(module, kind, own, base.scale, None, length)  # type: ignore[arg-type]
        changes.setdefault(part, []).append(change)
    return Lora(changes, tokens, info=stated)
