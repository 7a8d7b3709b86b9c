"""The JSON files of diffusers' model folders, from our configurations; constants as in the hub's folders."""

from __future__ import annotations

from typing import Any

from triptych.errors import CheckpointError

DIFFUSERS_VERSION = "0.27.0.dev0"  # what the hub's folders say
BLOCKS = {"C": "SDCascadeResBlock", "T": "SDCascadeTimestepBlock", "A": "SDCascadeAttnBlock"}
SCHEDULER = {
    "_class_name": "DDPMWuerstchenScheduler",
    "_diffusers_version": DIFFUSERS_VERSION,
    "s": 0.008,
    "scaler": 1.0,
}
# Where diffusers 0.42 has Stage A's class. The hub's folders say "wuerstchen", its place before it was
# deprecated, which 0.42 refuses; the module itself is accepted because the pipeline has imported it.
PAELLA_MODULE = "diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model"
DECODER_INDEX: dict[str, Any] = {
    "_class_name": "StableCascadeDecoderPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "decoder": ["diffusers", "StableCascadeUNet"],
    "latent_dim_scale": 10.67,
    "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizerFast"],
    "vqgan": [PAELLA_MODULE, "PaellaVQModel"],
}
PRIOR_INDEX: dict[str, Any] = {
    "_class_name": "StableCascadePriorPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "prior": ["diffusers", "StableCascadeUNet"],
    "resolution_multiple": 42.67,
    "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizerFast"],
}
IMAGE_PROCESSOR = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 224},
}


def model_config(part: str, config: Any) -> dict[str, Any]:
    """config.json of one part's folder: Stage A is a PaellaVQModel, Stages B and C a StableCascadeUNet.

    Raises `CheckpointError` for parts and blocks that diffusers does not have.
    """
    if part == "stage_a":
        return {
            "_class_name": "PaellaVQModel",
            "_diffusers_version": DIFFUSERS_VERSION,
            "bottleneck_blocks": config.bottleneck_blocks,
            "embed_dim": config.width,
            "in_channels": 3,
            "latent_channels": config.latent_channels,
            "levels": config.levels,
            "num_vq_embeddings": config.codes,
            "out_channels": 3,
            # The hub's folder says 0.3764, Würstchen v2's value, and decodes Cascade's latents too small.
            "scale_factor": config.scale,
            "up_down_scale_factor": 2,
        }
    if part not in ("stage_b", "stage_c"):
        raise CheckpointError(f"diffusers has no form of {part}.")
    unknown = set("".join(config.patterns)) - set(BLOCKS)
    if unknown:
        raise CheckpointError(f"diffusers has no blocks of kind {', '.join(sorted(unknown))}.")
    return {**_unet(config), **(_stage_c(config) if part == "stage_c" else _stage_b(config))}


def _unet(config: Any) -> dict[str, Any]:
    same_attention = len(set(config.self_attention)) == 1
    return {
        "_class_name": "StableCascadeUNet",
        "_diffusers_version": DIFFUSERS_VERSION,
        "block_out_channels": list(config.widths),
        "block_types_per_layer": [[BLOCKS[kind] for kind in pattern] for pattern in config.patterns],
        "clip_seq": config.tokens_per_vector,
        "clip_text_pooled_in_channels": config.pooled_width,
        "conditioning_dim": config.cond_width,
        "down_blocks_repeat_mappers": list(config.down_repeats),
        "down_num_layers_per_block": list(config.down_blocks),
        "dropout": list(config.dropout),
        "in_channels": config.channels,
        "kernel_size": config.kernel,
        "num_attention_heads": list(config.heads),
        "out_channels": config.channels,
        "patch_size": config.patch,
        "self_attn": config.self_attention[0] if same_attention else list(config.self_attention),
        "timestep_conditioning_type": list(config.extra_times),
        "timestep_ratio_embedding_dim": config.time_size,
        "up_blocks_repeat_mappers": list(config.up_repeats),
        "up_num_layers_per_block": list(config.up_blocks),
    }


def _stage_c(config: Any) -> dict[str, Any]:
    if config.pooled_modulation or config.positions or config.guess:
        raise CheckpointError(
            "diffusers has no Stage C whose time blocks see the pooled text, or whose positions are told "
            "where they are or what the text lets guess, as this one's."
        )
    return {
        "clip_image_in_channels": config.image_width,
        "clip_text_in_channels": config.text_width,
        "effnet_in_channels": None,
        "pixel_mapper_in_channels": None,
        "switch_level": list(config.level_switch),
    }


def _stage_b(config: Any) -> dict[str, Any]:
    if config.semantic_unfold:
        raise CheckpointError("diffusers has no Stage B that unfolds its semantic latents, as this one does.")
    return {
        "clip_image_in_channels": None,
        "clip_text_in_channels": None,
        "effnet_in_channels": config.semantic_channels,
        "pixel_mapper_in_channels": config.pixel_channels,
        "switch_level": None,
    }


def text_config(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json of a CLIP text tower, from its shapes (transformers names); heads of 64 channels."""
    try:
        vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
        return {
            "architectures": ["CLIPTextModelWithProjection"],
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "hidden_act": "gelu",
            "hidden_size": width,
            "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
            "model_type": "clip_text_model",
            "num_attention_heads": max(1, width // 64),
            "num_hidden_layers": _layers(shapes, "text_model."),
            "pad_token_id": 1,
            "projection_dim": shapes["text_projection.weight"][0],
            "vocab_size": vocabulary,
        }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"The text tower in the file is not CLIP's ({error}).") from None


def vision_config(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json of a CLIP image tower, from its shapes (transformers names); heads of 64 channels."""
    try:
        width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
        positions = shapes["vision_model.embeddings.position_embedding.weight"][0]
        return {
            "architectures": ["CLIPVisionModelWithProjection"],
            "hidden_act": "quick_gelu",
            "hidden_size": width,
            "image_size": round((positions - 1) ** 0.5) * patch,
            "intermediate_size": shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
            "model_type": "clip_vision_model",
            "num_attention_heads": max(1, width // 64),
            "num_hidden_layers": _layers(shapes, "vision_model."),
            "patch_size": patch,
            "projection_dim": shapes["visual_projection.weight"][0],
        }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"The image tower in the file is not CLIP's ({error}).") from None


def _layers(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    start = f"{prefix}encoder.layers."
    return len({name.removeprefix(start).split(".")[0] for name in shapes if name.startswith(start)})
