"""Where the weights of published judges lie, and how to get them: nothing is ever downloaded from here.

A judge's files are in FOLDER/NAME, where FOLDER is the user's (`--weights`, or `judge_weights` of a study).
`NEEDS` says which files and the commands that fetch them; a missing one is told with those commands.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from triptych.checkpoints.files import read_tensors
from triptych.errors import CheckpointError, nearest

VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIT_L = "openai/clip-vit-large-patch14"
TORCHVISION = "https://download.pytorch.org/models"
AESTHETIC = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main"
PYTORCH_FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
INCEPTION = "pt_inception-2015-12-05-6726825d"
PICKLED = (".pt", ".pth", ".bin")
HUB = ("config.json", "model.safetensors")
WORDS = "tokenizer.json"


@dataclass(frozen=True)
class Needs:
    """A published judge: what its number says, its files (patterns), their size and how to get them."""

    says: str
    files: tuple[str, ...]
    size: str
    commands: tuple[str, ...]  # {place} stands for the judge's folder


NEEDS: dict[str, Needs] = {
    "clipscore": Needs(
        "agreement of picture and prompt, 0 to 100 [Hessel 2021]",
        (*HUB, WORDS),
        "1.7 GB",
        (f"hf download {VIT_L} {' '.join(HUB)} {WORDS} --local-dir {{place}}",),
    ),
    "pickscore": Needs(
        "what people pick for a prompt, about 20 [Kirstain 2023]",
        (*HUB, WORDS),
        "4 GB",
        (
            f"hf download yuvalkirstain/PickScore_v1 {' '.join(HUB)} --local-dir {{place}}",
            f"hf download {VIT_H} {WORDS} --local-dir {{place}}",
        ),
    ),
    "hps": Needs(
        "what people prefer for a prompt, about 0.27 [Wu 2023]",
        ("HPS_v2*", "config.json", WORDS),
        "2 GB",
        (
            "hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir {place}",
            f"hf download {VIT_H} config.json {WORDS} --local-dir {{place}}",
        ),
    ),
    "imagereward": Needs(
        "how people rate it for a prompt, 0 the average, in deviations [Xu 2023]",
        ("ImageReward.*", WORDS),
        "1.8 GB",
        (
            "hf download THUDM/ImageReward ImageReward.pt --local-dir {place}",
            f"hf download google-bert/bert-base-uncased {WORDS} --local-dir {{place}}",
        ),
    ),
    "aesthetic": Needs(
        "looks without the prompt, 1 to 10 [LAION, improved-aesthetic-predictor]",
        (*HUB, "sac+logos+ava1-l14-linearMSE.*"),
        "1.7 GB",
        (
            f"hf download {VIT_L} {' '.join(HUB)} --local-dir {{place}}",
            "curl -L -o '{place}/sac+logos+ava1-l14-linearMSE.pth' "
            f"'{AESTHETIC}/sac%2Blogos%2Bava1-l14-linearMSE.pth'",
        ),
    ),
    "lpips": Needs(
        "difference to the eye from the original, 0 for none [Zhang 2018]",
        ("alex*.*|vgg*.*",),
        "233 MB",
        (f"curl -L --create-dirs -o {{place}}/alexnet.pth {TORCHVISION}/alexnet-owt-7be5be79.pth",),
    ),
    "dists": Needs(
        "difference of structure and texture from the original, 0 for none [Ding 2020]",
        ("vgg*.*",),
        "528 MB",
        (f"curl -L --create-dirs -o {{place}}/vgg16.pth {TORCHVISION}/vgg16-397923af.pth",),
    ),
    "inception": Needs(
        "the features of FID and KID [Heusel 2017, Binkowski 2018]",
        ("pt_inception-2015-12-05*.safetensors",),
        "96 MB",
        (
            f"curl -L --create-dirs -o {{place}}/{INCEPTION}.pth {PYTORCH_FID}/{INCEPTION}.pth",
            'python -c "import torch, safetensors.torch as s; p = '
            f"'{{place}}/{INCEPTION}'; t = torch.load(p + '.pth', weights_only=True); "
            "s.save_file({{k: v.contiguous() for k, v in t.items()}}, p + '.safetensors')\"",
        ),
    ),
    "detector": Needs(
        "which objects a picture shows, where: any object detector of transformers trained on COCO",
        (*HUB, "preprocessor_config.json"),
        "172 MB",
        (f"hf download PekingU/rtdetr_r50vd {' '.join(HUB)} preprocessor_config.json --local-dir {{place}}",),
    ),
}


@dataclass(frozen=True)
class JudgeFiles:
    """A judge's folder, complete; `file` finds one of its files by pattern."""

    name: str
    folder: Path

    def file(self, pattern: str) -> Path:
        return next(iter(_matches(self.folder, pattern)))


def find_judge(name: str, weights: Path | None) -> JudgeFiles:
    """The files of a judge in WEIGHTS/NAME. Raises CheckpointError that says how to get what is missing."""
    if name not in NEEDS:
        raise CheckpointError(f'There is no judge "{name}": {nearest(name, NEEDS)}.')
    needs = NEEDS[name]
    place = (weights or Path("judges")) / name
    missing = [pattern for pattern in needs.files if not _matches(place, pattern)]
    if weights is None or missing:
        lacking = "no folder of weights was given" if weights is None else f"{place} lacks {missing[0]}"
        commands = "; ".join(command.format(place=place) for command in needs.commands)
        raise CheckpointError(
            f'"{name}" needs weights ({needs.size}) and {lacking}: fetch them with `{commands}` '
            f"and give --weights {place.parent}."
        )
    return JudgeFiles(name, place)


def _matches(folder: Path, patterns: str) -> list[Path]:
    return [path for pattern in patterns.split("|") for path in sorted(folder.glob(pattern))]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a .pt or .pth file, which may hold nothing but tensors.

    A dictionary "state_dict" inside is opened. Raises CheckpointError.
    """
    if path.suffix not in PICKLED:
        return read_tensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        said = str(error).splitlines()[0][:200]
        raise CheckpointError(f"{path} cannot be read as a file of tensors alone: {said}.") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; tensors by name were expected.")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def take(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give a network on the meta device its weights, in float32, and freeze it. Raises CheckpointError."""
    wanted = network.state_dict()
    for name, tensor in wanted.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            came = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise CheckpointError(
                f"{path} does not fit this judge: {name} should be {tuple(tensor.shape)}, and it has {came}."
            )
    network.load_state_dict({name: tensors[name].float() for name in wanted}, assign=True)
    for module in network.modules():  # counts that files do not store
        numbers = getattr(module, "position_ids", None)
        if isinstance(numbers, Tensor):
            module.position_ids = torch.arange(numbers.shape[-1])[None]
    network.eval().requires_grad_(False)
