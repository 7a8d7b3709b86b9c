"""Recorded Stage A and its discriminator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from triptych.models.stage_a import Discriminator, DiscriminatorConfig, StageA, StageAConfig


def build_stage_a(golden: Any) -> StageA:
    """The recorded Stage A with its weights, in eval mode."""
    config = golden.config
    network = StageA(
        StageAConfig(
            levels=config["levels"],
            width=config["c_hidden"],
            bottleneck_blocks=config["bottleneck_blocks"],
            latent_channels=config["c_latent"],
            codes=config["codebook_size"],
            scale=config["scale_factor"],
        )
    )
    network.load_state_dict(golden.under("w."))
    return network.eval()


def check_stage_a(golden: Any) -> dict[str, Tensor]:
    """Encode, quantise, decode; the first layers; one training step's outputs, gradients and statistics."""
    network = build_stage_a(golden)
    pixels = golden["in.pixels"]
    quantised = network.encode_quantised(pixels)
    entry = network.in_block(pixels)
    out = {
        "out.entry": entry,
        "out.first_mixing_block": network.down_blocks[0](entry),
        "out.encode": network.encode(pixels),
        "out.encode_scaled": quantised.latents,
        "out.quantized": quantised.codes,
        "out.indices": quantised.indices,
        "out.vq_loss": quantised.loss,
        "out.decode": network.decode(golden["in.latents"]),
        "out.roundtrip": network.decode(quantised.latents),
        "out.roundtrip_quantized": network.decode(quantised.codes),
    }
    network.train()
    leaf = pixels.clone().requires_grad_()
    roundtrip, quantised = network(leaf)
    loss = (roundtrip - pixels).square().mean() + quantised.loss
    loss.backward()
    out |= {"out.train_roundtrip": roundtrip, "out.train_loss": loss, "grad.pixels": leaf.grad}
    parameters = dict(network.named_parameters())
    for name in golden.under("grad."):
        if name in parameters:
            out[f"grad.{name}"] = parameters[name].grad
    buffers = dict(network.named_buffers())
    return out | {f"out.train_buffer.{name}": buffers[name] for name in golden.under("out.train_buffer.")}


def check_discriminator(golden: Any) -> dict[str, Tensor]:
    """Discriminators by name, some with a condition vector."""
    out = {}
    for name, config in golden.config.items():
        network = Discriminator(
            DiscriminatorConfig(
                in_channels=config["c_in"],
                cond_width=config["c_cond"],
                width=config["c_hidden"],
                depth=config["depth"],
            )
        )
        network.load_state_dict(golden.under(f"w.{name}."))
        network.eval()  # the stored vectors of the spectral norm are used as they are
        out[f"out.{name}"] = network(golden[f"in.{name}.pixels"], golden.get(f"in.{name}.cond"))
    return out


CHECKS = {"stage_a": check_stage_a, "stage_a_discriminator": check_discriminator}
