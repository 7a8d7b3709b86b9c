"""Tiny cascades with random weights in the published layouts, for tests that have no network.

    write_official(folder)      stage_c.safetensors, ..., text_encoder/, tokenizer/, image_encoder/
    write_diffusers(folder)     stable-cascade/{decoder,vqgan,...} and stable-cascade-prior/{prior,...}
    write_comfyui(folder)       stable_cascade_stage_c.safetensors, stable_cascade_stage_b.safetensors

The three hold the same weights for the same `seed`. Networks are as wide as needed for the layouts to be
recognised, heads have 64 channels, text and image towers are CLIP's classes at tiny size. Nothing is imported
from the writers under test: names are converted here by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from triptych.models.semantic import SEMANTIC, Previewer, PreviewerConfig, SemanticEncoder
from triptych.models.stage_a import StageA, StageAConfig
from triptych.models.stage_b import StageB, StageBConfig
from triptych.models.stage_c import StageC, StageCConfig

TEXT_WIDTH, IMAGE_WIDTH = 32, 24

STAGE_A = StageAConfig(width=16, bottleneck_blocks=1, codes=32)
STAGE_B = StageBConfig(
    widths=(16, 64),
    heads=(0, 1),
    patterns=("CT", "CTA"),
    down_blocks=(1, 1),
    up_blocks=(1, 1),
    down_repeats=(1, 1),
    up_repeats=(2, 1),
    cond_width=32,
    pooled_width=TEXT_WIDTH,
    dropout=(0.0, 0.1),
    self_attention=(True, True),
)
STAGE_C = StageCConfig(
    widths=(64, 64),
    heads=(1, 1),
    cond_width=32,
    down_blocks=(1, 1),
    up_blocks=(1, 1),
    text_width=TEXT_WIDTH,
    pooled_width=TEXT_WIDTH,
    image_width=IMAGE_WIDTH,
)
PREVIEWER = PreviewerConfig(width=32)
NETWORKS = {"stage_a": (StageA, STAGE_A), "stage_b": (StageB, STAGE_B), "stage_c": (StageC, STAGE_C)}


def networks(seed: int = 0) -> dict[str, nn.Module]:
    """Stage A, B, C and the previewer with random weights, no layer left at zero, in eval mode."""
    made: dict[str, nn.Module] = {}
    with torch.random.fork_rng():
        for index, (part, (kind, config)) in enumerate(
            {**NETWORKS, "previewer": (Previewer, PREVIEWER)}.items()
        ):
            torch.manual_seed(1000 * seed + index)
            module = kind(config).eval()
            randomise(module)
            made[part] = module
    return made


def randomise(module: nn.Module) -> None:
    """Fill the parameters that are born zero, so that every weight of the network matters."""
    for parameter in module.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names to those of the official files."""
    return {name.replace("attn.in_proj.", "attn.in_proj_"): t.contiguous() for name, t in state.items()}


def diffusers(part: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names to diffusers', attention split in three."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(.*\.attention)\.attn\.in_proj\.(weight|bias)", name)
        if found:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{found[1]}.to_{letter}.{found[2]}"] = third.contiguous()
            continue
        name = name.replace(".attention.attn.out_proj.", ".attention.to_out.0.")
        if part == "stage_b":
            name = re.sub(r"^clip_mapper\.", "clip_txt_pooled_mapper.", name)
        if part == "stage_a":
            name = name.replace("vquantizer.codebook", "vquantizer.embedding")
        renamed[name] = tensor.contiguous()
    return renamed


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer that knows single bytes only; start 49406 and end 49407 as published."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    folder.mkdir(parents=True)
    letters = _byte_letters()
    vocabulary = {letter: index for index, letter in enumerate([*letters, *(x + "</w>" for x in letters)])}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    words = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=[], **words, pad_token="<|endoftext|>", model_max_length=77
    )
    tokenizer.save_pretrained(folder)


def _byte_letters() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(len(rest))]


def write_text_encoder(folder: Path, seed: int = 0) -> None:
    """A one-layer CLIP text tower with the published vocabulary size."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        projection_dim=TEXT_WIDTH,
        hidden_act="gelu",
        vocab_size=49408,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2000 + seed)
        CLIPTextModelWithProjection(config).save_pretrained(folder)


def write_image_encoder(folder: Path, seed: int = 0) -> None:
    """A one-layer CLIP image tower for 224 pixels."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        projection_dim=IMAGE_WIDTH,
        image_size=224,
        patch_size=56,
        hidden_act="quick_gelu",
    )
    with torch.random.fork_rng():
        torch.manual_seed(3000 + seed)
        CLIPVisionModelWithProjection(config).save_pretrained(folder)


def write_semantic(path: Path, seed: int = 0) -> None:
    """The full-size encoder (20M parameters): its strides are not in its shapes, so only it is recognised."""
    with torch.random.fork_rng():
        torch.manual_seed(4000 + seed)
        save_file(SemanticEncoder(SEMANTIC["full"]).half().state_dict(), path, {"format": "pt"})


