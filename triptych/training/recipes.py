"""How each part of the cascade is trained: a batch becomes a loss.

`build_task(settings)` makes the task of one of five recipes. Stage A has its own file (two players); the
semantic encoder with its previewer, and the image encoder, learn from pixels; Stages B and C from latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from triptych.checkpoints.files import PartInfo
from triptych.conditioning.encode import TextEncoder
from triptych.conditioning.towers import weight_file
from triptych.data.batches import Batch, BatchPlan
from triptych.diffusion.denoiser import Denoiser, Guidance
from triptych.diffusion.loss import AdaptiveWeight, min_snr_weight, p2_weight, per_sample_loss
from triptych.diffusion.prediction import Prediction, add_noise, offset_noise, pyramid_noise, target
from triptych.diffusion.samplers import SAMPLERS
from triptych.diffusion.schedule import Schedule, training_times
from triptych.errors import SettingsError
from triptych.images import grid, to_images
from triptych.models.image_tower import IMAGE_TOWER, ImageTower
from triptych.models.semantic import (
    PREVIEWER,
    SEMANTIC,
    Previewer,
    PreviewerConfig,
    SemanticConfig,
    SemanticEncoder,
)
from triptych.models.stage_b import STAGE_B, StageB
from triptych.models.stage_c import STAGE_C, StageC
from triptych.training.cache import Cache, open_cache, stack_known
from triptych.training.checkpointing import build_network
from triptych.training.config import DiffusionSettings, RunSettings
from triptych.training.draws import Draws
from triptych.training.encoders import (
    Encoded,
    Encoders,
    encode_pictures,
    frozen,
    load_encoders,
    part_path,
    shrink_mask,
)
from triptych.training.grounding import UNKNOWN, Answer, Grounding, grounding_loss, middle_of, object_map
from triptych.training.guess import BlurredWords, encode_prototypes, guess_loss, no_prototypes
from triptych.training.image_tower import Viewer, embed, embedding_loss, view_loss
from triptych.training.muon import leave_to_adamw
from triptych.training.processes import total
from triptych.training.sources import Pictures
from triptych.training.start import LATENT, following_init, network_config, trained_info
from triptych.training.task import Losses, Task
from triptych.training.text_tower import learning_tower, tower_info
from triptych.training.vqgan import stage_a_task

SAMPLING = {
    "shift": 1.0,
    "steps": 20,
    "guidance": 4.0,
    "rescale": 0.7,
    "sampler": "ddpm",
}  # where nothing is said
WHOLE_BATCH = 2**31  # a place that no sample has, for draws that a batch shares


def build_task(settings: RunSettings, device: torch.device, progress: Callable[[int, int], None]) -> Task:
    """Networks, data and loss of a run. `progress(done, of)` is told how far a cache is."""
    settings = following_init(settings)
    pictures = Pictures(settings)
    if settings.recipe == "lora":
        from triptych.training.lora import lora_task  # it uses what follows here

        return lora_task(settings, pictures, device, progress)
    if settings.recipe == "controlnet":
        from triptych.training.control import controlnet_task  # it uses what follows here

        return controlnet_task(settings, pictures, device, progress)
    if settings.recipe in ("stage_b", "stage_c"):
        return diffusion_task(settings, pictures, device, progress)
    from_pixels = {"stage_a": stage_a_task, "semantic": semantic_task, "image_encoder": image_encoder_task}
    return from_pixels[settings.recipe](settings, pictures, device)


# The semantic encoder and its previewer, an autoencoder.


def previewer_config(settings: RunSettings) -> PreviewerConfig:
    """Fields of `network` are the encoder's."""
    return network_config(settings.model_copy(update={"network": {}}), "previewer", PREVIEWER)  # type: ignore[no-any-return]


