"""Write the small trained parts of LPIPS and DISTS, from torchmetrics' copies, for the package.

    python scripts/make_perceptual_heads.py

torchmetrics carries the authors' files unchanged: one weight a channel. The networks beneath them
(torchvision's AlexNet and VGG-16) are not part of either.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parents[1] / "triptych" / "weights" / "perceptual"


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    place = Path(str(files("torchmetrics.functional.image")))
    for kind in ("alex", "vgg"):
        heads = torch.load(place / "lpips_models" / f"{kind}.pth", weights_only=True, map_location="cpu")
        flat = {name.split(".")[0]: tensor.flatten().contiguous() for name, tensor in heads.items()}
        save_file(flat, OUT / f"lpips_{kind}.safetensors")
    dists = torch.load(place / "dists_models" / "weights.pt", weights_only=True, map_location="cpu")
    flat = {name: tensor.detach().flatten().contiguous() for name, tensor in dists.items()}
    save_file(flat, OUT / "dists.safetensors")


if __name__ == "__main__":
    main()
