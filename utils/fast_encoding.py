"""Documents to token ids, as fast as the tokenizer allows and with the ids that it gives itself."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute
import tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import info_once

from utils import byte_level_bpe, cached_words
from utils.joined_words import joined_words

logger = logging.getLogger(__name__)

# What each way is tried on beside the first documents.
SAMPLES = [
    "",
    " ",
    "a",
    " two  spaces\n\ttab\r\n",
    "Grüße, 你好 😀 e\u0301 \u200d\x00\ufeff's don't 12345 \u3000 x ",
    "İΣ ﬁ ˘ ",
]
SAMPLE_LENGTH = 2000
PYTHON_STRINGS = 1000  # at most so many at once, where documents must become Python strings

Content = Callable[[pa.StringArray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Encoded:
    """ids: int64, all documents end to end. counts: int64, of each document. cut_off: tokens beyond max_length."""

    ids: np.ndarray
    counts: np.ndarray
    cut_off: int = 0


def choose(
    tokenizer: PreTrainedTokenizerBase,
    description: dict | None,
    first_documents: list[str],
    max_length: int | None = None,
) -> "Framed | Plain":
    """The fastest encoder that has the tokenizer's own ids; the log says which, and why not a faster one.

    description: the tokenizer as in its tokenizer.json; None if it is of another library. first_documents: it is tried on these and on some odd ones first.
    max_length: tokens of a document at most, special ones included.
    """
    plain = Plain(tokenizer, max_length)
    if description is None:
        info_once(logger, "%s encodes by itself: it is not one of the tokenizers library", _name(tokenizer))
        return plain
    if getattr(tokenizer, "split_special_tokens", False):
        info_once(logger, "%s encodes by itself: it splits special tokens", _name(tokenizer))
        return plain
    samples = [*SAMPLES, *(document[:SAMPLE_LENGTH] for document in first_documents)]
    documents = pa.array(samples, pa.string())
    expected = plain(documents)
    backend = tokenizer.backend_tokenizer  # the call above has left it without truncation and padding
    frame = find_frame(tokenizer, backend)
    if frame is None:
        info_once(logger, "%s encodes by itself: what it adds to a document is not the same for all", _name(tokenizer))
        return plain
    content, how = _content(backend, description)
    encoder = Framed(content, *frame, max_length, tokenizer.truncation_side)
    found = encoder(documents)
    if not (np.array_equal(found.ids, expected.ids) and np.array_equal(found.counts, expected.counts)):
        logger.warning("%s encodes by itself: %s has other ids on a sample", _name(tokenizer), how)
        return plain
    info_once(logger, "%s encodes %s", _name(tokenizer), how)
    return encoder


def _content(backend: tokenizers.Tokenizer, description: dict) -> tuple[Content, str]:
    """(what encodes documents without what the tokenizer adds to each, in words)."""
    reason = cached_words.why_not(description)
    if reason is not None:
        return DocumentEncoder(backend), f"document by document, not word by word: {reason}"
    try:
        return WordEncoder(TiktokenOrOwn(backend, description), description), "word by word, through tiktoken"
    except byte_level_bpe.Unlike as error:
        encode = joined_words(backend, description, OwnEncoder(backend))
        return WordEncoder(encode, description), f"word by word, through its own library: {error}"


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return type(tokenizer).__name__


# ---- ways to encode texts ----
class OwnEncoder:
    """The tokenizer's own encoding, on all cores; without what it adds to a document."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts end to end, number of ids of each): int64 both."""
        return _flatten([found.ids for found in self.backend.encode_batch_fast(texts, add_special_tokens=False)])


class TiktokenOrOwn:
    """tiktoken's encoding, and the tokenizer's own of texts that hold an added token."""

    def __init__(self, backend: tokenizers.Tokenizer, description: dict):
        self.own = OwnEncoder(backend)
        self.tiktoken = byte_level_bpe.ByteLevelBPE(description)

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """As OwnEncoder."""
        try:
            return self._encode(texts)
        except ValueError:  # a run of millions of line breaks is too deep for its regular expressions
            return self.own(texts)

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if not self.tiktoken.added_token.search("\n".join(texts)):
            return self.tiktoken.encode(texts)
        is_own = np.array([self.tiktoken.added_token.search(text) is not None for text in texts])
        ids, counts = [], np.zeros(len(texts), dtype=np.int64)
        order = np.concatenate([np.flatnonzero(is_own), np.flatnonzero(~is_own)])
        own = int(is_own.sum())
        for encode, rows in ((self.own, order[:own]), (self.tiktoken.encode, order[own:])):
            if len(rows):
                found, counts[rows] = encode([texts[row] for row in rows])
                ids.append(found)
        return cached_words.reorder(np.concatenate(ids), counts, order), counts