def semantic_task(settings: RunSettings, pictures: Pictures, device: torch.device) -> Task:
    """Semantic encoder + previewer, trained together to give a picture of 1/4 its size back.

    Noise on the latents while training makes near latents mean near pictures, which is what a diffusion
    model needs of them.
    """
    weights = settings.autoencoder
    config: SemanticConfig = network_config(settings, "semantic", SEMANTIC)
    networks: dict[str, nn.Module] = {
        "semantic": SemanticEncoder(config).to(device),
        "previewer": Previewer(previewer_config(settings)).to(device),
    }

    def reconstruct(
        trained: dict[str, nn.Module], pixels: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        latents = trained["semantic"](pixels)
        if noise is not None:
            latents = latents + weights.latent_noise * noise
        shown = trained["previewer"](latents)
        return shown, F.interpolate(pixels, size=shown.shape[-2:], mode="area")

    def loss(player: str, batch: Batch, draws: Draws, step: int) -> Losses:
        pixels = batch.pixels.to(device)
        sides = [side // config.stride for side in pixels.shape[-2:]]
        shape = (config.latent_channels, *sides)
        noise = draws.normal(shape).to(device) if weights.latent_noise else None
        shown, wanted = reconstruct(networks, pixels, noise)
        squared, absolute = F.mse_loss(shown, wanted), F.l1_loss(shown, wanted)
        return Losses(
            weights.l2 * squared + weights.l1 * absolute, terms={"psnr": -10 * squared.detach().log10()}
        )

    @torch.no_grad()
    def sample(trained: dict[str, nn.Module], out: Path) -> Image.Image:
        pixels = first_batch(pictures, 8).pixels.to(device)
        shown, wanted = reconstruct(trained, pixels, None)
        return grid(to_images(torch.cat([wanted, shown])), columns=len(pixels))

    def info(part: str, network: nn.Module) -> PartInfo:
        return trained_info(settings, part, network, {})

    return Task(
        networks, pictures.order(), pictures.load, loss, info, sample,
        players={"autoencoder": list(networks)},
        skipped=pictures.skipped, key_of=pictures.source.key,
    )  # fmt: skip


# The small image encoder, towards the text encoder's space.


def image_encoder_task(settings: RunSettings, pictures: Pictures, device: torch.device) -> Task:
    """Image encoder: land near where the text encoder puts the caption, and keep the picture's look."""
    encoders = load_encoders(settings.parts, ["text_encoder"], device)
    assert encoders.text is not None
    tower = ImageTower(network_config(settings, "image_encoder", IMAGE_TOWER)).to(device)
    look = settings.image_encoder.look
    helpers: dict[str, nn.Module] = {"viewer": Viewer(tower.width).to(device)} if look else {}

    def loss(player: str, batch: Batch, draws: Draws, step: int) -> Losses:
        _, pooled = encoders.text.encode(pictures.captions(batch))  # type: ignore[union-attr]
        pixels = batch.pixels.to(device)
        embeds = embed(tower, pixels)
        total = embedding_loss(embeds, pooled.to(device))
        if not look:
            return Losses(total)
        view = view_loss(helpers["viewer"], embeds, pixels)
        return Losses(total + look * view, terms={"caption": total.detach(), "view": view.detach()})

    def info(part: str, network: nn.Module) -> PartInfo:
        return trained_info(settings, part, network, {})

    return Task(
        {"image_encoder": tower}, pictures.order(), pictures.load, loss, info, lambda trained, out: None,
        players={"image_encoder": ["image_encoder", *helpers]}, helpers=helpers,
        skipped=pictures.skipped, key_of=pictures.source.key,
    )  # fmt: skip


# Stages B and C.


@dataclasses.dataclass
class DiffusionBatch:
    """One part of a batch: pictures and captions, or what a cache holds of them."""

    plan: BatchPlan
    places: Sequence[int]
    pictures: Batch | None = None
    captions: list[str] = dataclasses.field(default_factory=list)
    encoded: Encoded | None = None
    prototypes: list[Image.Image | None] = dataclasses.field(default_factory=list)  # [] if unasked
    others: list[str] = dataclasses.field(default_factory=list)  # captions that say the same; [] if unasked


def diffusion_task(
    settings: RunSettings, pictures: Pictures, device: torch.device, progress: Callable[[int, int], None]
) -> Task:
    """Stage B or C on latents of frozen encoders, computed as they come or cached."""
    is_b = settings.recipe == "stage_b"
    needed = ["semantic", "text_encoder", "stage_a" if is_b else "image_encoder"]
    if settings.data.cache and is_b:  # Stage C, after it, finds all of its own in the same cache
        needed.append("image_encoder")
    encoders = load_encoders(settings.parts, needed, device)
    kind, presets = (StageB, STAGE_B) if is_b else (StageC, STAGE_C)
    config = network_config(settings, settings.recipe, presets)
    network: Any = build_network(kind, config, settings, device)
    cache = open_diffusion_cache(settings, pictures, encoders, needed, device, progress)
    if cache is not None and not is_b:  # Stage B shows its samples through them
        encoders.release()
    networks: dict[str, nn.Module] = {settings.recipe: network}
    if settings.diffusion.train_text:
        assert encoders.text is not None
        networks["text_encoder"] = learning_tower(encoders.text)
        encoders.text_learns = True
    adaptive = AdaptiveWeight()
    loss_of = stage_b_loss if is_b else stage_c_loss
    grounding = 0.0 if is_b else settings.diffusion.grounding
    guesses = not is_b and config.guess > 0
    helpers: dict[str, nn.Module] = {}
    if grounding:
        middle = middle_of(network)
        helpers["grounding"] = Grounding(config.widths[-1]).to(device)
    if guesses:
        guess = Answer(network.guess)
        leave_to_adamw(network.guess)
        blur = BlurredWords(network.guess, settings.diffusion.guess_noise, settings.diffusion.guess_rewording)
    rewords = guesses and settings.diffusion.guess_rewording > 0

    def load(plan: BatchPlan, places: Sequence[int]) -> DiffusionBatch:
        if cache is None:
            batch = pictures.load(plan, places)
            asked = [plan.samples[place] for place in places] if guesses and settings.data.prototypes else []
            named = [pictures.source.prototype(sample) for sample in asked]
            texts, same = pictures.captions(batch), []
            if rewords:
                same = [
                    pictures.other_caption(plan, place, text, sample.captions)
                    for place, text, sample in zip(batch.places, texts, batch.samples, strict=True)
                ]
            return DiffusionBatch(plan, places, batch, texts, None, named, same)
        samples = [plan.samples[place] for place in places]
        numbers = [
            pictures.caption_number(plan, place, cache.captions[sample])
            for place, sample in zip(places, samples, strict=True)
        ]
        others = None
        if rewords:
            others = [
                pictures.other_number(plan, place, number, cache.captions[sample])
                for place, number, sample in zip(places, numbers, samples, strict=True)
            ]
        told: list[str] = []
        if pictures.rearranges:  # latents are kept, captions are read as they come
            told = [
                pictures.caption(plan, place, pictures.source.captions(sample))
                for place, sample in zip(places, samples, strict=True)
            ]
        return DiffusionBatch(plan, places, None, told, cache.read(samples, numbers, None, others))

    def loss(player: str, batch: DiffusionBatch, draws: Draws, step: int) -> Losses:
        encoded = batch.encoded or encode_batch(settings, encoders, batch, device)
        if batch.encoded is not None and pictures.rearranges:
            hidden, pooled = encoders.read_text(batch.captions)
            encoded = dataclasses.replace(encoded, text_hidden=hidden, text_pooled=pooled)
        prototype = None
        if guesses:
            if settings.data.prototypes:  # a cache may hold them unasked, or of none of these samples
                prototype = encoded.prototype
                if prototype is None:
                    prototype = no_prototypes(len(encoded.latents_c), network.guess.channels, device)
                prototype = prototype.to(device)
            blur.hear(encoded.text_pooled, encoded.text_other, prototype)
        losses = loss_of(settings, network, encoded, draws, adaptive, encoders, device)
        if grounding and encoded.objects is not None:
            assert middle.map is not None
            named = grounding_loss(helpers["grounding"](middle.map), encoded.objects.to(device))
            losses.total = losses.total + grounding * named
            losses.terms["grounding"] = named.detach()
        if guesses:
            assert guess.map is not None
            own = encoded.latents_c.to(device)
            missed = guess_loss(guess.map, own, prototype, masked(encoded.mask, own, settings.diffusion))
            losses.total = losses.total + settings.diffusion.guess * missed
            losses.terms["guess"] = missed.detach()
        return losses

    @torch.no_grad()
    def sample(trained: dict[str, nn.Module], out: Path) -> Image.Image:
        if is_b:
            return sample_stage_b(settings, trained["stage_b"], encoders, first_batch(pictures, 4), device)
        shown = encoders
        if encoders.text is not None and "text_encoder" in trained:
            text: Any = trained["text_encoder"]
            shown = dataclasses.replace(encoders, text=TextEncoder(text, encoders.text.tokenizer))
        return sample_stage_c(settings, trained["stage_c"], shown, pictures, device)

    def info(part: str, network: nn.Module) -> PartInfo:
        if part == "text_encoder":
            return tower_info(settings)
        side, sampling = settings.data.size, settings.diffusion.sampling
        drawn = {} if is_b else {"default_size": [side, side], "pixels_per_latent": LATENT}
        extra = {"prediction": settings.diffusion.prediction, **SAMPLING, **drawn, **sampling}
        return trained_info(settings, part, network, extra)

    return Task(
        networks, pictures.order(cache.buckets if cache else None),
        load, loss, info, sample,
        players={settings.recipe: [*networks, *helpers]}, helpers=helpers, tables={"adaptive": adaptive},
        skipped=pictures.skipped, key_of=pictures.source.key, trunks=[network],
    )  # fmt: skip


def open_diffusion_cache(
    settings: RunSettings,
    pictures: Pictures,
    encoders: Encoders,
    needed: Sequence[str],
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Cache | None:
    if not settings.data.cache:
        return None
    if settings.recipe == "stage_b" and settings.diffusion.semantic_scale != (1.0, 1.0):
        raise SettingsError(
            "data.cache keeps one set of semantic latents a picture: with it, Stage B needs "
            "diffusion.semantic_scale = [1.0, 1.0]."
        )
    parts = [(part, getattr(settings.parts, part)) for part in needed]
    files = {part: [weight_file(part_path(part, given), part)] for part, given in parts if given is not None}
    for made_by in files.values():
        made_by += [words for path in made_by if (words := path.with_name("tokenizer.json")).is_file()]
    folder = Path(settings.data.cache)
    told_anew = pictures.rearranges or settings.recipe == "lora"  # no text is kept then
    captions = 0 if told_anew else settings.data.captions
    return open_cache(
        folder, pictures.source, pictures.buckets, encoders, files, device, progress, captions,
        settings.data.prototypes,
    )  # fmt: skip


def encode_batch(
    settings: RunSettings, encoders: Encoders, batch: DiffusionBatch, device: torch.device
) -> Encoded:
    """Latents and embeddings of a batch of pictures, computed now."""
    assert batch.pictures is not None
    pixels = batch.pictures.pixels.to(device)
    smaller = None
    if settings.recipe == "stage_b":
        # As published: one factor f ~ U(low, high) for the batch, nearest neighbour, sides in steps of 32.
        low, high = settings.diffusion.semantic_scale
        whole = Draws(settings.seed, batch.plan.step, [WHOLE_BATCH])
        factor = low + (high - low) * float(whole.uniform())
        size = [max(32, int(factor * side / 32) * 32) for side in pixels.shape[-2:]]
        smaller = F.interpolate(pixels, size=size, mode="nearest")
    latents_c, latents_b, image = encode_pictures(encoders, pixels, smaller)
    hidden, pooled = encoders.read_text(batch.captions)
    mask = batch.pictures.mask
    mask = None if mask is None else shrink_mask(mask)
    height, width = latents_c.shape[-2:]
    maps = [object_map(one.meta, one.image.size, (height, width)) for one in batch.pictures.samples]
    prototype = None
    if batch.prototypes:
        prototype = encode_prototypes(encoders.semantic, batch.prototypes, device)
    other = encoders.read_text(batch.others)[1] if batch.others else None
    return Encoded(
        latents_c, latents_b, hidden, pooled, image, mask, stack_known(maps, UNKNOWN), prototype, other
    )  # fmt: skip


def stage_c_loss(
    settings: RunSettings,
    network: Callable[..., Tensor],
    encoded: Encoded,
    draws: Draws,
    adaptive: AdaptiveWeight,
    encoders: Encoders,
    device: torch.device,
) -> Losses:
    """Text dropped to the empty caption with 5 %, the image embedding kept with 10 % as published.

    With `picture_only`, that share of samples is told by its image embedding alone, which takes the place of
    the caption's pooled vector too: what variations without a prompt do where the image encoder lands there.
    """
    diffusion = settings.diffusion
    t = training_times(draws.uniform()) ** diffusion.time_power
    dropped = draws.uniform() < diffusion.drop_text
    keep_image = (draws.uniform() < diffusion.keep_image).to(device)
    alone = draws.uniform() < diffusion.picture_only if diffusion.picture_only else torch.zeros_like(dropped)
    hidden, pooled = drop_text(encoded, dropped | alone, encoders)
    image = encoded.image_embed
    if image is None and diffusion.image_from_text:
        # An image encoder that lands on the captions' pooled vectors can take its place later.
        image = encoded.text_pooled
    if image is not None:
        pooled = torch.where(alone[:, None], image, pooled) if diffusion.picture_only else pooled
        image = image.to(device) * (keep_image | alone.to(device))[:, None]
    x0 = encoded.latents_c.to(device)
    eps = draws.normal(x0.shape[1:])
    eps = offset_noise(eps, draws.normal((x0.shape[1], 1, 1)), diffusion.offset_noise).to(device)
    hidden, pooled = hidden.to(device), pooled.to(device)

    def predict(x: Tensor, time: Tensor) -> Tensor:
        return network(x, time, hidden, pooled, image)

    weigh = masked(encoded.mask, x0, diffusion)
    return diffusion_losses(
        predict, x0, eps, t.to(device), diffusion.prediction, diffusion.weight, adaptive, weigh
    )


def stage_b_loss(
    settings: RunSettings,
    network: StageB,
    encoded: Encoded,
    draws: Draws,
    adaptive: AdaptiveWeight,
    encoders: Encoders,
    device: torch.device,
) -> Losses:
    """Semantic latents dropped to zeros with 10 %, captions with 5 %, pyramid noise as published."""
    diffusion = settings.diffusion
    assert encoded.latents_b is not None
    t = training_times(draws.uniform()) ** diffusion.time_power
    _, pooled = drop_text(encoded, draws.uniform() < diffusion.drop_text, encoders)
    dropped = (draws.uniform() < diffusion.drop_semantic).to(device)
    semantic = encoded.latents_c.to(device)
    if diffusion.semantic_noise:  # Stage C's latents are never perfect: learn to look past small errors
        amount = diffusion.semantic_noise * draws.uniform().to(device)[:, None, None, None]
        semantic = semantic + amount * draws.normal(semantic.shape[1:]).to(device)
    semantic = semantic * (~dropped)[:, None, None, None]
    x0 = encoded.latents_b.to(device)
    shape = tuple(x0.shape[1:])
    eps = pyramid_noise((len(x0), *shape), lambda s: draws.normal(s[1:])) if diffusion.pyramid_noise else None
    eps = (draws.normal(shape) if eps is None else eps).to(device)
    pooled = pooled.to(device)

    def predict(x: Tensor, time: Tensor) -> Tensor:
        return network(x, time, semantic, pooled)

    weigh = masked(encoded.mask, x0, diffusion)
    return diffusion_losses(
        predict, x0, eps, t.to(device), diffusion.prediction, diffusion.weight, adaptive, weigh
    )


def diffusion_losses(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    prediction: Prediction,
    weight: str,
    adaptive: AdaptiveWeight,
    weigh: Tensor | None = None,
) -> Losses:
    """The published objective: squared error of the prediction, weighted by noise level, mean over the batch.

    `predict(x, time)` is told the time that belongs to the noise level; training is never shifted. `weigh`
    (B,1,h,w) says how much each place of a picture counts.
    """
    schedule = Schedule()
    logsnr = schedule.logsnr(t)
    x = add_noise(x0, eps, logsnr)
    predicted = predict(x, schedule.time(logsnr))
    per_sample = per_sample_loss(predicted, target(prediction, x0, eps, logsnr), weigh)
    if weight == "adaptive":
        weights = adaptive(logsnr)
        adaptive.update(logsnr, per_sample, total)
    else:
        weights = loss_weight(weight, prediction, logsnr)
    return Losses((weights * per_sample).mean(), per_sample.detach(), t)


def masked(mask: Tensor | None, like: Tensor, diffusion: DiffusionSettings) -> Tensor | None:
    """How much each place of latents `like` (B,C,h,w) counts, (B,1,h,w): 1 inside the mask, `unmasked`
    outside, and in between where a latent lies on its rim. None where masks are not asked for."""
    if mask is None or not diffusion.masked:
        return None
    inside = F.adaptive_avg_pool2d(mask.to(like), (like.shape[2], like.shape[3]))
    return diffusion.unmasked + (1 - diffusion.unmasked) * inside


def loss_weight(name: str, prediction: Prediction, logsnr: Tensor) -> Tensor:
    """Weights (B,) of samples at logsnr (B,)."""
    if name == "p2":
        return p2_weight(logsnr)
    return min_snr_weight(logsnr, prediction) if name == "min_snr" else torch.ones_like(logsnr)


def drop_text(encoded: Encoded, dropped: Tensor, encoders: Encoders) -> tuple[Tensor, Tensor]:
    """Hidden and pooled text, with the empty caption's where `dropped` (B,) is true."""
    hidden, pooled = encoded.text_hidden, encoded.text_pooled
    if not bool(dropped.any()):
        return hidden, pooled
    assert encoders.text is not None
    windows = hidden.shape[1] // encoders.text.window
    empty_hidden, empty_pooled = encoders.empty_text(windows)
    dropped = dropped.to(hidden.device)
    return (
        torch.where(dropped[:, None, None], empty_hidden, hidden),
        torch.where(dropped[:, None], empty_pooled, pooled),
    )


# Sample grids.


def first_batch(pictures: Pictures, count: int) -> Batch:
    """The first pictures of the run, always the same ones."""
    plan = pictures.order().plan(0)
    return pictures.load(plan, tuple(range(min(count, len(plan.samples)))))


def run_sampler(
    predict: Callable[..., list[Tensor]], shape: tuple[int, ...], settings: RunSettings, device: torch.device
) -> Tensor:
    """x0 of a whole run from fixed noise, with the sampling defaults that the weights will carry."""
    chosen: dict[str, Any] = SAMPLING | settings.diffusion.sampling
    schedule = Schedule(chosen["shift"])
    times, logsnrs = schedule.grid(chosen["steps"])
    guidance = Guidance(chosen["guidance"], chosen["rescale"])
    denoise = Denoiser(predict, schedule, settings.diffusion.prediction, guidance)
    generators = [torch.Generator().manual_seed(row) for row in range(shape[0])]

    def noise(index: int) -> Tensor:
        return torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)

    x0 = None
    for step in SAMPLERS[chosen["sampler"]](denoise, noise(-1), times, logsnrs, noise):
        x0 = step.x0
    assert x0 is not None
    return x0


def sample_stage_c(
    settings: RunSettings,
    network: Callable[..., Tensor],
    encoders: Encoders,
    pictures: Pictures,
    device: torch.device,
) -> Image.Image:
    """The sample prompts as the previewer shows them."""
    assert encoders.text is not None
    prompts = settings.sample_prompts
    hidden, pooled = encoders.text.encode([*prompts, *[""] * len(prompts)])
    side = pictures.settings.data.size // 32

    def predict(x: Tensor, t: Tensor, branches: Sequence[str]) -> list[Tensor]:
        both = len(branches) == 2
        rows = slice(None) if both else slice(0, len(prompts))
        x, t = (torch.cat([x, x]), torch.cat([t, t])) if both else (x, t)
        return list(network(x, t, hidden[rows].to(device), pooled[rows].to(device)).chunk(len(branches)))

    latents = run_sampler(predict, (len(prompts), 16, side, side), settings, device)
    previewer = frozen("previewer", settings.parts.previewer, device)
    return grid(to_images(F.interpolate(previewer(latents), scale_factor=2)), columns=4)


def sample_stage_b(
    settings: RunSettings, network: nn.Module, encoders: Encoders, batch: Batch, device: torch.device
) -> Image.Image:
    """True pictures above what Stages B and A make of their semantic latents."""
    assert encoders.text is not None
    assert encoders.stage_a is not None
    pixels = batch.pixels.to(device)
    latents_c, latents_b, _ = encode_pictures(encoders, pixels)
    assert latents_b is not None
    _, pooled = encoders.text.encode([sample.caption for sample in batch.samples])
    _, empty = encoders.text.encode([""])

    def predict(x: Tensor, t: Tensor, branches: Sequence[str]) -> list[Tensor]:
        outputs = [network(x, t, latents_c, pooled.to(device))]
        if len(branches) == 2:
            nothing = torch.zeros_like(latents_c)
            outputs.append(network(x, t, nothing, empty.expand_as(pooled).to(device)))
        return outputs

    made = run_sampler(predict, tuple(latents_b.shape), settings, device)
    shown = encoders.stage_a.decode(made)  # type: ignore[operator]
    return grid(to_images(torch.cat([pixels, shown])), columns=len(pixels))
