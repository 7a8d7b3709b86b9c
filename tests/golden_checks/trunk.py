"""Recorded blocks and whole networks of Stages B and C."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from triptych.checkpoints.keys import names_from_layout, names_in_layout
from triptych.diffusion.loss import per_sample_loss
from triptych.models.blocks import (
    AttentionBlock,
    ConvBlock,
    FeedForwardBlock,
    GlobalResponseNorm,
    TimeBlock,
    embed_time,
    resize,
)
from triptych.models.stage_b import StageB, StageBConfig
from triptych.models.stage_c import StageC, StageCConfig


def our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names with the one rename: the packed attention matrix is a linear layer."""
    return {name.replace(".attn.in_proj_", ".attn.in_proj."): tensor for name, tensor in weights.items()}


def shared_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `TrunkConfig` from the official names of a recording."""
    levels = len(config["c_hidden"])
    attention = config["self_attn"]
    return {
        "channels": config["c_in"],
        "patch": config["patch_size"],
        "widths": config["c_hidden"],
        "heads": [max(heads, 0) for heads in config["nhead"]],
        "patterns": config["level_config"],
        "down_blocks": config["blocks"][0],
        "up_blocks": config["blocks"][1],
        "down_repeats": config["block_repeat"][0],
        "up_repeats": config["block_repeat"][1],
        "cond_width": config["c_cond"],
        "tokens_per_vector": config["c_clip_seq"],
        "time_size": config["c_r"],
        "extra_times": config["t_conds"],
        "kernel": config["kernel_size"],
        "dropout": config["dropout"],
        "self_attention": attention if isinstance(attention, list) else [attention] * levels,
    }


def stage_b_config(config: dict[str, Any]) -> StageBConfig:
    return StageBConfig(
        **shared_fields(config),
        pooled_width=config["c_clip"],
        semantic_channels=config["c_effnet"],
        pixel_channels=config["c_pixels"],
    )


def stage_c_config(config: dict[str, Any]) -> StageCConfig:
    return StageCConfig(
        **shared_fields(config),
        text_width=config["c_clip_text"],
        pooled_width=config["c_clip_text_pooled"],
        image_width=config["c_clip_img"],
        level_switch=tuple(config["switch_level"]),
    )


def build_stage_b(golden: Any) -> StageB:
    """The recorded Stage B with its weights, in eval mode."""
    network = StageB(stage_b_config(golden.config))
    network.load_state_dict(our_names(golden.under("w.")))
    return network.eval()


def build_stage_c(golden: Any, **changes: Any) -> StageC:
    """The recorded Stage C with its weights, in eval mode; `changes` are other values of config fields."""
    network = StageC(replace(stage_c_config(golden.config), **changes))
    network.load_state_dict(our_names(golden.under("w.")))
    return network.eval()


def check_time_embedding(golden: Any) -> dict[str, Tensor]:
    return {f"out.size_{size}": embed_time(golden["in.t"], size) for size in golden.config["sizes"]}


def check_blocks(golden: Any) -> dict[str, Tensor]:
    """Each block alone; gradients of sum(out * cos(out))."""
    config = golden.config
    width, heads = config["width"], config["heads"]
    attention = (width, config["token_width"])
    skip, time, tokens = golden["in.skip"], golden["in.time_vector"], golden["in.tokens"]
    cases: dict[str, tuple[nn.Module, Tensor, tuple[Tensor, ...]]] = {
        "C": (ConvBlock(width), golden["in.x"], ()),
        "C_skip": (ConvBlock(width, skip.shape[1]), golden["in.x"], (skip,)),
        "F": (FeedForwardBlock(width), golden["in.x"], ()),
        "T": (TimeBlock(width, config["time_size"], config["time_extras"]), golden["in.x"], (time,)),
        "A": (AttentionBlock(*attention, heads["A"]), golden["in.x"], (tokens,)),
        "A_cross_only": (
            AttentionBlock(*attention, heads["A_cross_only"], self_attention=False),
            golden["in.x"],
            (tokens,),
        ),
        "grn": (GlobalResponseNorm(golden["in.grn"].shape[-1]), golden["in.grn"], ()),
    }
    out = {}
    for name, (block, x, others) in cases.items():
        block.load_state_dict(our_names(golden.under(f"w.{name}.")))
        x = x.clone().requires_grad_()
        result = block(x, *others)
        (result * result.cos()).sum().backward()
        out |= {f"out.{name}": result, f"grad.{name}.x": x.grad}
        parameters = dict(block.named_parameters())
        for wanted in golden.under(f"grad.{name}."):
            if wanted in parameters:
                out[f"grad.{name}.{wanted}"] = parameters[wanted].grad
    return out


@torch.no_grad()
def check_stage_b(golden: Any) -> dict[str, Tensor]:
    """Stage B with every combination of inputs, and what happens inside it."""
    network = build_stage_b(golden)
    x, t, semantic, pooled, pixels = (
        golden[f"in.{name}"] for name in ("x", "t", "semantic", "text_pooled", "pixels")
    )
    time_vector = network.time_vector(t, [None] * len(network.config.extra_times))
    tokens = network.embed_conditioning(pooled)
    entry_full = network.embed_inputs(x, semantic)
    entry = network.embedding(x)
    out = {
        "out.time_vector": time_vector,
        "out.tokens": tokens,
        "out.entry": entry,
        "out.entry_plus_semantic": entry + network.effnet_mapper(resize(semantic, tuple(entry.shape[-2:]))),
        "out.entry_full": entry_full,
        "out.default": network(x, t, semantic, pooled),
        "out.with_pixels": network(x, t, semantic, pooled, pixels=pixels),
        "out.with_sca": network(x, t, semantic, pooled, sca=golden["in.sca"]),
        "out.zero_semantic": network(x, t, torch.zeros_like(semantic), pooled),
        "out.aligned": network(golden["in.aligned_x"], t[:1], semantic[:1], pooled[:1]),
    }
    levels = range(len(network.config.widths))
    for level, output in enumerate(network.run_down(entry_full, time_vector, tokens, None, None, levels)):
        out[f"out.down_level_{level}"] = output
    return out


def check_stage_c(golden: Any) -> dict[str, Tensor]:
    """Stage C with every combination of inputs, what happens inside it, and one training step's gradients."""
    network = build_stage_c(golden)
    base = [golden[f"in.{name}"] for name in ("x", "t", "text_hidden", "text_pooled")]
    image = golden["in.image_embed"]
    numbered = {int(index): tensor for index, tensor in golden.under("in.residual.").items()}
    residuals = [numbered.get(index) for index in range(max(numbered) + 1)]
    with torch.no_grad():
        time_vector = network.time_vector(base[1], [None] * len(network.config.extra_times))
        tokens = network.embed_conditioning(*base[2:], image)
        out = {
            "out.time_vector": time_vector,
            "out.tokens": tokens,
            "out.default": network(*base, image),
            "out.no_image": network(*base),
            "out.two_images": network(*base, golden["in.image_embed_two"]),
            "out.with_sca_crp": network(*base, image, sca=golden["in.sca"], crp=golden["in.crp"]),
            "out.with_residuals": network(*base, image, residuals),
        }
        entry, levels = network.embedding(base[0]), range(len(network.config.widths))
        for level, output in enumerate(network.run_down(entry, time_vector, tokens, None, None, levels)):
            out[f"out.down_level_{level}"] = output

    network = build_stage_c(golden, dropout=(0.0,) * len(golden.config["dropout"])).train()
    losses = per_sample_loss(network(*base, image), golden["in.target"])
    loss = (golden["in.loss_weight"] * losses).mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name in golden.under("grad."):
        (ours,) = our_names({name: golden[f"grad.{name}"]})
        out[f"grad.{name}"] = gradients[ours]
    out["out.grad_norm"] = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()]))
    return out | {"out.loss": loss, "out.loss_per_sample": losses}