def _flatten(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=counts.sum()), counts


# ---- documents to ids ----
class WordEncoder:
    """Documents in pieces. One that holds an added token is not cut: that may take spaces beside it."""

    def __init__(self, encode: cached_words.Encode, description: dict):
        self.encode = cached_words.PieceEncoder(encode, cached_words.inner_cuts(description))
        contents = {token["content"] for token in description["added_tokens"]}
        self.pattern = "|".join(_quoted(content) for content in sorted(contents) if content)

    def __call__(self, documents: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
        if self.pattern:
            whole = pa.compute.match_substring_regex(documents, self.pattern).to_numpy(zero_copy_only=False)
        else:
            whole = np.zeros(len(documents), dtype=bool)
        return self.encode(documents, whole)


def _quoted(text: str) -> str:
    """A pattern of RE2 for this very text."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


class DocumentEncoder:
    """Documents as they are."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.encode = OwnEncoder(backend)

    def __call__(self, documents: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
        parts = [self.encode(part.to_pylist()) for part in _parts(documents)]
        ids, counts = zip(*parts, strict=True) if parts else ((), ())
        empty = [np.zeros(0, dtype=np.int64)]
        return np.concatenate([*empty, *ids]), np.concatenate([*empty, *counts])


def _parts(documents: pa.StringArray) -> list[pa.StringArray]:
    return [documents[start : start + PYTHON_STRINGS] for start in range(0, len(documents), PYTHON_STRINGS)]


class Plain:
    """What the tokenizer itself does when it is called. One thread at a time: it keeps its settings in itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.lock = threading.Lock()

    def __call__(self, documents: pa.StringArray) -> Encoded:
        with self.lock:
            rows = list(chain.from_iterable(self._call(part.to_pylist()) for part in _parts(documents)))
            if self.max_length is None:
                return Encoded(*_flatten(rows))
            limits = {"truncation": True, "max_length": self.max_length}
            kept = list(chain.from_iterable(self._call(part.to_pylist(), **limits) for part in _parts(documents)))
        return Encoded(*_flatten(kept), cut_off=sum(map(len, rows)) - sum(map(len, kept)))

    def _call(self, texts: list[str], **options) -> list[list[int]]:
        # verbose=False: a document longer than the model is cut into blocks later, there is nothing to warn of.
        return self.tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]


@dataclass(frozen=True)
class Framed:
    """Documents with `prefix` before and `suffix` behind each, cut to max_length tokens with both."""

    content: Content
    prefix: list[int]
    suffix: list[int]
    max_length: int | None = None
    truncation_side: str = "right"

    def __call__(self, documents: pa.StringArray) -> Encoded:
        ids, counts = self.content(documents)
        cut_off = 0
        if self.max_length is not None:
            kept = np.minimum(counts, self.max_length - len(self.prefix) - len(self.suffix))
            first = np.cumsum(counts) - (kept if self.truncation_side == "left" else counts)
            cut_off = int(counts.sum() - kept.sum())
            ids, counts = (cached_words.gather(ids, first, kept) if cut_off else ids), kept
        return Encoded(*frame(ids, counts, self.prefix, self.suffix), cut_off)


def frame(ids: np.ndarray, counts: np.ndarray, prefix: list[int], suffix: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, counts) with `prefix` before and `suffix` behind each document."""
    added = len(prefix) + len(suffix)
    if added == 0:
        return ids, counts
    framed = np.empty(len(ids) + added * len(counts), dtype=np.int64)
    ends = np.cumsum(counts + added)
    framed[np.arange(len(ids)) + np.repeat(np.arange(len(counts)) * added + len(prefix), counts)] = ids
    for place, token in enumerate(prefix):
        framed[ends - counts - added + place] = token
    for place, token in enumerate(reversed(suffix), start=1):
        framed[ends - place] = token
    return framed, counts + added


def end_documents(ids: np.ndarray, counts: np.ndarray, ends: np.ndarray, token: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, counts) with `token` behind each document for which `ends`, bool, is true."""
    places = np.cumsum(counts)[ends]
    return np.insert(ids, places, token), counts + ends


def find_frame(
    tokenizer: PreTrainedTokenizerBase, backend: tokenizers.Tokenizer
) -> tuple[list[int], list[int]] | None:
    """(what the tokenizer puts before each document, what behind it); None if that is not it."""
    inner = backend.encode("a b", add_special_tokens=False).ids
    outer = tokenizer("a b", verbose=False)["input_ids"]
    added = len(outer) - len(inner)
    for start in range(added + 1):
        if outer[start : start + len(inner)] == inner:
            prefix, suffix = outer[:start], outer[start + len(inner) :]
            if tokenizer("", verbose=False)["input_ids"] == prefix + suffix:
                return prefix, suffix
    return None
