"""Cuts the text of a stream into samples, a window at a time.

A window has about as many samples as the shuffle buffer. To go on from a checkpoint one window is read and cut again,
the one in hand.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from utils.document_packing import DocumentBlocks
from utils.errors import UsageError
from utils.packing import Blocks, Lines
from utils.streaming import Place, Reader, byte_counts
from utils.tokenization import StreamEncoder

CHUNK_BYTES = 1 << 18  # of text that are encoded at once, at most
TOKEN_BYTES = 4  # of text, about

Samples = Blocks | DocumentBlocks | Lines
NOTHING = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class Cutter:
    """What samples are: "blocks" of `length` tokens, whole "documents" in such blocks, or "lines"."""

    kind: str
    length: int

    @property
    def unit(self) -> int:
        """What `count` says of one sample."""
        return 1 if self.kind == "lines" else self.length

    def count(self, counts: np.ndarray) -> int:
        """Of documents of so many tokens, the lines or the tokens."""
        return int((counts > 0).sum() if self.kind == "lines" else counts.sum())

    def __call__(self, ids: np.ndarray, counts: np.ndarray) -> tuple[Samples, np.ndarray]:
        """(samples, ids that are left over for the next window). ids: of all documents end to end; counts: of each."""
        if self.kind == "lines":
            return Lines(ids, np.cumsum(counts[counts > 0])), NOTHING
        if self.kind == "documents":
            return DocumentBlocks(ids, np.cumsum(counts), self.length), NOTHING
        whole = len(ids) // self.length * self.length
        return Blocks(ids[:whole].reshape(-1, self.length)), ids[whole:]


@dataclass(frozen=True)
class Begin:
    """Where a window begins: in the text, with which ids left over, after how many samples in all and in the epoch."""

    place: Place
    rest: np.ndarray
    number: int = 0
    in_epoch: int = 0

    def to_json(self) -> dict:
        counts = {"number": self.number, "in_epoch": self.in_epoch}
        return {"place": self.place.to_json(), "rest": self.rest.tolist(), **counts}

    @classmethod
    def from_json(cls, state: dict) -> "Begin":
        rest = np.array(state["rest"], dtype=np.int32)
        return cls(Place.from_json(state["place"]), rest, state["number"], state["in_epoch"])


@dataclass(frozen=True)
class Window:
    """The first `count` of samples that were cut together."""

    samples: Samples
    count: int
    begin: Begin


def windows(
    reader: Reader,
    encode: StreamEncoder,
    cut: Cutter,
    size: int,
    begin: Begin,
    limit: int | None = None,
    once: bool = False,
) -> Iterator[Window]:
    """All that the reader reads, cut. A window ends with about `size` samples, or with the epoch.

    limit: samples in an epoch; then the text begins anew. once: one epoch only. Raises UsageError for an epoch without a
    sample.
    """
    chunk_bytes = min(CHUNK_BYTES, size * cut.length * TOKEN_BYTES)
    chunks = text_chunks(reader, begin.place, chunk_bytes)
    while True:
        ids, counts, place, found, ends_epoch = [begin.rest], [], begin.place, 0, False
        while found < size * cut.unit and not ends_epoch:
            documents, place, ends_epoch = next(chunks)
            encoded = encode(documents)
            ids.append(encoded.ids.astype(np.int32))
            counts.append(encoded.counts)
            found += cut.count(encoded.counts)
        samples, rest = cut(np.concatenate(ids), np.concatenate(counts))
        count = len(samples)
        if limit is not None and begin.in_epoch + count >= limit:
            count, ends_epoch = limit - begin.in_epoch, True
            place, rest = reader.start(begin.place.epoch + 1), NOTHING
            chunks = text_chunks(reader, place, chunk_bytes)
        if ends_epoch and begin.in_epoch + count == 0:
            raise _too_little(cut, len(rest), reader.count)
        yield Window(samples, count, begin)
        if once and ends_epoch:
            return
        begin = Begin(place, rest, begin.number + count, 0 if ends_epoch else begin.in_epoch + count)


def text_chunks(
    reader: Reader, place: Place | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[pa.StringArray, Place, bool]]:
    """(about chunk_bytes of documents, the place behind them, whether the epoch ends there)."""
    collected, size = [], 0
    for documents, behind in reader.read(place):
        if documents is not None:
            collected.append(documents)
            size += int(byte_counts(documents).sum())
        if documents is None or size >= chunk_bytes:
            yield pa.concat_arrays([pa.array([], pa.string()), *collected]), behind, documents is None
            collected, size = [], 0


def _too_little(cut: Cutter, tokens: int, readers: int) -> UsageError:
    if cut.kind != "blocks":
        return UsageError(f"the streamed text holds no token: all its {cut.kind} are empty; name another text")
    share = "" if readers == 1 else f" for each of {readers} readers (processes and their --dataloader_num_workers)"
    return UsageError(
        f"--block_size or --max_seq_length {cut.length}: the streamed text has {tokens} tokens only{share}, less than one "
        "block; give a smaller one, or more text",
        of_one_rank=readers > 1,
    )


def ahead(found: Iterator[Window]) -> Iterator[Window]:
    """The same, each made while the one before is used."""
    with ThreadPoolExecutor(1, "stream") as pool:
        coming = pool.submit(next, found, None)
        while (window := coming.result()) is not None:
            coming = pool.submit(next, found, None)
            yield window