@torch.no_grad()
def check_stage_c_switch(golden: Any) -> dict[str, Tensor]:
    """Stage C with real scaling between its levels, at an odd size."""
    names = ("x", "t", "text_hidden", "text_pooled", "image_embed")
    return {"out.default": build_stage_c(golden)(*(golden[f"in.{name}"] for name in names))}


def check_diffusers_layout(golden: Any) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """The sibling's official weights under diffusers names, and back: the same names, the same values."""
    part = golden.kind.removeprefix("diffusers_layout_")
    official, diffusers = golden.sibling(part).under("w."), golden.under("w.")
    ours = our_names(official)
    written = {}
    for name, theirs in names_in_layout(ours, "diffusers", part).items():
        written |= dict(zip(theirs, ours[name].chunk(len(theirs)), strict=True))
    sources = names_from_layout(diffusers, "diffusers", part)
    read = {name: torch.cat([diffusers[source] for source in names]) for name, names in sources.items()}
    out: dict[str, Tensor | tuple[Tensor, Tensor]] = {f"w.{name}": tensor for name, tensor in written.items()}
    for name in ours.keys() | read.keys():
        nothing = torch.empty(0)
        out[f"read.{name}"] = (read.get(name, nothing), ours.get(name, nothing))
    return out


CHECKS = {
    "blocks": check_blocks,
    "time_embedding": check_time_embedding,
    "stage_b": check_stage_b,
    "stage_c": check_stage_c,
    "stage_c_switch": check_stage_c_switch,
    "diffusers_layout_stage_b": check_diffusers_layout,
    "diffusers_layout_stage_c": check_diffusers_layout,
}
