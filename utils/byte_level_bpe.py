"""Byte-level BPE (GPT-2, RoBERTa) through tiktoken, which is several times as fast as the tokenizers library."""

import re

import numpy as np
import tiktoken
from tokenizers import pre_tokenizers

# How GPT-2 splits text into words, written so that nothing is tried twice.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
SEPARATOR = "<|\x00 between two texts \x00|>"
FIRST_MERGE = 256


class Unlike(Exception):
    """Why tiktoken would not encode as the tokenizer does."""


class ByteLevelBPE:
    """The encoding of texts that hold no added token of the tokenizer.

    description: the tokenizer as in its tokenizer.json. Raises Unlike where the ids could be others than its own.
    """

    def __init__(self, description: dict):
        _check_kind(description)
        ranks, self.ids = _read_merges(description["model"])
        self.separator = len(self.ids)
        self.encoding = tiktoken.Encoding(
            "byte-level BPE", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={SEPARATOR: self.separator}
        )
        contents = [token["content"] for token in description["added_tokens"]] + [SEPARATOR]
        self.added_token = re.compile("|".join(re.escape(content) for content in contents if content))

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts end to end, number of ids of each): int64 both. `added_token` is found in no text.

        Raises ValueError for a text that tiktoken's regular expressions cannot cope with.
        """
        # One call, and not one list of Python numbers for each text.
        ranks = self.encoding.encode_to_numpy(SEPARATOR.join(texts), allowed_special={SEPARATOR})
        ends = np.append(np.flatnonzero(ranks == self.separator), len(ranks))
        ids = self.ids[ranks[ranks != self.separator]]
        return ids, np.diff(ends, prepend=-1) - 1


def _check_kind(description: dict) -> None:
    model, splits = description["model"], description["pre_tokenizer"]
    if model["type"] != "BPE":
        raise Unlike(f"its model is {model['type']}, not byte-level BPE")
    if description["normalizer"] is not None:
        raise Unlike("it has a normalizer")
    if not splits or splits["type"] != "ByteLevel" or not splits.get("use_regex", True):
        raise Unlike("its pre-tokenizer is not GPT-2's")
    if splits["add_prefix_space"]:
        raise Unlike("it adds a space before a text")
    for name in ("dropout", "ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise Unlike(f"its BPE has {name}")


def _read_merges(model: dict) -> tuple[dict[bytes, int], np.ndarray]:
    """(tiktoken's rank of each token's bytes, the tokenizer's id of each rank: int64).

    Raises Unlike where merging by the rank of what results, as tiktoken does, is not merging by the rank of the pair. It
    is if each merge's result has no other way to come about than that merge.
    """
    vocabulary, texts = model["vocab"], list(byte_characters().values())
    ranks = {text: rank for rank, text in enumerate(texts)}
    parts = [(rank, rank) for rank in range(FIRST_MERGE)]
    try:
        for left, right in model["merges"]:
            rank_pair, whole = (ranks[left], ranks[right]), left + right
            if whole in ranks:
                raise Unlike("two of its merges have the same result")
            if not _stays_apart(*rank_pair, len(texts), ranks, parts, texts):
                raise Unlike("one of its merges never happens")
            ranks[whole] = len(texts)
            parts.append(rank_pair)
            texts.append(whole)
        ids = np.array([vocabulary[text] for text in texts], dtype=np.int64)
    except KeyError as error:
        raise Unlike("its vocabulary lacks bytes or parts of merges") from error
    # Every character stands for one byte, so all can be turned at once.
    to_latin = {ord(seen): byte for byte, seen in byte_characters().items()}
    content = "".join(texts).translate(to_latin).encode("latin-1")
    ends = np.cumsum([len(text) for text in texts]).tolist()
    return {
        content[end - len(text) : end]: rank for rank, (text, end) in enumerate(zip(texts, ends, strict=True))
    }, ids


def _stays_apart(left: int, right: int, limit: int, ranks: dict, parts: list, texts: list) -> bool:
    """Whether two neighbours come about as these two tokens, with nothing merged across their border before `limit`.

    Takes the merges that made them back, the latest first, and looks at each pair that then meets at the border
    (the method of the crate bpe of github/rust-gems).
    """
    while True:
        across = ranks.get(texts[left] + texts[right])
        if across is not None and across < limit:
            return False
        if left < FIRST_MERGE and right < FIRST_MERGE:
            return True
        # Of the two, the token made later was made while the other was there. Of equal ones the left is made first.
        if left > right:
            limit, left = left, parts[left][1]
        else:
            limit, right = right + 1, parts[right][0]


def byte_characters() -> dict[int, str]:
    """The character that stands for each byte, in the order of bytes: itself where it can be seen, else the next from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    characters = {byte: chr(byte) for byte in seen} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}
    characters = dict(sorted(characters.items()))
    assert set(characters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return characters
