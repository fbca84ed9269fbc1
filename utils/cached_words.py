"""Cuts documents into pieces of about a word that a tokenizer encodes each by itself, and remembers their ids.

A text has few different words. Each is encoded once; the rest is done by NumPy and Arrow, with no Python object per word
or token.
"""

import threading
from collections.abc import Callable

import numpy as np
import pyarrow as pa

# What a tokenizer.json may have for its tokens not to reach over a space; see why_not.
NORMALIZERS = {"BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Lowercase", "Precompiled"}
SPLITTERS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
SPACE = 0x20
TABLE_PIECES = 1 << 19
TABLE_BYTES = 1 << 24
# Normalizers that do to each sign, letter and digit of ASCII what they do to it alone.
CHARACTERWISE = {"BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Lowercase"}
LETTER, DIGIT, SIGN, APOSTROPHE = 1, 2, 3, 4  # kinds of ASCII; 0 is all else

Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


def _after_space() -> np.ndarray:
    """By the first byte of a character, whether it may follow a cut: bool (256,).

    Only where no character with that byte is white space or joins what is before it.
    """
    allowed = np.zeros(256, dtype=bool)
    allowed[0x21:0x7F] = True
    allowed[0xC3:0xCC] = True  # U+00C0 to U+02FF: Latin
    allowed[0xCE:0xD2] = True  # U+0380 to U+047F: Greek, Cyrillic
    allowed[0xE4:0xEA] = True  # U+4000 to U+9FFF: Chinese
    allowed[0xEB:0xED] = True  # U+B000 to U+CFFF: Korean
    return allowed


AFTER_SPACE = _after_space()
# By the first byte of a character, whether a cut may follow it: those that join what is behind them are elsewhere.
BEFORE_SPACE = AFTER_SPACE.copy()
BEFORE_SPACE[:0x80] = True
BEFORE_SPACE[0xE2:0xE4] = True  # punctuation


def why_not(description: dict) -> str | None:
    """Why the tokens of a tokenizer, described as in its tokenizer.json, may reach over a space; None if they do not.

    Byte-level BPE: GPT-2's pattern ends a word before a space that a letter, digit or sign follows. The others drop white
    space; no normal form joins anything with a space, and cuts are not made where a grapheme may hold one.
    """
    normal = steps(description["normalizer"], "normalizers")
    splits = steps(description["pre_tokenizer"], "pretokenizers")
    if description["model"].get("dropout"):
        return "its BPE has dropout"
    if normal and any(token["normalized"] for token in description["added_tokens"]):
        return "it has added tokens that are looked for in normalized text"
    kinds = [split["type"] for split in splits]
    if kinds == ["ByteLevel"]:
        fits = not normal and splits[0].get("use_regex", True) and not splits[0]["add_prefix_space"]
        return None if fits else "its pre-tokenizer is not GPT-2's"
    if kinds == ["WhitespaceSplit", "Metaspace"]:
        fits = splits[1].get("prepend_scheme", "always") in ("always", "never")
    else:
        fits = len(kinds) == 1 and kinds[0] in SPLITTERS
    if not fits:
        return f"its pre-tokenizer is {' and '.join(kinds) or 'none'}"
    unknown = [step["type"] for step in normal if not _is_known(step)]
    return f"its normalizer is {unknown[0]}" if unknown else None


def _kinds() -> np.ndarray:
    """The kind of each byte: uint8 (256,)."""
    kinds = np.zeros(256, dtype=np.uint8)
    for byte in range(0x21, 0x7F):
        character = chr(byte)
        kinds[byte] = LETTER if character.isalpha() else DIGIT if character.isdigit() else SIGN
    kinds[ord("'")] = APOSTROPHE
    return kinds


KINDS = _kinds()


def inner_cuts(description: dict) -> np.ndarray | None:
    """Between which kinds of neighbours words are cut too: bool (25,), at 5 * left + right; None if nowhere.

    Byte-level BPE: GPT-2's pattern parts letters, digits and signs, but for an apostrophe and what follows it. BERT's
    pre-tokenizer makes each sign a word.
    """
    kinds = [split["type"] for split in steps(description["pre_tokenizer"], "pretokenizers")]
    normal = steps(description["normalizer"], "normalizers")
    cuts = np.zeros((5, 5), dtype=bool)
    if kinds == ["ByteLevel"]:
        cuts[1:, 1:] = True
        np.fill_diagonal(cuts, False)
        cuts[APOSTROPHE] = cuts[SIGN, APOSTROPHE] = False
    elif kinds == ["BertPreTokenizer"] and all(step["type"] in CHARACTERWISE for step in normal):
        cuts[SIGN:, 1:] = cuts[1:, SIGN:] = True
    return cuts.ravel() if cuts.any() else None


