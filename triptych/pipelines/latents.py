"""A picture as latents, in memory and in a file: what `encode` makes and `decode` takes.

The file is a safetensors file with `latents_c` (1,16,h,w) and, if asked for, `latents_b` (1,4,H,W), float32.
Its metadata is that of our other files: the part "latents", with the picture's size and the model's name
among its settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from triptych.checkpoints.files import check_finite, read_tensors, write_tensors
from triptych.checkpoints.headers import PartInfo, part_info, read_header
from triptych.errors import CheckpointError, RequestError
from triptych.sizes import latent_size_b, latent_size_c

PART = "latents"
CHANNELS_C, CHANNELS_B = 16, 4


@dataclass(frozen=True)
class Latents:
    """One picture, encoded. `size` is its width and height in pixels, `model` the model that made it."""

    latents_c: Tensor  # (1,16,h,w)
    size: tuple[int, int]
    model: str
    pixels_per_latent: float
    latents_b: Tensor | None = None  # (1,4,H,W)
    licence: str = ""  # of the model
    notice: str = ""

    def save(self, path: Path | str) -> Path:
        """Write a new safetensors file. Raises RequestError when `path` exists, CapacityError when it does
        not fit on the disk."""
        path = Path(path)
        if path.exists():
            raise RequestError(f"{path} is there already; choose another --out.")
        tensors = {"latents_c": self.latents_c}
        if self.latents_b is not None:
            tensors["latents_b"] = self.latents_b
        settings = {"size": list(self.size), "model": self.model, "pixels_per_latent": self.pixels_per_latent}
        info = PartInfo(PART, settings=settings, licence=self.licence, notice=self.notice)
        write_tensors(path, tensors, info.to_metadata())
        return path

    @classmethod
    def load(cls, path: Path | str) -> Latents:
        """Read what `save` wrote. Raises CheckpointError for any other file, and for NaN in it."""
        header = read_header(path)
        info = part_info(header)
        if info is None or info.part != PART:
            found = "nothing that triptych wrote" if info is None else info.part
            raise CheckpointError(
                f"{path} holds {found}; latents were expected, as `triptych encode` writes them."
            )
        try:
            width, height = (int(side) for side in info.settings["size"])
            ratio, model = float(info.settings["pixels_per_latent"]), str(info.settings["model"])
            expected: dict[str, tuple[int, ...]] = {
                "latents_c": (1, CHANNELS_C, *latent_size_c(height, width, ratio))
            }
        except (KeyError, TypeError, ValueError, ArithmeticError):
            raise CheckpointError(f"{path} does not say which size and model its latents have.") from None
        if "latents_b" in header.shapes:
            expected["latents_b"] = (1, CHANNELS_B, *latent_size_b(height, width))
        if dict(header.shapes) != expected:
            raise CheckpointError(
                f"{path} holds {_shapes(dict(header.shapes))}; a picture of {width}x{height} has "
                f"{_shapes(expected)}."
            )
        tensors = {name: tensor.float().clone() for name, tensor in read_tensors(path, header=header).items()}
        check_finite(tensors, path)
        latents_b = tensors.get("latents_b")
        return cls(tensors["latents_c"], (width, height), model, ratio, latents_b, info.licence, info.notice)


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name[:40]} {shape}" for name, shape in list(shapes.items())[:3])
