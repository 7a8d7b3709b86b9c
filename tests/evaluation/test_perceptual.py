"""LPIPS and DISTS equal torchmetrics' over the same networks, whose layers are written out here by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from triptych.errors import CheckpointError
from triptych.evaluation.perceptual import open_distances
from triptych.models.perceptual import ALEXNET, VGG16, Trunk


def torchvision_alexnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
    )


def torchvision_vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 3
    for step in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if step == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(inputs, int(step), 3, padding=1), nn.ReLU()]
            inputs = int(step)
    return nn.Sequential(*layers)


NETWORKS = {"alexnet": torchvision_alexnet, "vgg16": torchvision_vgg16}


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, nn.Sequential], Path]:
    """Random networks as torchvision's files hold them, in the folders where the judges look."""
    folder = tmp_path_factory.mktemp("judges")
    made = {}
    for name, make in NETWORKS.items():
        torch.manual_seed(1)
        made[name] = make().eval()
        for parameter in made[name].parameters():
            if parameter.ndim > 1:  # activations that neither die nor explode
                nn.init.kaiming_normal_(parameter)
    for judge, name in (("lpips", "alexnet"), ("dists", "vgg16")):
        (folder / judge).mkdir()
        state = {f"features.{key}": value for key, value in made[name].state_dict().items()}
        torch.save({**state, "classifier.1.weight": torch.zeros(2)}, folder / judge / f"{name}.pth")
    return made, folder


@pytest.fixture
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    a = torch.rand(2, 3, 48, 64, generator=generator)
    return a, (a + 0.2 * torch.randn(a.shape, generator=generator)).clamp(0, 1)


def test_the_networks_have_the_published_numbers_of_weights() -> None:
    for config, count in ((ALEXNET, 2_469_696), (VGG16, 14_714_688)):
        assert sum(p.numel() for p in Trunk(config).parameters()) == count


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_lpips_equals_torchmetrics(
    kind: str,
    networks: tuple[dict[str, nn.Sequential], Path],
    pictures: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    made, folder = networks
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: made[net])
    if kind == "vgg":
        folder = tmp_path
        (folder / "lpips").mkdir()
        state = {f"features.{key}": value for key, value in made["vgg16"].state_dict().items()}
        save_file(state, folder / "lpips" / "vgg16.safetensors")
    (distance,) = open_distances(["lpips"], folder)
    assert distance.name == f"lpips {kind}"
    a, b = pictures
    with torch.no_grad():
        expected = theirs._LPIPS(net=kind, pnet_rand=True)(a, b, normalize=True).flatten()
    assert torch.allclose(distance.of(a, b), expected, rtol=1e-4, atol=1e-6)
    assert expected.min() > 0.01
    assert torch.allclose(distance.of(a, a), torch.zeros(2))


def test_dists_equals_torchmetrics(
    networks: tuple[dict[str, nn.Sequential], Path],
    pictures: tuple[torch.Tensor, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = pytest.importorskip("torchmetrics.functional.image.dists")
    made, folder = networks
    features = SimpleNamespace(features=made["vgg16"])
    monkeypatch.setattr(theirs, "_TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(theirs, "VGG16_Weights", SimpleNamespace(DEFAULT=None), raising=False)
    monkeypatch.setattr(theirs, "vgg16", lambda weights: features, raising=False)
    (distance,) = open_distances(["dists"], folder)
    a, b = pictures
    expected = theirs.DISTSNetwork()(a, b)
    assert torch.allclose(distance.of(a, b), expected, atol=2e-5)
    assert expected.min() > 0.01
    assert torch.allclose(distance.of(a, a), torch.zeros(2), atol=1e-6)


def test_what_is_missing_or_wrong_is_told_with_the_way_out(
    networks: tuple[dict[str, nn.Sequential], Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"needs weights \(528 MB\).*curl -L.*vgg16-397923af.pth"):
        open_distances(["dists"], tmp_path)
    with pytest.raises(CheckpointError, match=r"no folder of weights was given.*alexnet-owt"):
        open_distances(["lpips"], None)
    with pytest.raises(CheckpointError, match='did you mean "lpips"'):
        open_distances(["lpip"], tmp_path)
    (tmp_path / "dists").mkdir()
    torch.save({"features.0.weight": object}, tmp_path / "dists" / "vgg16.pth")
    with pytest.raises(CheckpointError, match="tensors alone"):
        open_distances(["dists"], tmp_path)
    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "dists" / "vgg16.pth")
    with pytest.raises(CheckpointError, match=r"no AlexNet or VGG-16: it has no features.0.weight"):
        open_distances(["dists"], tmp_path)
