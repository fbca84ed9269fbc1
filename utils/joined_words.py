"""Encodes many words in one call of the tokenizers library, and finds where the ids of each begin.

A text costs the library more than its words do, so words are joined by spaces. Which of the ids begin a word can be seen
by their tokens: WordPiece marks what continues a word, Metaspace what begins one.
"""

import re

import numpy as np
import tokenizers

from utils import cached_words
from utils.cached_words import Encode

WORDS = 256  # in a text
WORDPIECE_WORD = re.compile(r" ?(?:[A-Za-z0-9]+|[!-/:-@\[-`{-~])")
METASPACE_WORD = re.compile(r" ?[!-~]+")
METASPACE = "\u2581"


class JoinedWords:
    """Encodes texts as `encode` does, those that are a word of ASCII many at a time.

    A group of words is encoded by `encode` where it does not have as many beginnings as words. No word can make up for
    another: beginnings are at most one for each word of WordPiece, at least one for each of Metaspace.

    one_word: matches a text that the tokenizer takes for one word. begins: bool, by id, of tokens that begin a word.
    added_token: matches where a text holds one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        encode: Encode,
        one_word: re.Pattern,
        begins: np.ndarray,
        added_token: re.Pattern | None,
    ):
        self.backend = backend
        self.encode = encode
        self.one_word = one_word
        self.begins = begins
        self.added_token = added_token

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts end to end, number of ids of each): int64 both."""
        is_word = np.fromiter((self.one_word.fullmatch(text) is not None for text in texts), bool, len(texts))
        counts = np.zeros(len(texts), dtype=np.int64)
        parts, order = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        words = np.flatnonzero(is_word)
        groups = [words[start : start + WORDS] for start in range(0, len(words), WORDS)]
        joined = [" ".join([texts[row] for row in group]) for group in groups]
        for group, text, found in zip(groups, joined, self._encode_all(joined), strict=True):
            ids = np.array(found.ids, dtype=np.int64)
            begins = np.flatnonzero(self.begins[ids])
            if len(begins) != len(group) or (self.added_token is not None and self.added_token.search(text)):
                is_word[group] = False
                continue
            counts[group] = np.diff(begins, append=len(ids))
            parts.append(ids)
            order.append(group)
        others = np.flatnonzero(~is_word)
        if len(others):
            ids, counts[others] = self.encode([texts[row] for row in others])
            parts.append(ids)
            order.append(others)
        return cached_words.reorder(np.concatenate(parts), counts, np.concatenate(order)), counts

    def _encode_all(self, texts: list[str]) -> list[tokenizers.Encoding]:
        return self.backend.encode_batch_fast(texts, add_special_tokens=False)


def joined_words(backend: tokenizers.Tokenizer, description: dict, encode: Encode) -> Encode:
    """`encode`, by many words at a time where the tokenizer, described as in its tokenizer.json, shows where one begins."""
    model, split = description["model"], description["pre_tokenizer"]
    vocabulary = backend.get_vocab()
    contents = [token["content"] for token in description["added_tokens"] if token["content"]]
    kinds = [part["type"] for part in split.get("pretokenizers", [split])]
    if model["type"] == "WordPiece" and kinds == ["BertPreTokenizer"]:
        prefix = model["continuing_subword_prefix"]
        one_word, is_begin = WORDPIECE_WORD, lambda token: not token.startswith(prefix)
        shows = bool(prefix) and not model["unk_token"].startswith(prefix)
    elif model["type"] == "Unigram" and kinds == ["WhitespaceSplit", "Metaspace"]:
        metaspace = split["pretokenizers"][1]
        one_word, is_begin = METASPACE_WORD, lambda token: token.startswith(METASPACE)
        shows = metaspace["replacement"] == METASPACE and metaspace.get("prepend_scheme", "always") == "always"
        shows = shows and METASPACE in vocabulary
    else:
        shows = False
    if not shows or any(character.isspace() for content in contents for character in content):
        return encode
    if not all(map(_keeps_words, cached_words.steps(description["normalizer"], "normalizers"))):
        return encode
    begins = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
    for token, index in vocabulary.items():
        begins[index] = is_begin(token)
    added = re.compile("|".join(map(re.escape, contents))) if contents else None
    # A normalizer's table may make nothing of a character, or a space.
    alone = backend.encode_batch_fast([chr(code) for code in range(0x21, 0x7F)], add_special_tokens=False)
    if any(begins[found.ids].sum() != 1 for found in alone):
        return encode
    return JoinedWords(backend, encode, one_word, begins, added)


def _keeps_words(step: dict) -> bool:
    """Whether what a normalizer puts in the place of something within a word is within that word."""
    return step["type"] != "Replace" or "Regex" in step["pattern"] or bool(step["content"].strip())
