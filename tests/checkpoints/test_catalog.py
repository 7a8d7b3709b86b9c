"""Models by name and by folder: what is found, what is said when it is not."""

from __future__ import annotations

import shutil

import pytest
from manifests import manifest, write_header_only
from published_folders import write_diffusers, write_hub_cache, write_official

from triptych.checkpoints import hub
from triptych.checkpoints.catalog import PUBLISHED_NOTICE, find_model, published_files, scan
from triptych.errors import CheckpointError


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("m") / "official", semantic=True)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_all_parts_of_a_folder_are_found_by_their_contents(official, tmp_path):
    folder = shutil.copytree(official, tmp_path / "renamed")
    for index, path in enumerate(sorted(folder.glob("*.safetensors"))):
        path.rename(folder / f"weights-{index}.safetensors")
    files = find_model(folder)
    assert None not in (files.semantic, files.previewer, files.image_encoder)
    assert files.text_encoder == folder / "text_encoder"
    assert files.tokenizer == folder / "tokenizer"


def test_decoder_folder_finds_the_prior_beside_it(tmp_path):
    root = write_diffusers(tmp_path / "both")
    files = find_model(root / "stable-cascade")
    assert files.stage_c.parent == root.resolve() / "stable-cascade-prior" / "prior"
    assert find_model(root).stage_b == root / "stable-cascade" / "decoder" / files.stage_b.name


def test_a_missing_part_is_named(official, tmp_path):
    folder = shutil.copytree(official, tmp_path / "part")
    (folder / "stage_b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no stage_b .* Give it with --stage-b"):
        find_model(folder)
    files = find_model(folder, stage_b=official / "stage_b.safetensors")
    assert files.stage_b == official / "stage_b.safetensors"


def test_a_damaged_part_is_reported_rather_than_missed(official, tmp_path):
    folder = shutil.copytree(official, tmp_path / "damaged")
    content = (folder / "stage_b.safetensors").read_bytes()
    (folder / "stage_b.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        find_model(folder)


def test_sizes_choose_among_several_files(tmp_path):
    for name in ("stage_c", "stage_c_lite"):
        write_header_only(tmp_path / f"{name}.safetensors", manifest(name))
    other = {part: tmp_path for part in ("stage_b", "stage_a", "text_encoder")}
    assert scan(tmp_path, {}, other)["stage_c"].name == "stage_c.safetensors"
    assert scan(tmp_path, {"stage_c": "1b"}, other)["stage_c"].name == "stage_c_lite.safetensors"
    (tmp_path / "stage_c_lite.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r'no stage_c "1b"; it has 3\.6b'):
        scan(tmp_path, {"stage_c": "1b"}, other)


def test_sixteen_bit_files_are_preferred(tmp_path):
    write_header_only(tmp_path / "stage_c.safetensors", manifest("stage_c_lite"), "F32")
    write_header_only(tmp_path / "stage_c_bf16.safetensors", manifest("stage_c_lite"), "BF16")
    other = {part: tmp_path for part in ("stage_b", "stage_a", "text_encoder")}
    assert scan(tmp_path, {}, other)["stage_c"].name == "stage_c_bf16.safetensors"


def test_unknown_names_list_the_known_ones_and_the_nearest(official):
    with pytest.raises(CheckpointError, match=r'did you mean "cascade-lite"\? Known: mini, cascade'):
        find_model("cascade-light")
    with pytest.raises(CheckpointError, match=r"no file 2b for stage_c; .*Known: 3\.6b, 1b"):
        find_model(official, stage_c="2b")


def test_published_files_mix_sizes():
    files = published_files("cascade", stage_c="1b")
    assert files["stage_c"] == ("stabilityai/stable-cascade", "stage_c_lite_bf16.safetensors")
    assert files["stage_b"] == ("stabilityai/stable-cascade", "stage_b_bf16.safetensors")


def test_without_a_network_there_is_one_sentence_and_the_licence_is_said_once(empty_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = []
    for _ in range(2):
        with pytest.raises(CheckpointError, match="not on this machine and cannot be downloaded") as caught:
            find_model("cascade", say=said.append)
        assert "\n" not in str(caught.value)
    assert said == [PUBLISHED_NOTICE]
    assert (empty_cache / hub.TOLD_MARK).exists()


def test_a_downloaded_model_is_found_in_the_cache(empty_cache):
    """A cache filled by hand, in the hub's own form."""
    snapshot, prior = write_hub_cache(empty_cache)
    said = []
    files = find_model("cascade-lite", say=said.append)
    assert files.stage_c == snapshot / "stage_c_lite_bf16.safetensors"
    assert files.image_encoder == prior / "image_encoder"
    assert files.tokenizer == snapshot / "tokenizer"
    assert "Non-Commercial" in files.licence
    assert said == []


def test_a_folder_of_pickles_says_so(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04" + b"\0" * 60)
    with pytest.raises(CheckpointError, match="never opens them"):
        find_model(tmp_path)
