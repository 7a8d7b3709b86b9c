"""diffusers pipelines at tiny size with random weights, saved in the hub's layout."""

from __future__ import annotations

import json
from pathlib import Path

import published_folders
import torch

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
    "projection_dim": 32,
}


def write_sdxl(folder: Path, seed: int = 0) -> Path:
    """StableDiffusionXLPipeline: the class of SDXL, SDXL Turbo and Playground v2."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    published_folders.write_tokenizer(folder / "made_tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "made_tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=32 + 6 * 8,
            cross_attention_dim=64,
        )
        vae = AutoencoderKL(
            block_out_channels=[32, 64],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            sample_size=32,
        )
        pipeline = StableDiffusionXLPipeline(
            unet=unet,
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
            ),
            vae=vae,
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT, hidden_act="gelu")),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, hidden_act="gelu")),
            tokenizer_2=tokenizer,
        )
    pipeline.save_pretrained(folder)
    return folder


def write_wuerstchen(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Würstchen v2's two repositories, decoder and prior, with the class paths of the published files."""
    from diffusers import DDPMWuerstchenScheduler
    from diffusers.pipelines.deprecated import wuerstchen
    from transformers import CLIPTextConfig, CLIPTextModel

    decoder, prior = folder / "wuerstchen", folder / "wuerstchen-prior"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = CLIPTextModel(CLIPTextConfig(**TEXT, hidden_act="gelu"))
        models = {
            decoder / "vqgan": wuerstchen.PaellaVQModel(
                embed_dim=8, bottleneck_blocks=1, num_vq_embeddings=16
            ),
            decoder / "decoder": wuerstchen.WuerstchenDiffNeXt(
                c_cond=32,
                c_hidden=[32, 64],
                nhead=[-1, 2],
                blocks=[1, 1],
                level_config=["CT", "CTA"],
                inject_effnet=[False, True],
                effnet_embd=16,
                clip_embd=32,
            ),
            prior / "prior": wuerstchen.WuerstchenPrior(c_in=16, c=32, c_cond=32, c_r=16, depth=1, nhead=2),
        }
    for place, model in models.items():
        model.save_pretrained(place)
    for root in (decoder, prior):
        text.save_pretrained(root / "text_encoder")
        published_folders.write_tokenizer(root / "tokenizer")
        DDPMWuerstchenScheduler().save_pretrained(root / "scheduler")
    shared = {
        "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizerFast"],
    }
    _index(
        decoder,
        _class_name="WuerstchenDecoderPipeline",
        **shared,
        decoder=["wuerstchen", "WuerstchenDiffNeXt"],
        vqgan=["wuerstchen", "PaellaVQModel"],
        latent_dim_scale=10.67,
    )
    prior_class = ["wuerstchen", "WuerstchenPrior"]
    _index(prior, _class_name="WuerstchenPriorPipeline", **shared, prior=prior_class, latent_mean=42.0)
    return decoder, prior


def _index(folder: Path, **entries: object) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_diffusers_version": "0.21.0", **entries}))
