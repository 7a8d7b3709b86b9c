"""Windows of tokens: nothing is cut, nothing is interpreted, nothing crashes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_folders import write_tokenizer

import triptych
from triptych.conditioning.tokenizer import Tokenizer, clip_tokenizer, wordpiece_tokenizer
from triptych.errors import CheckpointError

SHIPPED = Path(triptych.__file__).parent / "weights" / "mini" / "tokenizer.json"
WORDS = wordpiece_tokenizer(SHIPPED)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "tokenizer"
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Tokenizer:
    return clip_tokenizer(clip_folder)


def check_windows(tokenizer: Tokenizer, text: str) -> None:
    windows = tokenizer.windows(text)
    content = []
    for window in windows:
        real = sum(window.mask)
        assert len(window.ids) == len(window.mask) == tokenizer.window
        assert all(window.mask[:real])
        assert window.ids[0] == tokenizer.start
        assert window.ids[real - 1] == tokenizer.end
        assert set(window.ids[real:]) <= {tokenizer.pad}
        content += window.ids[1 : real - 1]
    assert content == tokenizer.ids(text)
    assert len(windows) == tokenizer.count_windows(text)
    assert tokenizer.start not in content
    assert tokenizer.end not in content


any_text = st.one_of(
    st.text(max_size=300),
    st.text(alphabet="()[]{}<>:|\\ 0123456789.ab", max_size=100),
    st.lists(
        st.sampled_from(["[SEP]", "[CLS]", "[PAD]", "<|endoftext|>", "(a:1.3)", "ſ", "🦊", "\x00", "\ud800"])
    ).map("".join),
    st.builds(lambda word, times: word * times, st.text(min_size=1, max_size=8), st.integers(1, 2000)),
)


@settings(max_examples=500, deadline=None)
@given(any_text)
def test_any_text_makes_whole_windows(text: str) -> None:
    check_windows(WORDS, text)


@settings(max_examples=500, deadline=None)
@given(any_text)
def test_any_text_makes_whole_clip_windows(clip: Tokenizer, text: str) -> None:
    check_windows(clip, text)


def test_the_content_of_a_window_is_thirty_tokens() -> None:
    assert [WORDS.count_windows("fox " * n) for n in (0, 1, 30, 31, 60, 61)] == [1, 1, 1, 2, 2, 3]
    assert WORDS.windows("fox " * 31)[1].mask == (*[True] * 3, *[False] * 29)


def test_names_of_special_tokens_are_letters(clip: Tokenizer) -> None:
    assert len(WORDS.ids("[SEP]")) == 3
    assert len(clip.ids("<|endoftext|>")) > 1


def test_weights_in_prompts_are_letters() -> None:
    assert WORDS.ids("(fox:1.3)") == WORDS.ids("( fox : 1 . 3 )")
    assert WORDS.ids("[fox]") != WORDS.ids("fox")


def test_clip_tokens_equal_the_transformers_library(clip_folder: Path, clip: Tokenizer) -> None:
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(clip_folder)
    for text in ("", "A fox in SNOW", "it's  3 foxes,\n(two:1.5) [red]", "naïve 狐 🦊", "x" * 500):
        assert clip.ids(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_vocabulary_and_merges_are_enough(clip_folder: Path, clip: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "whole")
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (plain / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    bare = clip_tokenizer(plain)
    assert (bare.start, bare.end, bare.pad) == (clip.start, clip.end, clip.pad)
    for text in ("A fox in SNOW", "it's  3 foxes,\n(two:1.5)", "naïve 狐 🦊", "ǅ İ ſ"):
        assert bare.ids(text) == clip.ids(text)


def test_messages(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        wordpiece_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer file"):
        wordpiece_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="neither"):
        clip_tokenizer(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no token"):
        clip_tokenizer(SHIPPED)
