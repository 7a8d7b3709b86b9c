"""One weight file to one network: recognised, converted to our names, and assigned strictly.

The network is built on the meta device, where it costs nothing, and takes the file's memory-mapped tensors
as its parameters. Every name and every shape must fit; what does not is reported in one error that says how
much differs, shows examples, and names the size the file looks like.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triptych.checkpoints.catalog import PUBLISHED_LICENCE, PUBLISHED_NOTICE, PUBLISHED_SETTINGS
from triptych.checkpoints.files import check_finite, read_tensors
from triptych.checkpoints.fit import identify, refuse_wrong_part, refuse_wrong_size
from triptych.checkpoints.headers import Header, PartInfo, TensorEntry, part_info
from triptych.checkpoints.infer import infer_config
from triptych.checkpoints.int8 import SCALE, widen
from triptych.checkpoints.keys import converted_shapes, names_from_layout, split_comfyui
from triptych.checkpoints.precision import repair_float16
from triptych.checkpoints.sniff import Sniffed
from triptych.errors import CheckpointError
from triptych.models.controlnet import PUBLISHED_CONTROLNETS, ControlNet, ControlNetConfig
from triptych.models.pidinet import PiDiNet, PiDiNetConfig
from triptych.models.saliency import Saliency, SaliencyConfig
from triptych.models.semantic import (
    PREVIEWER,
    SEMANTIC,
    Previewer,
    PreviewerConfig,
    SemanticConfig,
    SemanticEncoder,
)
from triptych.models.stage_a import STAGE_A, StageA, StageAConfig
from triptych.models.stage_b import STAGE_B, StageB, StageBConfig
from triptych.models.stage_c import STAGE_C, StageC, StageCConfig

NETWORKS: dict[str, tuple[type[nn.Module], type[Any]]] = {
    "stage_a": (StageA, StageAConfig),
    "stage_b": (StageB, StageBConfig),
    "stage_c": (StageC, StageCConfig),
    "semantic": (SemanticEncoder, SemanticConfig),
    "previewer": (Previewer, PreviewerConfig),
    "controlnet": (ControlNet, ControlNetConfig),
    "saliency": (Saliency, SaliencyConfig),
    "pidinet": (PiDiNet, PiDiNetConfig),
}
SIZES: dict[str, Mapping[str, Any]] = {
    "stage_a": STAGE_A,
    "stage_b": STAGE_B,
    "stage_c": STAGE_C,
    "semantic": SEMANTIC,
    "previewer": PREVIEWER,
    "controlnet": PUBLISHED_CONTROLNETS,
    "saliency": {},
    "pidinet": {},
}
PUBLISHED_SIZES = (
    "3.6b",
    "1b",
    "1.5b",
    "700m",
    "full",
    *PUBLISHED_CONTROLNETS,
)  # weights of these sizes are Stability's
HINT_OF_CHANNELS = {
    1: "canny", 3: "pixel_super_resolution", 4: "inpainting", 16: "super_resolution", 512: "identity"
}  # fmt: skip  # of ControlNet files that do not say what they were trained on
LEFTOVER_SCALE = 0.3764  # Würstchen v2's, still in the hub's Cascade folders, where 0.43 is right
# Configuration fields that say how many layers there are.
LAYER_COUNTS = (
    "levels",
    "bottleneck_blocks",
    "down_blocks",
    "up_blocks",
    "down_repeats",
    "up_repeats",
    "patterns",
    "residual_blocks",
)
MARGIN = 64
NARROW_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclasses.dataclass(frozen=True)
class Part:
    """One part's tensors in our names, the configuration they fit, and what is known of them."""

    tensors: dict[str, Tensor]
    config: Any
    info: PartInfo
    layout: str


def load_part(
    path: str | os.PathLike[str],
    part: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    size: str | None = None,
    finite: bool = True,
) -> tuple[nn.Module, PartInfo]:
    """A network in eval mode with the weights of `path`, and what is known about them.

    path: a safetensors file in any layout of `keys.py`; a ComfyUI single file holds several parts.
    part: which part is wanted; None takes what is there. size: a published size it must have ("3.6b").
    dtype: of the floating weights; None keeps the file's, memory-mapped and untouched on a CPU. For float16
    the residual stream is rescaled first (`precision.py`); code that narrows later must do so itself.
    finite: look for NaN and infinity first, which reads the whole file.
    Raises `CheckpointError` for anything that is damaged, foreign, or made for another network.
    """
    contents = read_part(path, part, size=size)
    if finite:
        check_finite(contents.tensors, path)
    module = build_network(contents.info.part, contents.config, path)
    assign(module, contents.tensors, path, contents.info.size)
    module.eval()
    if dtype == torch.float16:
        repair_float16(module)
    if dtype is not None or torch.device(device).type != "cpu":
        module.to(device=device, dtype=dtype)
    return module, contents.info


