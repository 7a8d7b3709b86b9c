"""Where a run begins: a new network, or weights in any layout that triptych reads.

`init` names a model ("mini", "cascade", a folder) or a file. What its files say of themselves is taken over
where the settings do not say otherwise: the size of the network, what it predicts, how it is sampled, the
other parts of the same model, the licence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from triptych.checkpoints.catalog import find_model
from triptych.checkpoints.files import PartInfo, read_tensors
from triptych.checkpoints.fit import identify
from triptych.checkpoints.headers import part_info
from triptych.checkpoints.load import NETWORKS, config_fields, describe_part, read_part
from triptych.checkpoints.lora_merge import with_licence
from triptych.errors import CheckpointError, SettingsError, nearest
from triptych.training.config import DataSettings, RunSettings
from triptych.training.encoders import part_path
from triptych.training.state import load_strictly

TRAINED = {
    "stage_a": ("stage_a",),
    "semantic": ("semantic", "previewer"),
    "image_encoder": ("image_encoder",),
    "stage_b": ("stage_b",),
    "stage_c": ("stage_c",),
}  # parts that a recipe trains
LATENT = 32  # pixels of a training picture for one number of its semantic latents


def following_init(settings: RunSettings) -> RunSettings:
    """The settings with what the weights they begin with decide. Raises SettingsError when there are none."""
    if settings.recipe == "lora":
        taught = describe_part(find_model(settings.lora.model).stage_c, "stage_c").settings
        return settings.model_copy(update={"data": sized_for(settings.data, taught)})
    if settings.init is None or settings.recipe not in TRAINED:
        return settings
    trained = TRAINED[settings.recipe]
    known = settings.parts.model_fields_set
    others = [part for part in type(settings.parts).model_fields if part not in (*trained, *known)]
    parts = {part: path for part in others if (path := beside(settings, part)) is not None}
    settings = settings.model_copy(update={"parts": settings.parts.model_copy(update=parts)})
    stated = describe_start(settings, trained[0])
    if stated is None or settings.recipe not in ("stage_b", "stage_c"):
        return settings
    return following_stated(settings, stated.settings)


def following_stated(settings: RunSettings, stated: Mapping[str, Any]) -> RunSettings:
    """The settings of Stage B or C with what the file of its first weights says about generation."""
    diffusion = settings.diffusion
    prediction = diffusion.prediction
    if "prediction" not in diffusion.model_fields_set:
        prediction = stated.get("prediction", prediction)
    sampling = {name: value for name, value in stated.items() if name != "prediction"} | diffusion.sampling
    changed = diffusion.model_copy(update={"prediction": prediction, "sampling": sampling})
    return settings.model_copy(update={"diffusion": changed, "data": sized_for(settings.data, stated)})


def sized_for(data: DataSettings, stated: Mapping[str, Any]) -> DataSettings:
    """The pictures' size where none is asked for: that of the latents the model draws by default."""
    if "size" in data.model_fields_set or "default_size" not in stated:
        return data
    side = stated["default_size"][0] / float(stated.get("pixels_per_latent", LATENT))
    return data.model_copy(update={"size": LATENT * round(side)})


def start_path(settings: RunSettings, part: str) -> Path:
    """The file with the weights `part` begins with. Raises SettingsError when there is none."""
    assert settings.init is not None
    return part_path(part, settings.init, "init")


def beside(settings: RunSettings, part: str) -> str | None:
    """Another part of the model that `init` names, None where it is a file or has none."""
    assert settings.init is not None
    if Path(settings.init).is_file() or (part not in NETWORKS and not part.endswith("_encoder")):
        return None
    try:
        return str(part_path(part, settings.init, "init"))
    except (SettingsError, CheckpointError):
        return None


def describe_start(settings: RunSettings, part: str) -> PartInfo | None:
    """What the file a part begins with says of itself; None for a part that begins anew."""
    if settings.init is None:
        return None
    path = start_path(settings, part)
    return describe_part(path, part) if part in NETWORKS else identify_info(path)


def identify_info(path: Path) -> PartInfo | None:
    """The metadata of one of our own files."""
    return part_info(identify(path)[0])


def network_config(settings: RunSettings, part: str, presets: Mapping[str, Any]) -> Any:
    """The config of a network that is trained: that of the weights it begins with, or the preset `size` where
    one is named; with the fields of `network` changed."""
    if settings.init is not None and "size" not in settings.model_fields_set and part in NETWORKS:
        base = read_part(start_path(settings, part), part).config
    elif settings.size not in presets:
        raise SettingsError(f'size "{settings.size}": {nearest(settings.size, presets)}.')
    else:
        base = presets[settings.size]
        if settings.init is not None and part == "stage_a":  # it belongs to the weights, whatever their size
            base = dataclasses.replace(base, scale=read_part(start_path(settings, part), part).config.scale)
    known = [field.name for field in dataclasses.fields(base)]
    for name in settings.network:
        if name not in known:
            raise SettingsError(f'network: unknown field "{name}"; {nearest(name, known)}.')
    changes = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.network.items()
    }
    return dataclasses.replace(base, **changes)


def trained_info(settings: RunSettings, part: str, network: nn.Module, extra: dict[str, Any]) -> PartInfo:
    """The metadata of a trained part, with the licence of the weights it began with; the loop fills in the
    step."""
    own = PartInfo(
        part=part,
        config=config_fields(network.config),
        settings=extra,
        recipe=settings.name or settings.recipe,
        licence=settings.licence,
        notice=settings.notice,
    )
    stated = describe_start(settings, part)
    if stated is None:
        return own
    joined = with_licence(stated, own)
    return dataclasses.replace(own, licence=joined.licence, notice=joined.notice)


def start_from(networks: Mapping[str, nn.Module], init: str) -> None:
    """Give networks the weights of `init`, converted to our names and their precision, tensor by tensor."""
    for part, network in networks.items():
        if part == "text_encoder":  # it comes with the frozen parts
            continue
        path = part_path(part, init, "init")
        tensors = read_part(path, part).tensors if part in NETWORKS else read_tensors(path, finite=True)
        load_strictly(network, tensors, str(path))
