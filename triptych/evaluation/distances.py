"""Distances between two sets of pictures, in the features (N,D) of any network.

A number means something only beside the name of its network: Fréchet and kernel distances in Inception's
features are the published FID and KID, in DINOv2's the FD-DINOv2, and `cmmd` in CLIP's is CMMD. Everything is
computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.errors import DataError

KID_SUBSETS, KID_SIZE = 100, 1000  # [Binkowski 2018, section 4]
CMMD_BANDWIDTH, CMMD_SCALE = 10.0, 1000.0  # [Jayasumana 2024, section 4]
NEIGHBOURS = 3  # [Kynkäänniemi 2019, section 3]
ROWS = 1024  # compared at once, which bounds the memory


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Distance of two sets of features taken as Gaussian [Heusel 2017, eq. 6]: FID over Inception's.

    The covariances need more pictures than features to be full; with fewer, compare only sets of equal size.
    """
    a, b = _checked(a, b)
    gap = (a.mean(0) - b.mean(0)).square().sum()
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    # The roots of the eigenvalues of cov_a cov_b are singular values of root_a root_b^T: no root is taken of
    # rounded zeros, which are many when there are fewer pictures than features.
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return float(gap + root_a.square().sum() + root_b.square().sum() - 2 * cross)


def _covariance_root(x: Tensor) -> Tensor:
    """R with R^T R the covariance of the rows of x."""
    triangle: Tensor = torch.linalg.qr(x - x.mean(0), mode="r").R
    return triangle / (len(x) - 1) ** 0.5


def kernel_distance(
    a: Tensor, b: Tensor, subsets: int = KID_SUBSETS, size: int = KID_SIZE, seed: int = 0
) -> tuple[float, float]:
    """Mean and deviation over subsets of the unbiased squared MMD, cubic kernel [Binkowski 2018, eq. 3].

    KID over Inception's features. Subsets have `size` pictures of each set, or all of the smaller one.
    """
    a, b = _checked(a, b)
    size = min(size, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        some_a = a[torch.randperm(len(a), generator=generator)[:size]]
        some_b = b[torch.randperm(len(b), generator=generator)[:size]]
        found.append(_cubic_mmd(some_a, some_b))
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def _cubic_mmd(x: Tensor, y: Tensor) -> float:
    """Both sets have the same number of rows; k(u, v) = (u·v / D + 1)^3."""
    width, count = x.shape[1], len(x)

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / width + 1) ** 3

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (count * (count - 1))
    return float(within - 2 * xy.mean())


def cmmd(a: Tensor, b: Tensor) -> float:
    """1000 times the squared MMD of unit vectors with a Gaussian kernel [Jayasumana 2024, eq. 4].

    CMMD over CLIP's image embeddings (ViT-L/14 at 336 pixels). Unlike FID it assumes no distribution and is
    steady from a few thousand pictures on. Like its authors', the estimate keeps pairs of a picture with
    itself.
    """
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in _checked(a, b))

    def mean_kernel(u: Tensor, v: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(u), ROWS):
            squares = (2 - 2 * u[start : start + ROWS] @ v.T).clamp(min=0)
            total += torch.exp(-squares / (2 * CMMD_BANDWIDTH**2)).sum()
        return total / (len(u) * len(v))

    return CMMD_SCALE * float(mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))


@dataclass(frozen=True)
class Coverage:
    """Shares in [0,1]. `precision`: of the made pictures, those that look like real ones; `recall`: of the
    real ones, those that the made ones reach."""

    precision: float
    recall: float


def precision_recall(real: Tensor, made: Tensor, neighbours: int = NEIGHBOURS) -> Coverage:
    """Shares of each set within reach of the other [Kynkäänniemi 2019, eq. 1 and 2].

    A picture is within reach of a set when it is nearer to some member than that member's `neighbours`-th
    nearest neighbour in the set.
    """
    real, made = _checked(real, made)
    least = min(len(real), len(made))
    if least <= neighbours:
        raise DataError(f"Precision and recall need more than {neighbours} pictures a set, got {least}.")
    return Coverage(_within(made, real, neighbours), _within(real, made, neighbours))


def _within(points: Tensor, members: Tensor, neighbours: int) -> float:
    radii = torch.cat(
        [
            torch.cdist(members[start : start + ROWS], members).kthvalue(neighbours + 1, dim=1).values
            for start in range(0, len(members), ROWS)
        ]
    )
    inside = 0
    for start in range(0, len(points), ROWS):
        inside += int((torch.cdist(points[start : start + ROWS], members) <= radii).any(1).sum())
    return inside / len(points)


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 on the CPU. Raises DataError for sets that cannot be compared."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise DataError(
            f"Features of one network are needed, got shapes {tuple(a.shape)} and {tuple(b.shape)}."
        )
    if min(len(a), len(b)) < 2:
        raise DataError(f"Distances need at least 2 pictures a set, got {len(a)} and {len(b)}.")
    return a.double().cpu(), b.double().cpu()
