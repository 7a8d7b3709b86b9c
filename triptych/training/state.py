"""The state of a run: everything a continued run needs to be the unbroken one, in one file.

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
        for kind, networks in (("network", self.task.trained), ("average", self.averages)):
            for part, network in networks.items():
                for name, tensor in network.state_dict().items():
                    tensors[f"{kind}.{part}.{name}"] = tensor
        for name, table in self.task.tables.items():
            for field, tensor in table.state_dict().items():
                tensors[f"table.{name}.{field}"] = tensor
        for player, optimizer in self.optimizers.items():
            for index, moments in optimizer.state_dict()["state"].items():
                for field, tensor in moments.items():
                    tensors[f"optimizer.{player}.{index}.{field}"] = torch.as_tensor(tensor)
        return tensors

    def save(self, folder: Path) -> None:
        """Write the state, atomically: a killed run finds the last complete one."""
        content = {"step": self.step, "settings": self.settings.model_dump(mode="json")}
        write_tensors(folder / FILE, self.tensors(), {"format": "pt", MARK: json.dumps(content)})
        self.saved = self.step

    def restore(self, folder: Path) -> bool:
        """Continue from the state in `folder`, if there is one. Says whether there was."""
        path = folder / FILE
        if not path.exists():
            return False
        content = stored(folder)
        tensors = read_tensors(path)
        for kind, networks in (("network", self.task.trained), ("average", self.averages)):
            for part, network in networks.items():
                load_strictly(network, under(tensors, f"{kind}.{part}."), f"{path}: {part}")
        for name, table in self.task.tables.items():
            table.load_state_dict(under(tensors, f"table.{name}."))
        for player, optimizer in self.optimizers.items():
            restore_moments(optimizer, under(tensors, f"optimizer.{player}."))
        self.step = self.saved = content["step"]
        return True


def stored(folder: Path) -> dict[str, Any]:
    """What the state in `folder` says of itself: its `step`, the `settings` it was made with; {} without one.

    Raises TrainingError for a file that is no state.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    content = read_header(path).metadata.get(MARK)
    if content is None:
        raise TrainingError(f"{path} is not the state of a run; name another output folder.")
    return dict(json.loads(content))


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


def restore_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give the optimiser its moments back, by the number of the parameter."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, field = name.split(".", 1)
        state.setdefault(int(index), {})[field] = tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
