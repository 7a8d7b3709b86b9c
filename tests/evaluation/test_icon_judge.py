from pathlib import Path

import pytest
import torch
from PIL import Image

from triptych.checkpoints.files import read_metadata
from triptych.data.shards import ShardIndex
from triptych.errors import CheckpointError, RequestError
from triptych.evaluation.icon_judge import LoadedJudge, judge_file, load_judge
from triptych.models.mobilenet import MobileNetV2

FIXTURE = Path(__file__).parents[2] / "recipes" / "tiny" / "fixture-64.tar"


@pytest.fixture(scope="module")
def judge() -> LoadedJudge:
    return load_judge()


def test_the_shipped_judge_knows_a_hundred_concepts_and_was_right_often_enough(judge: LoadedJudge) -> None:
    info = read_metadata(judge_file())
    assert len(judge.concepts) == len(set(judge.concepts)) == 100
    assert info.settings["accuracy"]["val"] >= 0.85
    assert "BSD-3-Clause" in info.licence
    assert "torchvision" in info.notice
    assert judge_file().stat().st_size < 7e6


def test_known_icons_rank_first(judge: LoadedJudge) -> None:
    icons = ShardIndex(FIXTURE, keep=lambda meta: meta.get("concept") in judge.concepts)
    samples = list(icons)
    ranks = judge.rank([s.image for s in samples], [s.meta["concept"] for s in samples])
    assert samples
    assert sum(rank == 1 for rank in ranks) >= 0.85 * len(ranks)


def test_ranks_do_not_depend_on_the_batch(judge: LoadedJudge) -> None:
    images = [sample.image for sample in ShardIndex(FIXTURE)][:30]
    alone = torch.cat([judge.scores([image]) for image in images[:3]])
    assert torch.allclose(judge.scores(images)[:3], alone, atol=1e-3)
    mixed = [images[0], images[1].resize((320, 192))]
    assert judge.scores(mixed).shape == (2, 100)
    assert judge.features(mixed).shape == (2, 1280)


def test_concepts_outside_the_list_are_refused(judge: LoadedJudge) -> None:
    with pytest.raises(RequestError, match="does not know 'a dodecahedron'"):
        judge.rank([Image.new("RGB", (64, 64))], ["a dodecahedron"])


def test_another_part_is_refused(tiny_cascade: Path) -> None:
    with pytest.raises(CheckpointError, match="an icon judge was expected"):
        load_judge(tiny_cascade / "stage_a.safetensors")


def test_the_backbone_has_torchvisions_names_and_size() -> None:
    network = MobileNetV2()
    names = network.state_dict()
    assert sum(p.numel() for p in network.parameters()) == 2_223_872
    assert names["features.0.0.weight"].shape == (32, 3, 3, 3)
    assert names["features.1.conv.0.0.weight"].shape == (32, 1, 3, 3)
    assert names["features.17.conv.2.weight"].shape == (320, 960, 1, 1)
    assert names["features.18.1.running_var"].shape == (1280,)
    middle, last = network.eval().maps(torch.rand(1, 3, 96, 64))
    assert middle.shape == (1, 96, 6, 4)
    assert last.shape == (1, 1280, 3, 2)