def read_part(path: str | os.PathLike[str], part: str | None = None, *, size: str | None = None) -> Part:
    """The tensors of one part under our names, memory-mapped where possible, with its configuration."""
    header, sniffed, wanted = _recognise(path, part, size)
    tensors, layout = own_tensors(header, sniffed, wanted)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config, info = _describe(header, wanted, shapes)
    return Part(tensors, config, info, layout)


def describe_part(
    path: str | os.PathLike[str], part: str | None = None, *, size: str | None = None
) -> PartInfo:
    """What `read_part` would say of a part, from the header's names and shapes alone.

    No tensor is mapped, read or copied, so a file of any size costs the memory of its header. Arguments and
    errors are those of `read_part`, but for what only the tensors can show.
    """
    header, sniffed, wanted = _recognise(path, part, size)
    return _describe(header, wanted, layout_shapes(header, sniffed, wanted))[1]


def _recognise(
    path: str | os.PathLike[str], part: str | None, size: str | None
) -> tuple[Header, Sniffed, str]:
    """Header, contents and the network that is wanted of a file; errors for every other one."""
    header, sniffed = identify(path)
    refuse_wrong_part(header.path, sniffed, part)
    refuse_wrong_size(header.path, sniffed, size)
    wanted = part or sniffed.part
    if wanted not in NETWORKS:
        raise CheckpointError(
            f"{path} holds {wanted}, which is no network of the cascade by itself; "
            f"{', '.join(NETWORKS)} can be loaded."
        )
    return header, sniffed, wanted


def _describe(header: Header, part: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Any, PartInfo]:
    """Configuration and description of a part from its header and its shapes under our names."""
    stored = part_info(header, part)
    stored = stored if stored is not None and stored.part == part else None
    config = _config(header, stored, part, shapes)
    name = next((name for name, preset in SIZES[part].items() if preset == config), None)
    settings = dict(PUBLISHED_SETTINGS.get(part, {}))
    if part == "controlnet":
        settings = {"hint": HINT_OF_CHANNELS.get(config.channels, "unknown")}
    info = stored or PartInfo(part, settings=settings)
    if stored is None and name in PUBLISHED_SIZES:
        info = dataclasses.replace(info, licence=PUBLISHED_LICENCE, notice=PUBLISHED_NOTICE)
    return config, dataclasses.replace(info, part=part, config=config_fields(config), size=name or info.size)


def build_network(part: str, config: Any, path: str | os.PathLike[str]) -> nn.Module:
    """The network of a configuration on the meta device; an impossible one is the fault of the file."""
    network, _ = NETWORKS[part]
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # torch only warns of layers without any weight
            return network(config)
    except (
        RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, UserWarning,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} carries a configuration that makes no network: {reason}.") from None


