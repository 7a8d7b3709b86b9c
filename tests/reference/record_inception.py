"""Records inception.safetensors: pictures, and what pytorch-fid and torch-fidelity make of them.

Needs `pip install pytorch-fid==0.3.0 torch-fidelity==0.4.0` with torchvision, which the project itself never
installs. Run in the folder `tests`: python reference/record_inception.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from formula_weights import weights_by_formula
from pytorch_fid import inception
from pytorch_fid.fid_score import calculate_frechet_distance
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

SIZES = {"real": (48, 64), "made": (72, 40)}  # height and width
COUNT = 5


def pictures(seed: int, height: int, width: int) -> torch.Tensor:
    """Uint8 (COUNT,H,W,3): coarse random colours, smoothed, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(COUNT, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    noisy = smooth + 0.1 * torch.rand(smooth.shape, generator=generator)
    return (noisy / 1.1 * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def record(path: Path) -> None:
    layout: dict[str, list[int]] = {}

    def by_formula(url: str, progress: bool = True) -> dict[str, torch.Tensor]:
        return weights_by_formula(layout)

    network = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    for name, tensor in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):  # which the published file does not have either
            layout[name] = list(tensor.shape)
    inception.load_state_dict_from_url = by_formula
    theirs = inception.InceptionV3().eval()
    tensors: dict[str, torch.Tensor] = {}
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        shown = pictures(seed, height, width)
        with torch.no_grad():
            pooled = theirs(shown.permute(0, 3, 1, 2).float() / 255)[0]
        tensors |= {f"{name} pictures": shown, f"{name} features": pooled[:, :, 0, 0].contiguous()}
    a, b = (tensors[f"{name} features"].double() for name in SIZES)
    told = [(x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)) for x in (a, b)]
    kid = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=COUNT, verbose=False)
    numbers = {
        "fid": float(calculate_frechet_distance(*told[0], *told[1])),
        "kid": kid[KEY_METRIC_KID_MEAN],
    }
    metadata = {
        "made with": "pytorch-fid 0.3.0 and torch-fidelity 0.4.0, weights_by_formula",
        "numbers": json.dumps(numbers),
        "layout": json.dumps(layout),
    }
    save_file(tensors, path, metadata)
    print(numbers, a.std(0).mean(), a.mean(), (a - b).abs().mean(), path.stat().st_size)


if __name__ == "__main__":
    record(Path(__file__).with_name("inception.safetensors"))