def write_official(folder: Path, seed: int = 0, *, semantic: bool = False) -> Path:
    """The official files at the root of a folder, towers and tokenizer in subfolders. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, module in networks(seed).items():
        save_file(official(module.state_dict()), folder / f"{part}.safetensors")
    if semantic:
        write_semantic(folder / "effnet_encoder.safetensors", seed)
    write_text_encoder(folder / "text_encoder", seed)
    write_tokenizer(folder / "tokenizer")
    write_image_encoder(folder / "image_encoder", seed)
    return folder


def write_diffusers(folder: Path, seed: int = 0) -> Path:
    """Both repositories in diffusers' layout, written by diffusers' own classes. Returns `folder`."""
    from diffusers import DDPMWuerstchenScheduler, StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    decoder, prior = folder / "stable-cascade", folder / "stable-cascade-prior"
    made = networks(seed)
    vqgan = PaellaVQModel(embed_dim=16, bottleneck_blocks=1, num_vq_embeddings=32)  # scale_factor 0.3764
    for model, part, place in (
        (_unet(StableCascadeUNet, STAGE_B), "stage_b", decoder / "decoder"),
        (_unet(StableCascadeUNet, STAGE_C), "stage_c", prior / "prior"),
        (vqgan, "stage_a", decoder / "vqgan"),
    ):
        model.load_state_dict(diffusers(part, made[part].state_dict()), strict=True)
        model.save_pretrained(place)
    for root in (decoder, prior):
        write_text_encoder(root / "text_encoder", seed)
        write_tokenizer(root / "tokenizer")
        DDPMWuerstchenScheduler().save_pretrained(root / "scheduler")
    write_image_encoder(prior / "image_encoder", seed)
    _write_indices(decoder, prior)
    return folder


def _unet(kind: type, config: StageBConfig | StageCConfig) -> nn.Module:
    names = {"C": "SDCascadeResBlock", "T": "SDCascadeTimestepBlock", "A": "SDCascadeAttnBlock"}
    inputs = (
        {"effnet_in_channels": 16, "pixel_mapper_in_channels": 3, "switch_level": None}
        if isinstance(config, StageBConfig)
        else {
            "clip_text_in_channels": TEXT_WIDTH,
            "clip_image_in_channels": IMAGE_WIDTH,
            "switch_level": (False,),
        }
    )
    return kind(
        in_channels=config.channels,
        out_channels=config.channels,
        patch_size=config.patch,
        conditioning_dim=config.cond_width,
        block_out_channels=config.widths,
        num_attention_heads=config.heads,
        down_num_layers_per_block=config.down_blocks,
        up_num_layers_per_block=config.up_blocks,
        down_blocks_repeat_mappers=config.down_repeats,
        up_blocks_repeat_mappers=config.up_repeats,
        block_types_per_layer=tuple(tuple(names[kind] for kind in p) for p in config.patterns),
        clip_text_pooled_in_channels=TEXT_WIDTH,
        clip_seq=config.tokens_per_vector,
        dropout=config.dropout,
        timestep_conditioning_type=config.extra_times,
        **inputs,
    )


def _write_indices(decoder: Path, prior: Path) -> None:
    shared = {
        "_diffusers_version": "0.27.0.dev0",
        "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizerFast"],
    }
    unet = ["diffusers", "StableCascadeUNet"]
    (decoder / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "StableCascadeDecoderPipeline",
                **shared,
                "decoder": unet,
                "vqgan": ["wuerstchen", "PaellaVQModel"],
                "latent_dim_scale": 10.67,
            }
        )
    )
    (prior / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "StableCascadePriorPipeline",
                **shared,
                "prior": unet,
                "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
                "feature_extractor": [None, None],
                "resolution_multiple": 42.67,
            }
        )
    )


def write_comfyui(folder: Path, seed: int = 0) -> Path:
    """ComfyUI's two single files: Stage C with split attention, Stage B with packed. Returns `folder`."""
    from safetensors.torch import load_file

    folder.mkdir(parents=True, exist_ok=True)
    made = networks(seed)
    write_text_encoder(folder / "text", seed)
    write_image_encoder(folder / "image", seed)
    text = load_file(folder / "text" / "model.safetensors")
    image = load_file(folder / "image" / "model.safetensors")
    text = {f"text_encoder.clip_g.transformer.{name}": tensor for name, tensor in text.items()}
    stage_c = {}
    for name, tensor in official(made["stage_c"].state_dict()).items():
        packed = re.fullmatch(r"(.*\.attn)\.in_proj_(weight|bias)", name)
        for letter, third in zip("qkv", tensor.chunk(3), strict=True) if packed else ():
            stage_c[f"model.diffusion_model.{packed[1]}.to_{letter}.{packed[2]}"] = third.contiguous()
        if not packed:
            stage_c[f"model.diffusion_model.{name}"] = tensor
    stage_c |= {f"vae.previewer.{name}": t for name, t in made["previewer"].state_dict().items()}
    stage_c |= {f"clip_l_vision.{name}": tensor for name, tensor in image.items()}
    stage_b = {f"model.diffusion_model.{n}": t for n, t in official(made["stage_b"].state_dict()).items()}
    stage_b |= {f"vae.{name}": tensor for name, tensor in made["stage_a"].state_dict().items()}
    save_file({**stage_c, **text}, folder / "stable_cascade_stage_c.safetensors")
    save_file({**stage_b, **text}, folder / "stable_cascade_stage_b.safetensors")
    for tower in ("text", "image"):
        for file in (folder / tower).iterdir():
            file.unlink()
        (folder / tower).rmdir()
    return folder


def write_hub_cache(cache: Path) -> tuple[Path, Path]:
    """The lite cascade as the hub's own cache keeps it. Returns the snapshots of both repositories."""
    snapshots = []
    for repository in ("stable-cascade", "stable-cascade-prior"):
        folder = cache / f"models--stabilityai--{repository}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        snapshots.append(write_official(folder / "snapshots" / ("0" * 40), semantic=True))
    snapshot, prior = snapshots
    for part in ("stage_c", "stage_b"):
        (snapshot / f"{part}.safetensors").rename(snapshot / f"{part}_lite_bf16.safetensors")
    for root, tower in ((snapshot, "text_encoder"), (prior, "image_encoder")):
        (root / tower / "model.safetensors").rename(root / tower / "model.bf16.safetensors")
    (snapshot / "tokenizer" / "special_tokens_map.json").write_text("{}")
    return snapshot, prior
