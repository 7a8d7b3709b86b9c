"""The semantic encoder and the previewer: official layout, sizes, training mode, precisions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from triptych.models.semantic import (
    PREVIEWER,
    SEMANTIC,
    ConvBlock,
    Previewer,
    SemanticConfig,
    SemanticEncoder,
    Stage,
    normalise,
)

MANIFESTS = Path(__file__).parents[1] / "reference" / "manifests"


def pixels(height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("effnet_encoder", lambda: SemanticEncoder(SEMANTIC["full"])),
        ("previewer", lambda: Previewer(PREVIEWER["full"])),
    ],
)
def test_names_and_shapes_are_the_official_ones(name: str, build: object) -> None:
    with torch.device("meta"):
        network = build()
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == manifest


@pytest.mark.parametrize("size", ["mini", "tiny"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96), (100, 70)])
@torch.no_grad()
def test_small_sizes_make_the_same_latents_grid(size: str, height: int, width: int) -> None:
    network = SemanticEncoder(SEMANTIC[size]).eval()
    assert network.config.stride == SEMANTIC["full"].stride == 32
    latents = network(pixels(height, width))
    assert latents.shape == (2, 16, -(-height // 32), -(-width // 32))
    preview = Previewer(PREVIEWER[size]).eval()(latents)
    assert preview.shape == (2, 3, 8 * latents.shape[2], 8 * latents.shape[3])


@torch.no_grad()
def test_forward_normalises_by_itself() -> None:
    network = SemanticEncoder(SEMANTIC["tiny"]).eval()
    x = pixels(64, 64)
    assert torch.equal(network(x), network.encode_normalised(normalise(x)))
    grey = normalise(torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 2, 2))
    assert torch.equal(grey, torch.zeros(1, 3, 2, 2))


def test_training_mode_gives_unit_latents() -> None:
    latents = SemanticEncoder(SEMANTIC["tiny"]).train()(pixels(96, 96, count=8))
    assert latents.mean((0, 2, 3)).abs().max() < 1e-5
    assert (latents.var((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-2


def test_stochastic_depth_drops_samples_only_in_training() -> None:
    torch.manual_seed(0)
    block = ConvBlock(Stage("fused", 2, 3, 1, 4, 1), before=4, stride=1, drop=0.5)
    x = torch.randn(64, 4, 5, 5)
    block.eval()
    assert torch.equal(block(x), block(x))
    block.train()
    dropped = (block(x) == x).flatten(1).all(1)
    assert 10 < int(dropped.sum()) < 54
    kept = block(x) - x
    assert kept.flatten(1).abs().sum(1).count_nonzero() not in (0, 64)


def test_drop_probability_grows_with_depth() -> None:
    with torch.device("meta"):
        network = SemanticEncoder(SEMANTIC["full"])
    drops = [module.drop for module in network.modules() if isinstance(module, ConvBlock)]
    assert len(drops) == 40
    assert drops == pytest.approx([0.2 * index / 40 for index in range(40)])


def test_config_survives_json() -> None:
    config = SEMANTIC["mini"]
    again = SemanticConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert hash(again) == hash(config)


def test_unknown_stage_is_named() -> None:
    with pytest.raises(ValueError, match=r"dense.*fused"):
        SemanticConfig(stages=(Stage("dense", 1, 3, 1, 8, 1),))


def test_the_pair_learns_one_batch() -> None:
    torch.manual_seed(0)
    encoder, previewer = SemanticEncoder(SEMANTIC["tiny"]).train(), Previewer(PREVIEWER["tiny"]).train()
    optimiser = torch.optim.AdamW([*encoder.parameters(), *previewer.parameters()], lr=5e-3)
    x = F.interpolate(pixels(2, 2, count=4), scale_factor=32, mode="bilinear")
    small = F.avg_pool2d(x, 4)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = F.mse_loss(previewer(encoder(x)), small)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_every_precision_is_finite_at_full_size(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder, previewer = SemanticEncoder(SEMANTIC["full"]), Previewer(PREVIEWER["full"])
    x = pixels(64, 64)
    # Fresh statistics are not those of the activations; a few passes in training mode make them so.
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5
    for _ in range(5):
        encoder.train()(x)
    encoder.eval(), previewer.eval()
    latents = encoder(x)
    preview = previewer(latents)
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 0.03}[dtype]
    for network, given, expected in ((encoder, x, latents), (previewer, latents.to(dtype), preview)):
        got = network.to(dtype)(given)
        assert got.dtype == dtype
        assert got.isfinite().all()
        assert (got.float() - expected).abs().max() < bound * expected.abs().max()
