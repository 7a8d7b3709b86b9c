"""Distilled LoRAs: nearer to their guided teacher than the base without them, by arithmetic of our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_cascade import write_tiny_cascade
from torch import Tensor

from triptych import Cascade
from triptych.checkpoints.files import read_tensors
from triptych.checkpoints.load import load_part
from triptych.diffusion.schedule import Schedule, alpha_sigma
from triptych.errors import SettingsError
from triptych.pipelines.request import Request
from triptych.training.config import LoraSettings, RunSettings, read_settings
from triptych.training.distil import Told, consistency_loss, guidance_loss
from triptych.training.loop import train
from triptych.training.lora import inject
from triptych.training.prior import without_adapters

pytest.importorskip("peft")
RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
WEIGHT, LEVELS, ROWS = 3.0, 4, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_cascade(tmp_path_factory.mktemp("model"))


@pytest.fixture
def network(model: Path) -> Any:
    """The random Stage C with adapters on it, which change nothing yet."""
    network = load_part(model / "stage_c.safetensors", "stage_c", dtype=torch.float32)[0]
    network.requires_grad_(False).eval()
    torch.manual_seed(0)
    inject(network, LoraSettings(rank=16, modules=("attn", "channelwise", "mapper")), "stage_c")
    return network


def asked(kind: str) -> RunSettings:
    distil = {"kind": kind, "guidance": WEIGHT, "levels": LEVELS}
    lora = {"token": False, "prior": 0.0}
    sampling = {"rescale": 0.0, "shift": 1.0}
    return RunSettings(
        recipe="lora", out="", distil=distil, lora=lora,  # type: ignore[arg-type]
        diffusion={"prediction": "v", "sampling": sampling},  # type: ignore[arg-type]
    )  # fmt: skip


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TOLD = Told(
    normal(ROWS, 9, 384, seed=1), normal(ROWS, 384, seed=2),
    normal(1, 9, 384, seed=3).expand(ROWS, -1, -1), normal(1, 384, seed=4).expand(ROWS, -1),
)  # fmt: skip


def learn(network: Any, loss: Callable[[Tensor, Tensor, Tensor], Any], updates: int = 60) -> list[float]:
    """Update the adapters on fresh latents, noise and uniform draws; the losses."""
    optimiser = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=3e-3)
    seen = []
    for update in range(updates):
        drawn = [normal(ROWS, 16, 4, 4, seed=100 * update + part) for part in (10, 11)]
        uniform = torch.rand(ROWS, generator=torch.Generator().manual_seed(update))
        total = loss(drawn[0], drawn[1], uniform).total
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        seen.append(float(total.detach()))
    return seen


def guided(network: Any, x: Tensor, t: float) -> Tensor:
    time = torch.full((ROWS,), t)
    with without_adapters(network):
        on = network(x, time, TOLD.hidden, TOLD.pooled)
        off = network(x, time, TOLD.empty_hidden, TOLD.empty_pooled)
    return off + WEIGHT * (on - off)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def test_guidance_is_learned_into_the_plain_answer(network: Any) -> None:
    settings = asked("guidance")
    seen = learn(network, lambda x0, eps, t: guidance_loss(settings, network, TOLD, x0, eps, t))
    assert sum(seen[-10:]) < 0.5 * sum(seen[:10])
    x = normal(ROWS, 16, 4, 4, seed=7)  # never met in training
    with torch.no_grad():
        wanted = guided(network, x, 0.6)
        plain = torch.full((ROWS,), 0.6), TOLD.hidden, TOLD.pooled
        after = distance(network(x, *plain), wanted)
        with without_adapters(network):
            before = distance(network(x, *plain), wanted)
    assert after < 0.7 * before


def test_one_answer_comes_nearer_to_the_end_of_the_guided_path(network: Any) -> None:
    settings = asked("consistency")
    seen = learn(network, lambda x0, eps, u: consistency_loss(settings, network, TOLD, x0, eps, u))
    assert sum(seen[-10:]) < 0.9 * sum(seen[:10])
    _, logsnrs = Schedule().grid(LEVELS)
    x = start = normal(ROWS, 16, 4, 4, seed=7)
    with torch.no_grad():
        for index in range(LEVELS):  # DDIM by hand
            (alpha, sigma), (alpha_next, sigma_next) = map(alpha_sigma, logsnrs[index : index + 2])
            v = guided(network, x, float(Schedule().time(logsnrs[index])))
            end = alpha * x - sigma * v
            x = alpha_next * end + sigma_next * (sigma * x + alpha * v)
        alpha, sigma = alpha_sigma(logsnrs[0])
        told = torch.full((ROWS,), float(Schedule().time(logsnrs[0]))), TOLD.hidden, TOLD.pooled
        after = distance(alpha * start - sigma * network(start, *told), end)
        with without_adapters(network):
            before = distance(alpha * start - sigma * network(start, *told), end)
    assert after < 0.9 * before


@pytest.mark.parametrize("recipe", ["lora_guidance", "lora_lcm"])
def test_the_recipes_write_what_generation_wears(recipe: str, model: Path, tmp_path: Path) -> None:
    changes = ["tensorboard=false", f"lora.model={model}", "data.size=64", "steps=2", "ema.start=1"]
    settings = read_settings(RECIPES / f"{recipe}.toml", [f"out={tmp_path}", *changes])
    train(settings)
    wearing = f"{tmp_path / settings.name}.safetensors"
    cascade = Cascade.load(model, device="cpu", dtype="float32")
    chosen: dict[str, Any] = {"seed": 1, "steps": 2, "sampler": "lcm", "guidance": 1, "draft": True}
    plain = cascade.generate("a red apple", **chosen)
    worn = cascade.generate("a red apple", lora=(wearing,), **chosen)
    assert not torch.equal(plain.latents_c, worn.latents_c)


def test_a_student_learns_in_bfloat16_from_cached_latents(model: Path, tmp_path: Path) -> None:
    changes = ["tensorboard=false", f"lora.model={model}", "data.size=64", "steps=3", "ema.start=0"]
    cached = [f"data.cache={tmp_path / 'cache'}", "precision=bfloat16"]
    train(read_settings(RECIPES / "lora_guidance.toml", [f"out={tmp_path}", *changes, *cached]))
    learned = read_tensors(tmp_path / "guided.safetensors")
    assert all(tensor.isfinite().all() for tensor in learned.values())
    assert any(tensor.any() for name, tensor in learned.items() if name.endswith("up.weight"))


def test_a_student_is_drawn_with_what_its_file_says_unless_told_otherwise(
    model: Path, tmp_path: Path
) -> None:
    student = f"{tmp_path / 'lcm.safetensors'}"
    changes = ["tensorboard=false", f"lora.model={model}", "data.size=64", "steps=1", "ema.start=1"]
    train(read_settings(RECIPES / "lora_lcm.toml", [f"out={tmp_path}", *changes]))
    cascade = Cascade.load(model, device="cpu", dtype="float32")

    def drawn_with(**settings: Any) -> tuple[Any, ...]:
        resolved = cascade.resolve(Request(prompt="a red apple", model=str(model), **settings))
        return resolved.steps, resolved.guidance, resolved.sampler

    usual = drawn_with()
    assert usual != (4, 1.0, "lcm")
    assert drawn_with(lora=(student,)) == (4, 1.0, "lcm")
    assert drawn_with(lora=(student,), fast=True) == (4, 1.0, "lcm")
    assert drawn_with(lora=(student,), steps=2, sampler="ddim") == (2, 1.0, "ddim")
    assert drawn_with(lora=(f"{student}:0",)) == usual  # a file that is not worn decides nothing


def test_what_does_not_go_together_is_told() -> None:
    with pytest.raises(SettingsError, match="use recipe"):
        read_settings(RECIPES / "lora_lcm.toml", ["lora.token=true"])
