"""Recorded latent sizes and aspect buckets, computed by triptych.sizes and triptych.data.buckets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triptych.data.buckets import Bucket, make_buckets, nearest_bucket, shorter_side
from triptych.sizes import latent_size_b, latent_size_c

# The release's default set, in steps of 8, has ratios and an order of its own; the recording's metadata
# gives the twelve ratios of the other sets only.
DEFAULT_RATIOS = (1 / 1, 1 / 2, 3 / 4, 3 / 5, 4 / 5, 2 / 3, 9 / 16)


def check_latent_sizes(golden: Any) -> dict[str, Tensor]:
    """Rows of picture size and both latent sizes."""
    rows = [
        (height, width, *latent_size_c(height, width), *latent_size_b(height, width))
        for height, width in golden["out.table"][:, :2].tolist()
    ]
    return {"out.table": torch.tensor(rows)}


def check_buckets(golden: Any) -> dict[str, Tensor]:
    """Ratios, canvases, and the bucket and resize of many picture sizes."""
    out: dict[str, Tensor] = {}
    for case in golden.config["cases"]:
        if case == "default":
            buckets = make_buckets(256, DEFAULT_RATIOS, factor=8)
        else:
            buckets = make_buckets(int(case), golden.config["ratios_given"])
        out[f"out.{case}.ratios"] = torch.tensor([b.ratio for b in buckets], dtype=torch.float64)
        out[f"out.{case}.sizes_hw"] = torch.tensor([(b.height, b.width) for b in buckets])
        sizes = golden[f"out.{case}.assign"][:, :2].tolist()
        out[f"out.{case}.assign"] = torch.tensor([_assigned(h, w, buckets) for h, w in sizes])
    return out


def _assigned(height: int, width: int, buckets: list[Bucket]) -> tuple[int, int, int, int, int]:
    bucket = buckets[nearest_bucket(height, width, buckets)]
    return height, width, bucket.height, bucket.width, shorter_side(height, width, bucket)


CHECKS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "latent_sizes": check_latent_sizes,
    "buckets": check_buckets,
}
