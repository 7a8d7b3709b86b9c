"""Names and shapes of the published networks, as recorded from the official code."""

from __future__ import annotations

import json
import math
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "reference" / "manifests"


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of one published file."""
    content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    shapes = content.get("shapes", content)
    # A LoRA file has as many learned tokens as were trained; two stand for any.
    return {key: tuple(2 if side == "n_tokens" else side for side in shape) for key, shape in shapes.items()}


def write_header_only(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> Path:
    """A safetensors file of full size that takes no disk: the weights are a hole, all zeros."""
    width = {"BF16": 2, "F32": 4}[dtype]
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path
