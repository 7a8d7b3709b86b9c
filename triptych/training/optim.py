"""What turns gradients into weights: an optimiser, its rate over the run, clipping, the running average.

All of it is plain functions of a step number, so a resumed run needs nothing but the optimiser's own state.
The defaults are those of the published recipes: AdamW at 1e-4 with the library's constants, decay on every
parameter, gradient norm clipped to 1, a warm-up of one update, then a constant rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from triptych.errors import MissingExtra, TrainingError
from triptych.training.adamw8bit import AdamW8bit
from triptych.training.muon import Muon

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Kind = Literal["adamw", "muon", "adafactor", "adamw8bit", "schedule_free"]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class OptimSettings(BaseModel):
    """The optimiser of a run. Counts are in updates, not in accumulated batches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind = Field("adamw", description="of optimiser; muon moves matrices, and adamw the rest")
    lr: Positive = Field(1e-4, description="learning rate after warm-up")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="AdamW's two running averages")
    eps: Positive = Field(1e-8, description="AdamW's denominator floor")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    momentum: Fraction = Field(0.95, description="Muon's running average")
    decay_only_matrices: bool = Field(False, description="spare biases, gains and other vectors from decay")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 never clips")
    clip_by: Literal["whole", "layer"] = Field("whole", description="whose norm: all weights', or each one's")
    fused_backward: bool = Field(False, description="update inside the backward pass: no gradient is kept")
    warmup: int = Field(1, ge=0, description="updates over which the rate rises from zero")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="the rate afterwards")
    fall_from: int = Field(0, ge=0, description="update at which a linear or cosine fall begins")
    fall_until: int | None = Field(None, gt=0, description="update at which it has ended")
    final: float = Field(0.0, ge=0, le=1, description="what is left of the rate then, as a fraction")

    @model_validator(mode="after")
    def _the_fall_has_a_place(self) -> OptimSettings:
        if self.schedule == "constant":
            return self
        if self.kind == "schedule_free":
            raise ValueError(
                'kind "schedule_free" averages weights instead of lowering the rate: leave out schedule'
            )
        if self.fall_until is None:
            raise ValueError(
                f'schedule "{self.schedule}" needs fall_until, the update at which the fall ends'
            )
        if self.fall_until <= max(self.fall_from, self.warmup):
            raise ValueError(
                f"fall_until is {self.fall_until}; it must come after fall_from ({self.fall_from}) "
                f"and after warm-up ({self.warmup})"
            )
        return self


class EmaSettings(BaseModel):
    """The running average of the weights. The defaults are what the published recipes suggest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(True, description="keep an average; else the weights themselves are written")
    every: int = Field(100, ge=1, description="steps between two updates of the average")
    beta: float = Field(0.9, ge=0, lt=1, description="what is kept of the average at each update")
    start: int = Field(5000, ge=0, description="until this step the average is a plain copy")


def parameter_groups(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> list[dict[str, object]]:
    """Trainable parameters in one or two groups: with and without weight decay, in the given order.

    With `decay_only_matrices`, a parameter with at most one side longer than 1 is not decayed: biases, and
    the gains of response norms, whose shape is (1,1,1,c).
    """
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise TrainingError("There is nothing to train: no parameter of the network requires a gradient.")
    if not settings.decay_only_matrices:
        return [{"params": trainable, "weight_decay": settings.weight_decay}]
    decayed = [sum(side > 1 for side in p.shape) > 1 for p in trainable]
    groups: list[dict[str, object]] = []
    for wanted, weight_decay in ((True, settings.weight_decay), (False, 0.0)):
        members = [p for p, matrix in zip(trainable, decayed, strict=True) if matrix is wanted]
        if members:
            groups.append({"params": members, "weight_decay": weight_decay})
    return groups


def build_optimizer(
    parameters: Iterable[nn.Parameter], settings: OptimSettings, narrow: bool = False
) -> torch.optim.Optimizer:
    """The optimiser of `settings.kind` over the parameters that require gradients; `narrow` lets its own
    matrix products be bfloat16.

    Raises TrainingError if there are none, MissingExtra if a package is. Its rate is meaningless until
    `set_learning_rate`.
    """
    groups: Any = parameter_groups(parameters, settings)
    if settings.kind == "adafactor":
        from transformers.optimization import Adafactor  # with updates as large as AdamW's, so its rate holds

        return Adafactor(groups, lr=settings.lr, scale_parameter=False, relative_step=False)
    common: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.kind == "muon":
        return Muon(groups, **common, momentum=settings.momentum, narrow=narrow)
    if settings.kind == "adamw8bit":
        return AdamW8bit(groups, **common)
    if settings.kind == "schedule_free":
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError:
            raise MissingExtra("schedulefree", "train", 'optim.kind = "schedule_free"') from None
        return AdamWScheduleFree(groups, **common, warmup_steps=0)
    return torch.optim.AdamW(groups, **common, fused=True)


def to_training_point(optimizer: torch.optim.Optimizer, training: bool) -> None:
    """Between updates a schedule-free optimiser keeps the averaged weights; gradients are taken elsewhere."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


def learning_rate(step: int, settings: OptimSettings) -> float:
    """The rate of update `step`, counted from 0 over the whole run, resumed or not.

    Warm-up is lr * step / warmup, so the very first update has rate 0, as published.
    """
    if step < settings.warmup:
        return settings.lr * step / settings.warmup
    if settings.schedule == "constant" or settings.fall_until is None:
        return settings.lr
    begin = max(settings.fall_from, settings.warmup)
    progress = min(max((step - begin) / (settings.fall_until - begin), 0.0), 1.0)
    left = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.lr * (settings.final + (1 - settings.final) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this rate for the next update, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, by_layer: bool = False) -> Tensor:
    """Scale all gradients so that their joint norm is at most `limit`; 0 leaves them alone.

    With `by_layer`, each parameter's gradient is brought to `limit` by itself. Returns the joint norm before
    clipping, a scalar tensor on the gradients' device. A norm that is not finite makes every gradient
    useless: check it before the update.
    """
    parameters = list(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, limit if limit > 0 and not by_layer else math.inf)
    if by_layer and limit > 0:
        for parameter in parameters:
            nn.utils.clip_grad_norm_([parameter], limit)
    return norm


@torch.no_grad()
def ema_update(ema: nn.Module, model: nn.Module, beta: float) -> None:
    """ema <- beta * ema + (1 - beta) * model, by name, parameters and buffers alike.

    Integer buffers (counts of batches) are copied, and beta 0 copies everything, bit for bit. Raises
    TrainingError if the names differ.
    """
    averages, values = ema.state_dict(), model.state_dict()
    if averages.keys() != values.keys():
        odd = sorted(averages.keys() ^ values.keys())
        names = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        raise TrainingError(
            f"The running average and the network differ in names; in one of them only: {names}."
        )
    for name, average in averages.items():
        value = values[name].to(average.device, average.dtype)
        if beta == 0 or not average.is_floating_point():
            average.copy_(value)
        else:
            average.lerp_(value, 1 - beta)


def update_ema(ema: nn.Module, model: nn.Module, step: int, settings: EmaSettings) -> bool:
    """Bring the average up to date after `step` finished steps, if it is time to; says whether it was."""
    if step % settings.every or ema is model:
        return False
    ema_update(ema, model, 0.0 if step <= settings.start else settings.beta)
    return True
