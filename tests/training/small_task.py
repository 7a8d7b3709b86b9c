"""A task small enough to be trained, killed and repeated many times: fit a line through eight samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from triptych.checkpoints.files import PartInfo
from triptych.data.batches import BatchOrder, BatchPlan
from triptych.training.config import RunSettings
from triptych.training.draws import Draws
from triptych.training.task import Losses, Task


def small_settings(out: Path, **changes: object) -> RunSettings:
    """Settings for it; nested tables are given as dictionaries."""
    given = {
        "recipe": "semantic", "out": str(out), "steps": 8, "batch": 4, "save_every": 2, "log_every": 1,
        "sample_every": 100, "tensorboard": False, "optim": {"lr": 1e-2}, "ema": {"every": 1, "start": 2},
    }  # fmt: skip
    return RunSettings.model_validate(given | changes)


def small_task(
    settings: RunSettings, spoilt_steps: Sequence[int] = (), network: nn.Module | None = None
) -> Task:
    """The task; the batches of `spoilt_steps` hold a number that is none."""
    torch.manual_seed(0)
    network = network or nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    rows = torch.randn(8, 3)

    def load(plan: BatchPlan, places: Sequence[int]) -> Tensor:
        batch = rows[[plan.samples[place] for place in places]]
        return batch * float("nan") if plan.step in spoilt_steps else batch

    def loss(player: str, batch: Tensor, draws: Draws, step: int) -> Losses:
        noisy = batch + 0.1 * draws.normal((3,))
        per_sample = (network(noisy)[:, 0] - batch.sum(1)).square()
        return Losses(per_sample.mean(), per_sample.detach(), draws.uniform())

    return Task(
        {"line": network}, BatchOrder([0] * 8, settings.batch), load, loss,
        lambda part, network: PartInfo(part=part, config={}), lambda trained, out: None,
        players={"line": ["line"]}, key_of="sample {}".format,
    )  # fmt: skip