def config_fields(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values."""
    fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return fields


def own_tensors(header: Header, sniffed: Sniffed, part: str) -> tuple[dict[str, Tensor], str]:
    """One part's tensors in our names, and the layout they had."""
    tensors = read_tensors(header.path, header=header)
    layout = sniffed.layout
    if layout == "comfyui_single":
        names = split_comfyui(tensors, sniffed.part)[part]
        tensors = {inner: tensors[name] for inner, name in names.items()}
        packed = any(name.endswith(".attention.attn.in_proj_weight") for name in tensors)
        layout = "official" if packed else "comfyui"
    if any(name.endswith(SCALE) for name in tensors):
        tensors = widen(tensors)
    if layout in ("transformers", "named"):
        return tensors, layout
    try:
        plan = names_from_layout(tensors, layout, part)
        return {ours: _stack([tensors[name] for name in names]) for ours, names in plan.items()}, layout
    except CheckpointError as error:
        raise CheckpointError(f"{header.path}: {error}") from None
    except RuntimeError:
        raise CheckpointError(
            f"{header.path}: the query, key and value matrices of an attention do not fit together."
        ) from None


def _stack(tensors: list[Tensor]) -> Tensor:
    stacked = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    # 8-bit floats are a way to store, not to compute.
    return stacked.to(torch.bfloat16) if stacked.dtype in NARROW_FLOATS else stacked


def _config(header: Header, stored: PartInfo | None, part: str, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """From our metadata, else from the diffusers config.json beside the file, else from the shapes."""
    _, config_class = NETWORKS[part]
    if stored is not None and stored.config:
        try:
            _check_counts(stored.config, len(shapes))
            return config_class(**stored.config)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise CheckpointError(
                f"{header.path} carries a configuration that makes no sense: {error}."
            ) from None
    beside = _diffusers_config(header.path)
    try:
        heads = beside.get("num_attention_heads")
        config = infer_config(part, shapes, tuple(max(int(h), 0) for h in heads) if heads else None)
        scale = float(beside.get("scale_factor", LEFTOVER_SCALE))
        if part == "stage_a" and scale != LEFTOVER_SCALE:
            config = dataclasses.replace(config, scale=scale)
        if part == "stage_c" and any(beside.get("switch_level") or ()):
            config = dataclasses.replace(config, level_switch=tuple(map(bool, beside["switch_level"])))
        return config
    except CheckpointError as error:
        raise CheckpointError(f"{header.path}: {error}") from None
    except (TypeError, ValueError):
        raise CheckpointError(f"{header.path.with_name('config.json')} does not fit {header.path}.") from None


def _check_counts(config: Mapping[str, Any], num_tensors: int) -> None:
    """Refuse a stored configuration that asks for far more layers than the file has tensors.

    Building a network takes time and memory for every layer, on the meta device too.
    """
    for name in LAYER_COUNTS:
        numbers = [n for n in _numbers(config.get(name, 0)) if n > 0]
        if sum(numbers) > num_tensors + MARGIN:
            raise ValueError(f"{name} asks for more layers than there are tensors")
    if isinstance(config.get("blocks"), list) and len(config["blocks"]) > num_tensors:
        raise ValueError("blocks are more than there are tensors")
    if sum(stage[-1] for stage in config.get("stages", ())) > num_tensors:
        raise ValueError("stages ask for more layers than there are tensors")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, str):
        yield len(value)
    elif isinstance(value, int | float):
        yield value


def _diffusers_config(path: Path) -> dict[str, Any]:
    """The config.json of a diffusers model folder, empty when there is none of its kind."""
    try:
        content = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if isinstance(content, dict) and content.get("_class_name") in ("StableCascadeUNet", "PaellaVQModel"):
        return content
    return {}


def assign(
    module: nn.Module, tensors: Mapping[str, Tensor], path: str | os.PathLike[str], size: str | None = None
) -> None:
    """Make `tensors` the parameters and buffers of `module`; one `CheckpointError` names every misfit."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    message = _misfit(expected, found)
    if message:
        label = f'{type(module).__name__} "{size}"' if size else type(module).__name__
        raise CheckpointError(f"{path} does not fit {label}: {message}.")
    module.load_state_dict(dict(tensors), strict=True, assign=True)


def _misfit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    other = [name for name in expected if name in found and expected[name] != found[name]]
    phrases = []
    if other:
        name = other[0]
        phrases.append(
            f"{len(other)} of {len(expected)} shapes differ ({name} is {found[name]} in the file, "
            f"{expected[name]} in the model)"
        )
    if missing:
        phrases.append(f"{len(missing)} of {len(expected)} names are missing ({_some(missing)})")
    if unknown:
        phrases.append(f"{len(unknown)} names are unknown ({_some(unknown)})")
    return " and ".join(phrases)


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:3])
    return shown + (", ..." if len(names) > 3 else "")


def layout_shapes(header: Header, sniffed: Sniffed, part: str) -> dict[str, tuple[int, ...]]:
    """Shapes of one part under our names, without touching the weights."""
    entries = header.entries
    shapes = {
        name: entry.shape
        for name, entry in entries.items()
        if not (name.endswith(SCALE) and _is_int8(entries.get(name.removesuffix(SCALE))))
    }
    layout = sniffed.layout
    if layout == "comfyui_single":
        names = split_comfyui(shapes, sniffed.part)[part]
        shapes = {inner: shapes[name] for inner, name in names.items()}
        packed = any(name.endswith(".attention.attn.in_proj_weight") for name in shapes)
        layout = "official" if packed else "comfyui"
    if layout in ("transformers", "named"):
        return shapes
    try:
        return converted_shapes(shapes, names_from_layout(shapes, layout, part))
    except CheckpointError as error:
        raise CheckpointError(f"{header.path}: {error}") from None


def _is_int8(entry: TensorEntry | None) -> bool:
    return entry is not None and entry.dtype == "I8"
