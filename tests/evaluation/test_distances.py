"""Distances between sets of pictures equal independent implementations on small inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import published_folders
import pytest
import torch
from PIL import Image
from scipy import linalg
from scipy.spatial.distance import cdist

from triptych.apps.cli.main import run
from triptych.data.shapes import draw_shapes
from triptych.errors import CheckpointError, DataError
from triptych.evaluation.distances import cmmd, frechet_distance, kernel_distance, precision_recall
from triptych.evaluation.features import compare_sets, features_of, open_features

RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(70, 12))
MADE = RNG.normal(0.3, 1.4, size=(60, 12)) @ np.diag(np.linspace(0.5, 1.5, 12))


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(REAL), torch.from_numpy(MADE)


def test_frechet_distance_equals_the_formula_with_scipys_matrix_root() -> None:
    cov_a, cov_b = np.cov(REAL.T), np.cov(MADE.T)
    root = linalg.sqrtm(cov_a @ cov_b).real
    gap = ((REAL.mean(0) - MADE.mean(0)) ** 2).sum()
    assert frechet_distance(*tensors()) == pytest.approx(gap + np.trace(cov_a + cov_b - 2 * root), rel=1e-9)


def test_frechet_and_kernel_distances_equal_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    kid = pytest.importorskip("torchmetrics.image.kid")
    a, b = tensors()
    theirs = fid._compute_fid(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))
    assert frechet_distance(a, b) == pytest.approx(float(theirs), rel=1e-6)
    ours, deviation = kernel_distance(a[:60], b, subsets=3)
    assert ours == pytest.approx(float(kid.poly_mmd(a[:60], b)), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)  # every subset is the whole


def test_frechet_distance_holds_with_fewer_pictures_than_features() -> None:
    a, b = torch.from_numpy(RNG.normal(size=(8, 30))), torch.from_numpy(RNG.normal(size=(8, 30)))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_the_kernel_distance_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(1)
    same = [
        kernel_distance(*(torch.randn(40, 6, generator=generator) for _ in range(2)), subsets=1)[0]
        for _ in range(200)
    ]
    assert np.mean(same) == pytest.approx(0, abs=3 * np.std(same) / np.sqrt(200))


def test_cmmd_equals_its_formula() -> None:
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (REAL, MADE))

    def mean_kernel(u: np.ndarray, v: np.ndarray) -> float:
        return float(np.exp(-cdist(u, v, "sqeuclidean") / 200).mean())

    theirs = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    assert cmmd(*tensors()) == pytest.approx(theirs, rel=1e-7)
    assert cmmd(tensors()[0], 3 * tensors()[0]) == pytest.approx(0, abs=1e-9)  # only directions count


def test_precision_and_recall_equal_counting() -> None:
    def reached(points: np.ndarray, members: np.ndarray) -> float:
        radii = np.sort(cdist(members, members), axis=1)[:, 3]
        return float((cdist(points, members) <= radii).any(1).mean())

    found = precision_recall(*tensors())
    assert found.precision == reached(MADE, REAL)
    assert found.recall == reached(REAL, MADE)
    assert 0 < found.precision < 1
    apart = precision_recall(tensors()[0], tensors()[0] + 100)
    assert (apart.precision, apart.recall) == (0, 0)


def test_sets_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="Features of one network"):
        frechet_distance(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(DataError, match="at least 2 pictures"):
        cmmd(torch.zeros(1, 4), torch.zeros(3, 4))
    with pytest.raises(DataError, match="more than 3 pictures"):
        precision_recall(torch.zeros(3, 4), torch.zeros(9, 4))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Six drawn shapes, and the same six as noise."""
    folder = tmp_path_factory.mktemp("sets")
    for name in ("real", "noisy"):
        (folder / name).mkdir()
    for seed in range(6):
        image = draw_shapes(seed, 64, 64).image
        image.save(folder / "real" / f"{seed}.png")
        noise = Image.effect_noise(image.size, 120).convert("RGB")
        Image.blend(image, noise, 0.7).save(folder / "noisy" / f"{seed}.jpg")
    return folder / "real", folder / "noisy"


def test_the_packaged_network_tells_noise_from_shapes(folders: tuple[Path, Path]) -> None:
    network = open_features("mobilenet")
    near, far = (compare_sets(folders[0], other, network) for other in folders)
    assert near["frechet"] == pytest.approx(0, abs=1e-5)
    assert far["frechet"] > 10
    assert far["cmmd"] > near["cmmd"]
    assert (near["precision"], near["recall"], near["features"]) == (1, 1, "mobilenet")


def test_a_clip_tower_in_a_folder_gives_its_embeddings(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    published_folders.write_image_encoder(tmp_path / "tower")
    network = open_features(str(tmp_path / "tower"))
    found = features_of(folders[0], network)
    assert found.shape == (6, published_folders.IMAGE_WIDTH)
    image = Image.open(folders[0] / "0.png").convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    mean, deviation = (
        np.array([0.48145466, 0.4578275, 0.40821073]),
        np.array([0.26862954, 0.26130258, 0.27577711]),
    )
    pixels = torch.from_numpy((np.asarray(image) / 255 - mean) / deviation).permute(2, 0, 1)[None].float()
    tower = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "tower").eval()
    with torch.no_grad():
        theirs = tower(pixel_values=pixels).image_embeds[0]
    assert torch.allclose(found[0], theirs, atol=1e-5)


def test_a_dinov2_in_a_folder_gives_its_pooled_output(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    found = features_of(folders[0], open_features(str(tmp_path / "dino")), count=4)
    assert found.shape == (4, 24)
    assert torch.isfinite(found).all()


def test_features_made_elsewhere_take_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "real.npy", REAL)
    np.save(tmp_path / "made.npy", MADE)
    np.save(tmp_path / "odd.npy", np.arange(4))
    arguments = ["evaluate", "distances", "--data", str(tmp_path / "real.npy"), "--pictures"]
    assert run([*arguments, str(tmp_path / "made.npy"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["frechet"] == pytest.approx(frechet_distance(*tensors()), rel=1e-5)
    assert found["features"] == "from files"
    assert run([*arguments, str(tmp_path / "odd.npy")]) == 2
    assert "floats (N,D) were expected" in capsys.readouterr().err


def test_a_network_that_is_not_here_says_how_to_get_it_and_is_not_replaced() -> None:
    with pytest.raises(CheckpointError, match=r"need facebook/dinov2-large \(1.2 GB\).*--download"):
        open_features("dinov2")
    assert open_features("dinov2, mobilenet").name == "mobilenet"  # because that was asked for
    with pytest.raises(CheckpointError, match="No feature network"):
        open_features("")
