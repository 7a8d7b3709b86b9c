"""The state of a run: everything a continued run needs to be the unbroken one, in one file.

With networks split over processes it is a folder instead, see sharding.py; either continues from the other.

The order of samples and all random numbers follow from (seed, step), so the step, the networks, their running
averages and the optimisers' moments are all there is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triptych.checkpoints.files import read_header, read_tensors, write_tensors
from triptych.errors import TrainingError
from triptych.training.changes import check_changes
from triptych.training.config import RunSettings
from triptych.training.moments import moments_of, restore_moments
from triptych.training.processes import leads, world
from triptych.training.sharding import (
    as_like,
    describe_shards,
    read_shards,
    remove_shards,
    shards_in,
    write_shards,
)
from triptych.training.task import Task

FILE = "state.safetensors"
MARK = "triptych_run"


class State:
    """Step, networks, averages, optimisers and tables of a run."""

    def __init__(
        self,
        task: Task,
        averages: dict[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        settings: RunSettings,
    ) -> None:
        self.step = 0
        self.saved = 0  # the step of the last complete checkpoint; 0 before there is one
        self.settings = settings
        self.task = task
        self.averages = averages
        self.optimizers = optimizers

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under a unique name."""
        tensors: dict[str, Tensor] = {}
        for kind, networks in self.networks():
            for part, network in networks.items():
                for name, tensor in network.state_dict().items():
                    tensors[f"{kind}.{part}.{name}"] = tensor
        for name, table in self.task.tables.items():
            for field, tensor in table.state_dict().items():
                tensors[f"table.{name}.{field}"] = tensor
        for player, optimizer in self.optimizers.items():
            for name, tensor in moments_of(optimizer).items():
                tensors[f"optimizer.{player}.{name}"] = tensor
        return tensors

    def networks(self) -> tuple[tuple[str, dict[str, nn.Module]], ...]:
        """All networks by kind and part; without a running average, the average is the network itself."""
        trained = self.task.trained
        averages = {part: net for part, net in self.averages.items() if net is not trained[part]}
        return ("network", trained), ("average", averages)

    def save(self, folder: Path) -> None:
        """Write the state, atomically: a killed run finds the last complete one. Every process calls this."""
        content = {"step": self.step, "settings": self.settings.model_dump(mode="json")}
        if self.settings.shard and world() > 1:
            write_shards(folder, self.step, self.tensors(), content)
            if leads():
                (folder / FILE).unlink(missing_ok=True)
        elif leads():
            write_tensors(folder / FILE, self.tensors(), {"format": "pt", MARK: json.dumps(content)})
            remove_shards(folder)
        self.saved = self.step

    def restore(self, folder: Path) -> bool:
        """Continue from the state in `folder`, if there is one. Says whether there was."""
        path, content = newest(folder)
        if not content:
            return False
        if path.is_dir():
            tensors = read_shards(path, self.target)
        else:
            tensors = {
                name: as_like(tensor, self.target(name, tensor.shape, tensor.dtype))
                for name, tensor in read_tensors(path).items()
            }
        for kind, networks in self.networks():
            for part, network in networks.items():
                load_strictly(network, under(tensors, f"{kind}.{part}."), f"{path}: {part}")
        for name, table in self.task.tables.items():
            table.load_state_dict(under(tensors, f"table.{name}."))
        for player, optimizer in self.optimizers.items():
            restore_moments(optimizer, under(tensors, f"optimizer.{player}."))
        self.step = self.saved = content["step"]
        return True

    def target(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """An empty tensor for one that is stored, split over processes as this run needs it."""
        kind, owner, rest = name.split(".", 2)
        like: Tensor | None = None
        if kind in ("network", "average"):
            networks = self.task.trained if kind == "network" else self.averages
            like = networks[owner].state_dict().get(rest) if owner in networks else None
        elif kind == "optimizer" and owner in self.optimizers and rest.split(".")[0].isdigit():
            groups = self.optimizers[owner].param_groups
            parameters = [p for group in groups for p in group["params"]]
            like = parameters[int(rest.split(".")[0])]
        if like is None or like.shape != size:
            return torch.empty(size, dtype=dtype)
        return torch.empty_like(like, dtype=dtype, requires_grad=False)


def newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The state in a run's folder, and what it says of itself: `step`, and the `settings` it was made with.

    Nothing is said where there is none. Raises TrainingError for a file that is no state.
    """
    path, content = folder / FILE, {}
    if path.exists():
        text = read_header(path).metadata.get(MARK)
        if text is None:
            raise TrainingError(f"{path} is not the state of a run; name another output folder.")
        content = dict(json.loads(text))
    for shards in shards_in(folder)[-1:]:
        described = describe_shards(shards)
        if described["step"] > content.get("step", 0):
            path, content = shards, described
    return path, content


def stored(folder: Path) -> dict[str, Any]:
    """What the newest state in `folder` says of itself; {} without one."""
    return newest(folder)[1]


def settings_changed(folder: Path, settings: RunSettings) -> str:
    """What is to be said of settings that are not those of the state in `folder`. Raises TrainingError."""
    return check_changes(stored(folder).get("settings", {}), settings)


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def load_strictly(network: nn.Module, tensors: dict[str, Tensor], origin: str) -> None:
    """Copy weights in; a different network is an error that says what to do."""
    try:
        network.load_state_dict(tensors, strict=True)
    except RuntimeError:
        raise TrainingError(
            f"{origin} was another network in the run that is stored there: continue with the settings it "
            "began with, or name another output folder."
        ) from None
