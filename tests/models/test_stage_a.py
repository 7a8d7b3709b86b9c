"""Stage A: official layout, parity with diffusers, the scale, its quantiser, sizes and precisions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triptych.models.stage_a import (
    DISCRIMINATOR,
    STAGE_A,
    Discriminator,
    DiscriminatorConfig,
    StageA,
    StageAConfig,
)

MANIFESTS = Path(__file__).parents[1] / "reference" / "manifests"


def stirred(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with random values everywhere, so that no gate or norm hides a path; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
    return network.eval()


def pixels(height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["stage_a", "stage_a_discriminator"])
def test_names_and_shapes_are_the_official_ones(name: str) -> None:
    if name == "stage_a":
        with torch.device("meta"):
            network = StageA(STAGE_A["full"])
    else:
        network = Discriminator(
            DISCRIMINATOR["full"]
        )  # spectral norm draws its vectors, slow to import on meta
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == manifest


def twin(config: StageAConfig, scale: float = 0.43) -> tuple[StageA, nn.Module]:
    """The same random Stage A in ours and in diffusers."""
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    ours = stirred(StageA(config))
    theirs = PaellaVQModel(
        levels=config.levels,
        bottleneck_blocks=config.bottleneck_blocks,
        embed_dim=config.width,
        num_vq_embeddings=config.codes,
        scale_factor=scale,
    ).eval()
    renamed = {k.replace("codebook", "embedding"): v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(renamed)
    return ours, theirs


@pytest.mark.parametrize("levels", [1, 2, 3])
@torch.no_grad()
def test_equals_diffusers(levels: int) -> None:
    ours, theirs = twin(StageAConfig(levels=levels, width=16, bottleneck_blocks=2, codes=32))
    side = 2**levels
    x = pixels(3 * side, 5 * side)
    latents = ours.encode(x)
    torch.testing.assert_close(latents * 0.43, theirs.encode(x).latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours.decode(latents), theirs.decode(latents * 0.43).sample, rtol=1e-4, atol=1e-5
    )
    codes, loss, (_, _, indices) = theirs.vquantizer(latents * 0.43)
    quantised = ours.encode_quantised(x)
    torch.testing.assert_close(quantised.codes * 0.43, codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantised.loss, loss)
    assert torch.equal(quantised.indices.flatten(), indices)


@torch.no_grad()
def test_the_scale_is_not_the_one_on_the_hub() -> None:
    """The hub's diffusers config says 0.3764, of Würstchen v2; decoding with it gives another picture."""
    ours, theirs = twin(STAGE_A["tiny"], scale=0.3764)
    latents = ours.encode(pixels(16, 16))
    right = ours.decode(latents)
    as_published = theirs.decode(latents * theirs.config.scale_factor).sample
    torch.testing.assert_close(right, theirs.decode(latents * 0.43).sample, rtol=1e-4, atol=1e-5)
    assert (right - as_published).abs().max() > 0.01


@torch.no_grad()
def test_a_fresh_mixing_block_is_the_identity() -> None:
    network = StageA(STAGE_A["tiny"])
    x = torch.randn(1, 8, 5, 7)
    assert torch.equal(network.down_blocks[0](x), x)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (12, 20), (20, 4), (36, 28)])
@torch.no_grad()
def test_any_multiple_of_four_comes_back_at_its_size(height: int, width: int) -> None:
    network = stirred(StageA(STAGE_A["tiny"]))
    latents = network.encode(pixels(height, width))
    assert latents.shape == (2, 4, height // 4, width // 4)
    assert network.decode(latents).shape == (2, 3, height, width)


def test_other_sizes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="multiples of 4, the picture is 18x16"):
        StageA(STAGE_A["tiny"]).encode(pixels(18, 16))


def test_quantising_takes_the_nearest_code() -> None:
    network = stirred(StageA(STAGE_A["tiny"]))
    quantised = network.encode_quantised(pixels(16, 24))
    z = (quantised.latents * 0.43).permute(0, 2, 3, 1).reshape(-1, 1, 4)
    codebook = network.vquantizer.codebook.weight
    nearest = (z - codebook).square().sum(-1).argmin(1)
    assert torch.equal(quantised.indices.flatten(), nearest)
    chosen = codebook[nearest].view(2, 4, 6, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(quantised.codes * 0.43, chosen)


def test_ties_go_to_the_lowest_index_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    quantiser = StageA(STAGE_A["tiny"]).vquantizer
    with torch.no_grad():
        quantiser.codebook.weight[20:] = quantiser.codebook.weight[:12]
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(2)) * 0.03
    whole = quantiser.nearest(z)
    assert int(whole.max()) < 20
    monkeypatch.setattr(type(quantiser), "ROWS", 7)
    assert torch.equal(quantiser.nearest(z), whole)


def test_gradients_go_straight_through_the_codes() -> None:
    network = StageA(STAGE_A["tiny"]).train()
    x = pixels(16, 16).requires_grad_()
    quantised = network.encode_quantised(x)
    weights = torch.randn(quantised.codes.shape, generator=torch.Generator().manual_seed(3))
    (through,) = torch.autograd.grad((quantised.codes * weights).sum(), x, retain_graph=True)
    (direct,) = torch.autograd.grad((quantised.latents * weights).sum(), x, retain_graph=True)
    torch.testing.assert_close(through, direct)
    # The codes themselves learn from the loss alone.
    codebook = network.vquantizer.codebook.weight
    assert (
        torch.autograd.grad(quantised.codes.sum(), codebook, allow_unused=True, retain_graph=True)[0] is None
    )
    assert torch.autograd.grad(quantised.loss, codebook)[0].abs().sum() > 0


def test_it_learns_one_batch() -> None:
    torch.manual_seed(0)
    network = StageA(STAGE_A["tiny"]).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=5e-3)
    x = F.interpolate(pixels(4, 4), scale_factor=8, mode="bilinear")
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        roundtrip = network.decode(network.encode(x))
        loss = F.mse_loss(roundtrip, x)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_every_precision_is_finite_at_full_size(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = StageA(STAGE_A["full"]).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("gammas"):
            parameter.normal_()  # zero gates would leave every block out
    x = pixels(16, 16, count=1)
    expected = network.decode(network.encode(x))
    network.to(dtype)
    got = network.decode(network.encode(x.to(dtype)))
    assert got.dtype == dtype
    assert got.isfinite().all()
    error = (got.float() - expected).abs().max() / expected.abs().max()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]


def test_discriminator_answers_with_probabilities_per_patch() -> None:
    network = Discriminator(DiscriminatorConfig(width=16, depth=4, cond_width=5))
    answer = network(pixels(40, 64), torch.randn(2, 5))
    assert answer.shape == (2, 1, 3, 4)
    assert ((answer > 0) & (answer < 1)).all()
    answer.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_discriminator_says_what_is_too_small() -> None:
    with pytest.raises(ValueError, match="at least 17 pixels, not 16x64"):
        Discriminator(DISCRIMINATOR["tiny"])(pixels(16, 64))
    with pytest.raises(ValueError, match="depth of at least 4, not 3"):
        Discriminator(DiscriminatorConfig(depth=3))
