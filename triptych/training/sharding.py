"""Networks split over processes (FSDP2), and checkpoints in which every process writes its own part.

Such a checkpoint is a folder `state-STEP` in the layout of torch.distributed.checkpoint. It is read by any
number of processes, split or not; a file of one process is read by split networks too.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from triptych.checkpoints.files import DISK_FULL
from triptych.errors import CapacityError, TrainingError
from triptych.pipelines.placement import blocks_of
from triptych.training.processes import leads, world

CONTENT = "triptych_run.json"  # beside torch's own files


def shard_networks(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Split networks over all processes, block by block: each is whole only while it runs."""
    mesh = init_device_mesh(device.type, (world(),))
    for network in networks:
        for block in blocks_of(network):
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split tensors put together on the CPU of the first process; every process must call this."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor().detach().cpu()
        if leads():
            found[name] = tensor
    return found


def as_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor split as `like` is; `tensor` itself where that is not split, or is of another shape."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    placed = tensor.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def write_shards(folder: Path, step: int, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write the folder `state-STEP` in `folder`, complete or not at all, and remove those before it.

    Raises CapacityError in every process when the disk of any is full.
    """
    path = folder / f"state-{step:09d}"
    partial = path.with_suffix(".partial")
    if leads():
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    try:
        save(dict(tensors), checkpoint_id=partial)
    except CheckpointException as error:
        reasons = [wrapped[0] for wrapped in error.failures.values()]
        if any(isinstance(reason, OSError) and reason.errno in DISK_FULL for reason in reasons):
            raise CapacityError(f"The disk is full: {path} was not written.") from None
        raise TrainingError(f"{path} cannot be written: {reasons[0]}.") from None
    if leads():
        (partial / CONTENT).write_text(json.dumps(content), encoding="utf-8")
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        remove_shards(folder, but=path)


def shards_in(folder: Path) -> list[Path]:
    """The complete sharded checkpoints in a folder, the newest last."""
    return sorted(path for path in folder.glob("state-*") if path.suffix == "" and path.is_dir())


def remove_shards(folder: Path, but: Path | None = None) -> None:
    """Remove sharded checkpoints that another has taken the place of."""
    for path in shards_in(folder):
        if path != but:
            shutil.rmtree(path, ignore_errors=True)


def describe_shards(path: Path) -> dict[str, Any]:
    """What a sharded checkpoint says of itself: `step` and `settings`."""
    return dict(json.loads((path / CONTENT).read_text(encoding="utf-8")))


def read_shards(path: Path, target: Callable[[str, torch.Size, torch.dtype], Tensor]) -> dict[str, Tensor]:
    """The tensors of a sharded checkpoint, each read into `target(name, size, dtype)`, split as that is."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: target(name, entry.size, entry.properties.dtype)  # type: ignore[union-attr]
        for name, entry in stored.items()
    }
    with warnings.catch_warnings():  # it says that there is one process
        warnings.simplefilter("ignore")
        load(tensors, checkpoint_id=path, no_dist=world() == 1)
    return tensors
