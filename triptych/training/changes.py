"""Settings that differ from those a run was begun with: which matter, which may change, which may not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from triptych.errors import TrainingError
from triptych.training.config import RunSettings

# What the stored weights and moments are made for: other values would mean another run.
FIXED = (
    "recipe", "size", "network", "optim.kind", "ema.enabled", "diffusion.prediction",
    "diffusion.train_text", "control.hint",
    "lora.model", "lora.parts", "lora.kind", "lora.rank", "lora.alpha", "lora.modules", "lora.token",
    "lora.token_vectors",
)  # fmt: skip
# What no weight depends on.
FREE = (
    "name", "out", "init", "steps", "device", "log_every", "save_every", "sample_every", "sample_prompts",
    "tensorboard", "store", "licence", "notice", "not_finite", "shard", "data.readers",
)  # fmt: skip


def check_changes(before: Mapping[str, Any], now: RunSettings) -> str:
    """What is to be said of a run begun with the settings `before` and continued with `now`; "" if nothing.

    Raises TrainingError when the stored state cannot be continued with them.
    """
    differing = differences(before, now.model_dump(mode="json"))
    refused = [text for name, text in differing.items() if within(name, FIXED)]
    if refused:
        raise TrainingError(
            f"{now.out} was begun with settings that cannot change within a run: {', '.join(refused)}. Go "
            f"back to them, or begin in another folder from its weights: --set out=NEW --set init={now.out}. "
            f"Fixed are {', '.join(FIXED)}; all others may change, such as steps, batch, optim.lr and data."
        )
    told = [text for name, text in differing.items() if not within(name, FREE)]
    return f"From here on with other settings than before: {', '.join(told)}." if told else ""


def within(name: str, tables: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of `tables` or lies in one."""
    return any(name == table or name.startswith(f"{table}.") for table in tables)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """ "old -> new" by dotted name; names that only one of them knows (another version's) are left out."""
    old, new = flat(before), flat(now)
    return {
        name: f"{name} {json.dumps(old[name])} -> {json.dumps(new[name])}"
        for name in new
        if name in old and old[name] != new[name]
    }


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one with dotted names; `network` and other free tables stay values."""
    found: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, Mapping) and name not in ("network", "sampling", "shapes_kinds"):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
