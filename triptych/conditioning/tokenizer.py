"""Text to token windows: CLIP byte pairs and BERT word pieces, through the tokenizers library.

A tower reads windows of fixed length: a start token, the content, an end token, padding. Longer text goes on
in the next window; nothing is cut. Text is taken literally: brackets, weights and the names of special
tokens are ordinary characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from triptych.errors import CheckpointError

MINILM_WINDOW = 32  # captions of drawings rarely pass 20 word pieces
CLIP_WINDOW = 77  # the positions that the published towers were trained with
CLIP_WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # the split rule of CLIP's tokenizer
)


@dataclass(frozen=True)
class Window:
    """One window of token ids; `mask` is True up to and including the end token."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]


class Tokenizer:
    """Splits text into windows of `window` tokens, `window - 2` of them content."""

    def __init__(self, words: tokenizers.Tokenizer, start: str, end: str, pad: str, window: int) -> None:
        words.no_padding()
        words.no_truncation()
        words.encode_special_tokens = True  # a prompt that spells a special token means those letters
        self.words = words
        self.window = window
        self.start, self.end, self.pad = (self._known(token) for token in (start, end, pad))
        self.learned: dict[str, tuple[int, ...]] = {}  # a name such as [mydog] -> the tokens it stands for

    def _known(self, token: str) -> int:
        number = self.words.token_to_id(token)
        if number is None:
            raise CheckpointError(f"The tokenizer has no token {token!r}: it belongs to another text tower.")
        return int(number)

    @property
    def size(self) -> int:
        """How many rows an embedding table needs for these tokens."""
        return max(int(self.words.get_vocab_size()), self.start + 1, self.end + 1, self.pad + 1)

    def ids(self, text: str) -> list[int]:
        """The tokens of `text` alone, without start, end and padding. A broken surrogate reads as "?"."""
        whole = text.encode("utf-8", "replace").decode("utf-8")
        if not self.learned:
            return self._plain_ids(whole)
        names = "|".join(re.escape(name) for name in sorted(self.learned, key=len, reverse=True))
        ids: list[int] = []
        for piece in re.split(f"({names})", whole):
            ids += self.learned.get(piece) or self._plain_ids(piece)
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.words.encode(text, add_special_tokens=False).ids)

    def count_windows(self, text: str) -> int:
        """How many windows `text` fills; at least one."""
        return max(1, -(-len(self.ids(text)) // (self.window - 2)))

    def windows(self, text: str) -> list[Window]:
        """The windows of `text`, in order; one for the empty text."""
        ids = self.ids(text)
        size = self.window - 2
        return [self._wrap(ids[at : at + size]) for at in range(0, max(1, len(ids)), size)]

    def _wrap(self, content: Sequence[int]) -> Window:
        padding = self.window - 2 - len(content)
        ids = (self.start, *content, self.end, *[self.pad] * padding)
        return Window(ids, (*[True] * (len(content) + 2), *[False] * padding))


def wordpiece_tokenizer(path: Path | str, window: int = MINILM_WINDOW) -> Tokenizer:
    """BERT word pieces from a `tokenizer.json`. Raises CheckpointError if it is missing or foreign."""
    return Tokenizer(_read(Path(path)), "[CLS]", "[SEP]", "[PAD]", window)


def clip_tokenizer(folder: Path | str, window: int = CLIP_WINDOW) -> Tokenizer:
    """CLIP byte pairs from the hub's `tokenizer/` folder: `tokenizer.json`, or `vocab.json` and `merges.txt`.

    Padding is whatever the folder's `special_tokens_map.json` or `tokenizer_config.json` says (the published
    tower pads with the end token). Raises CheckpointError when a file is missing or foreign.
    """
    folder = Path(folder)
    folder = folder.parent if folder.is_file() else folder
    named = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for key, token in _read_json(folder / name).items():
            if key in named and token:
                named[key] = token["content"] if isinstance(token, dict) else str(token)
    if (folder / "tokenizer.json").is_file():
        words = _read(folder / "tokenizer.json")
    else:
        words = _byte_pairs(folder)
        words.add_special_tokens(list(dict.fromkeys(named.values())))
    return Tokenizer(words, named["bos_token"], named["eos_token"], named["pad_token"], window)


def _byte_pairs(folder: Path) -> tokenizers.Tokenizer:
    """CLIP's tokenizer [Radford 2021]: lower-cased words, byte pairs that know where a word ends."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise CheckpointError(f"{folder} has neither tokenizer.json nor vocab.json with merges.txt.")
    try:
        pairs = models.BPE.from_file(
            str(vocabulary), str(merges), end_of_word_suffix="</w>", unk_token="<|endoftext|>"
        )
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{folder} holds no CLIP tokenizer: {error}.") from error
    words = tokenizers.Tokenizer(pairs)
    words.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return words


def _read(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; it should be the tokenizer of the text tower.")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a tokenizer file: {error}.") from error


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    return content if isinstance(content, dict) else {}
