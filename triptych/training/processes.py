"""Several processes that train together, as torchrun starts them: who they are, how they average and agree.

Nothing but the variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT is looked at, so whatever
sets them will do. Without them a run is one process, and every function here gives back what it was given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych.errors import SettingsError, TrainingError
from triptych.pipelines.placement import choose_device
from triptych.training.config import RunSettings

Made = TypeVar("Made")

BUCKET = 25 * 2**20  # bytes of gradients averaged at once, as torch's own DDP
LONGEST_WAIT = timedelta(days=7)  # for the process that makes a cache
SHARDED = ("stage_b", "stage_c", "controlnet")  # recipes whose networks are large enough to be split


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def leads() -> bool:
    """Whether this process writes and speaks for all."""
    return rank() == 0


@contextmanager
def joined(settings: RunSettings) -> Iterator[torch.device]:
    """This process among those of a run, and its device. Raises SettingsError for settings that cannot be
    shared out."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    several = count > 1 or dist.is_initialized()
    name = settings.device
    if several and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{local % torch.cuda.device_count()}"
    device = choose_device(name)
    check_shares(settings, count)
    if count == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def check_shares(settings: RunSettings, count: int) -> None:
    """Raise SettingsError when a batch cannot be dealt out evenly, or what is asked for needs one process."""
    if count == 1:
        return
    if settings.batch % (count * settings.accumulate):
        raise SettingsError(
            f"A batch of {settings.batch} in {settings.accumulate} parts cannot be dealt out evenly to "
            f"{count} processes: make batch a multiple of {count * settings.accumulate}."
        )
    if settings.optim.fused_backward:
        raise SettingsError(
            "optim.fused_backward moves weights before other processes have added their gradients: leave it "
            "out with several, or train in one."
        )
    if settings.shard and settings.recipe not in SHARDED:
        raise SettingsError(
            f'shard = true splits the networks of {", ".join(SHARDED)}; recipe "{settings.recipe}" trains so '
            "few weights that every process holds them: leave shard out."
        )
    if settings.shard and settings.optim.kind != "adamw":
        raise SettingsError(
            f'shard = true splits every matrix, and optim.kind = "{settings.optim.kind}" needs whole ones: '
            'use "adamw", or leave shard out.'
        )


def own_places(part: Sequence[int]) -> tuple[int, ...]:
    """The places of the global batch that this process takes of one part of it."""
    share = len(part) // world()
    return tuple(part[rank() * share : (rank() + 1) * share])


def in_turn(make: Callable[[], Made]) -> Made:
    """`make()` in the first process, then in the first of every other machine, then in the rest.

    What one makes on disk, such as a cache, the later ones find ready.
    """
    if world() == 1:
        return make()
    waiting = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    turn = 0 if leads() else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    made: list[Made] = []
    for now in range(3):
        if now == turn:
            made.append(make())
        dist.barrier(waiting)
    return made[0]


def anyone(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    return bool(total(torch.tensor(int(flag))).item())


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def everywhere(tensor: Tensor) -> Tensor:
    """The rows of all processes, in the order of their numbers; gradients find their way back."""
    if world() == 1:
        return tensor
    return torch.cat(list(_Gather.apply(tensor.contiguous())))


class _Gather(torch.autograd.Function):
    """All processes' tensors; backward sums what each of them asks of one's own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> tuple[Tensor, ...]:
        rows = [torch.empty_like(tensor) for _ in range(world())]
        dist.all_gather(rows, tensor)
        return tuple(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return total(torch.stack(gradients))[rank()]


class _Total(torch.autograd.Function):
    """`total` with a gradient, which is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return total(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient)


def everyones(value: Made) -> list[Made]:
    """The values of all processes, in the order of their numbers."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def check_equal(value: int, what: str) -> None:
    """Raise TrainingError where processes differ in `value`."""
    values = everyones(value)
    if len(set(values)) > 1:
        raise TrainingError(
            f"The processes of this run find different {what}: {values}. The run's folder must be one that "
            "all machines share."
        )


def share_weights(networks: Sequence[nn.Module]) -> None:
    """Give every process the weights of the first, and batch norms that see the batches of all."""
    if world() == 1:
        return
    for network in networks:
        for tensor in [*network.parameters(), *network.buffers()]:
            dist.broadcast(tensor.data, 0)
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = WholeBatchNorm


class WholeBatchNorm(nn.BatchNorm2d):
    """A batch norm over the global batch, on any device; processes have equal shares of it."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same."""
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * world()
        mean: Tensor = _Total.apply(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance: Tensor = _Total.apply(centred.square().sum((0, 2, 3))) / count
        self._note(mean.detach(), variance.detach() * (count / (count - 1)))
        y = centred * (variance + self.eps).rsqrt()[:, None, None]
        return y if self.weight is None else y * self.weight[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def _note(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class AveragedGradients:
    """Averages gradients over processes, a bucket at a time, while the backward pass goes on.

    Buckets start in one fixed order, last parameters first, since that is how gradients arrive. A parameter
    that no process has a gradient for keeps none: a learned token that no caption of a batch names, say.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.buckets: list[list[nn.Parameter]] = []
        size = BUCKET
        for p in reversed(parameters):
            last = self.buckets[-1][-1] if self.buckets else p
            if size + p.nbytes > BUCKET or (last.dtype, last.device) != (p.dtype, p.device):
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(p)
            size += p.nbytes
        self.place = {p: number for number, bucket in enumerate(self.buckets) for p in bucket}
        self.missing: list[int] = []
        self.sent: list[tuple[Tensor, Any]] = []

    @contextmanager
    def during(self) -> Iterator[None]:
        """The last backward pass of an update lies inside; afterwards gradients are those of all."""
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent = []
        handles = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.place]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._send(len(self.buckets))
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            self._spread(bucket, flat)

    def _arrived(self, p: Tensor) -> None:
        self.missing[self.place[p]] -= 1  # type: ignore[index]
        ready = len(self.sent)
        while ready < len(self.buckets) and self.missing[ready] == 0:
            ready += 1
        self._send(ready)

    def _send(self, until: int) -> None:
        for bucket in self.buckets[len(self.sent) : until]:
            there = [torch.tensor(p.grad is not None, dtype=p.dtype, device=p.device) for p in bucket]
            rows = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]
            flat = torch.cat([torch.stack(there), *rows])
            self.sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def _spread(self, bucket: list[nn.Parameter], flat: Tensor) -> None:
        there, values = flat.split([len(bucket), flat.numel() - len(bucket)])
        values /= world()
        rows = values.split([p.numel() for p in bucket])
        for p, found, row in zip(bucket, there.tolist(), rows, strict=True):
            p.grad = row.view_as(p) if found else None


def averaging(gradients: AveragedGradients | None, last: bool) -> Any:
    """The context of one backward pass: `during` for the last one of several processes."""
    return gradients.during() if gradients is not None and last else nullcontext()