def steps(part: dict | None, name: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer that may be a sequence of them."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[name] for step in steps(inner, name)]
    return [part]


def _is_known(step: dict) -> bool:
    if step["type"] != "Replace":
        return step["type"] in NORMALIZERS
    if step["pattern"] == {"Regex": " {2,}"}:
        return step["content"] == " "
    text = step["pattern"].get("String", "")
    return bool(text) and not any(character.isspace() for character in text)


def cut(
    values: np.ndarray, starts: np.ndarray, ends: np.ndarray, whole: np.ndarray, inner: np.ndarray | None = None
) -> np.ndarray:
    """Where pieces start: ascending int64, with the start of each document that is not empty.

    values: the UTF-8 bytes, uint8. starts, ends: of the documents in `values`, adjoining each other. whole: bool, which
    documents are not to be cut. inner: of inner_cuts. A piece starts at a space before a character that is no white space,
    and where `inner` says.
    """
    is_start = np.zeros(len(values) + 1, dtype=bool)
    np.equal(values[:-1], SPACE, out=is_start[: max(len(values) - 1, 0)])
    is_start[: max(len(values) - 1, 0)] &= AFTER_SPACE[values[1:]]
    found = np.flatnonzero(is_start)
    found = found[found > 0]
    is_start[found] = _may_end(values, found)
    is_start[starts[starts > 0] - 1] = False  # the character behind that space is another document's
    if inner is not None:
        kinds = KINDS[values]
        is_start[1:-1] |= inner[kinds[:-1] * np.uint8(5) + kinds[1:]]
    for document in np.flatnonzero(whole):
        is_start[starts[document] : ends[document]] = False
    is_start[starts[starts < ends]] = True
    return np.flatnonzero(is_start)


def _may_end(values: np.ndarray, spaces: np.ndarray) -> np.ndarray:
    """For each place of a space in `values`, whether the character before it is one that a cut may follow."""
    lead = values[spaces - 1]
    for distance in (2, 3, 4):
        is_inner = (lead & 0xC0) == 0x80  # a byte within a character: its first is further on the left
        lead = np.where(is_inner, values[np.maximum(spaces - distance, 0)], lead)
    return BEFORE_SPACE[lead]


class PieceEncoder:
    """Encodes documents piece by piece. Threads may share one.

    encode: the ids of texts end to end, and the number of ids of each, as ByteLevelBPE.encode has them. inner: of
    inner_cuts.
    """

    def __init__(self, encode: Encode, inner: np.ndarray | None = None):
        self.encode = encode
        self.inner = inner
        self.table = Table()
        self.lock = threading.Lock()

    def __call__(self, documents: pa.StringArray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all documents end to end, number of ids of each), int64. whole: bool, documents that are not cut."""
        values, offsets = buffers(documents)
        starts = cut(values, offsets[:-1], offsets[1:], whole, self.inner)
        edges = np.append(starts, offsets[-1]).astype(np.int32)
        pieces = pa.BinaryArray.from_buffers(
            pa.binary(), len(starts), [None, pa.py_buffer(edges), pa.py_buffer(values)]
        ).dictionary_encode()
        first, count, table = self._look_up(pieces.dictionary.to_pylist())
        which = pieces.indices.to_numpy(zero_copy_only=False)
        ids = gather(table, first[which], count[which])
        # The ids of a document are those from its first piece to the next document's first.
        ends = np.concatenate([[0], np.cumsum(count[which])])
        return ids, np.diff(ends[np.searchsorted(starts, offsets)])

    def _look_up(self, pieces: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(where each piece's ids begin in the table, how many there are, the table's ids)."""
        with self.lock:
            if self.table.is_full():
                self.table = Table()  # memory stays bounded; what is common is soon in it again
            table = self.table
            new = [piece for piece in pieces if piece not in table.places]
        if new:
            ids, counts = self.encode([piece.decode() for piece in new])
        with self.lock:
            if new:
                table.add(new, ids, counts)
            places = np.fromiter(map(table.places.__getitem__, pieces), dtype=np.int64, count=len(pieces))
            return table.first[places], table.count[places], table.ids


class Table:
    """The ids of pieces. What `places` says of a piece is its row in `first` and `count`."""

    def __init__(self):
        self.places: dict[bytes, int] = {}
        self.first = np.zeros(0, dtype=np.int64)
        self.count = np.zeros(0, dtype=np.int64)
        self.ids = np.zeros(0, dtype=np.int64)
        self.bytes = 0

    def is_full(self) -> bool:
        return len(self.places) > TABLE_PIECES or self.bytes > TABLE_BYTES

    def add(self, pieces: list[bytes], ids: np.ndarray, counts: np.ndarray) -> None:
        """Adds pieces; one that another thread has added meanwhile has two rows then, alike."""
        rows = len(self.first)
        self.places.update(zip(pieces, range(rows, rows + len(pieces)), strict=True))
        self.first = np.concatenate([self.first, len(self.ids) + np.cumsum(counts) - counts])
        self.count = np.concatenate([self.count, counts])
        self.ids = np.concatenate([self.ids, ids])
        self.bytes += sum(map(len, pieces))


def buffers(documents: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """(the UTF-8 bytes of all documents, uint8; where each begins and the last ends, int64). No document is null."""
    if len(documents) == 0:
        return np.zeros(0, dtype=np.uint8), np.zeros(1, dtype=np.int64)
    _, offsets, values = documents.buffers()
    offsets = np.frombuffer(offsets, dtype=np.int32)[documents.offset : documents.offset + len(documents) + 1]
    values = np.frombuffer(values, dtype=np.uint8) if values is not None else np.zeros(0, dtype=np.uint8)
    return values[offsets[0] : offsets[-1]], offsets.astype(np.int64) - offsets[0]


def reorder(ids: np.ndarray, counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The ids of texts 0, 1, …, end to end, of those of the texts `order`. counts: of texts 0, 1, …"""
    ordered = counts[order]
    first = np.empty(len(counts), dtype=np.int64)
    first[order] = np.cumsum(ordered) - ordered
    return gather(ids, first, counts)


def gather(ids: np.ndarray, first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """ids[first[0] : first[0] + count[0]], then the same for 1, 2, …, end to end."""
    places = np.arange(count.sum())
    places += np.repeat(first - (np.cumsum(count) - count), count)
    return ids[places]
