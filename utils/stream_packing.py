"""Samples of a stream: blocks, whole documents in blocks, or lines, cut and shuffled while it is read.

What is read is cut a window at a time. A window has about as many samples as the shuffle buffer, and is shuffled as a
whole: neighbouring text stays together within a sample, samples do not. To go on from a checkpoint one window is read
and cut again, the one in hand.
"""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from utils.arguments import LanguageModelingArguments
from utils.data_arguments import DataArguments
from utils.document_packing import DocumentBlocks
from utils.errors import UsageError
from utils.packing import Blocks, Lines
from utils.streaming import Place, Reader, Stream, byte_counts
from utils.tokenization import StreamEncoder, check_room

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 18  # of text that are encoded at once, at most
TOKEN_BYTES = 4  # of text, about
EVALUATED_WINDOW = 64  # samples of an evaluation that are cut at once
FIRST_DOCUMENTS = 16  # that ways to encode are tried on

Samples = Blocks | DocumentBlocks | Lines
# (token ids, tokens of each document) -> (samples, the ids that are left over for the next window)
Cut = Callable[[np.ndarray, np.ndarray], tuple[Samples, np.ndarray]]
NOTHING = np.zeros(0, dtype=np.int32)


def make_samples(
    text: dict[str, Stream],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    data: DataArguments,
    args: LanguageModelingArguments,
    cache_dir: str | None = None,
    line_by_line: bool = False,
) -> "tuple[dict[str, StreamedSamples | EvaluatedSamples], dict[str, float]]":
    """As packing.make_samples, of streams. Nothing is known of them beforehand: there are no figures."""
    if line_by_line:
        check_room(length, tokenizer)
    first = next(iter(text.values())).take(FIRST_DOCUMENTS).iter(FIRST_DOCUMENTS)
    documents = [document or "" for document in next(first)["text"]]
    encode = StreamEncoder(tokenizer, documents, length if line_by_line else None)
    cutter = Cutter("lines" if line_by_line else data.packing, length)
    samples = {}
    for split, stream in text.items():
        if split == "train":
            readers = args.world_size * max(1, args.dataloader_num_workers)
            _tell(stream, readers)
            samples[split] = StreamedSamples(
                stream,
                encode,
                cutter,
                buffer_size=data.shuffle_buffer_size,
                seed=args.seed if args.data_seed is None else args.data_seed,
                rank=args.process_index,
                ranks=args.world_size,
                limit=data.max_train_samples,
            )
        else:
            samples[split] = EvaluatedSamples(
                stream,
                encode,
                cutter,
                buffer_size=data.shuffle_buffer_size if data.packing == "documents" else EVALUATED_WINDOW,
                rank=args.process_index,
                ranks=args.world_size,
                limit=data.max_eval_samples,
            )
    return samples, {}


def _tell(stream: Stream, readers: int) -> None:
    shards = sum(len(source.shards) for source in stream.sources)
    shared = sum(len(source.shards) % readers for source in stream.sources)
    logger.info("train: a stream of %d files or shards for %d readers", shards, readers)
    if shared and readers > 1:
        logger.info(
            "in each epoch all readers read %d of them from end to end, and each uses its own part of the documents; a "
            "multiple of %d files would be shared out whole",
            shared,
            readers,
        )


# ---- windows ----
@dataclass(frozen=True)
class Cutter:
    """What samples are: "blocks" of `length` tokens, whole "documents" in such blocks, or "lines"."""

    kind: str
    length: int

    def count(self, counts: np.ndarray) -> float:
        """About how many samples documents of so many tokens make."""
        return float((counts > 0).sum()) if self.kind == "lines" else counts.sum() / self.length

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
    chunks = _chunks(reader, begin.place, chunk_bytes)
    while True:
        ids, counts, place, found, ends_epoch = [begin.rest], [], begin.place, 0.0, False
        while found < size and not ends_epoch:
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
            chunks = _chunks(reader, place, chunk_bytes)
        if ends_epoch and begin.in_epoch + count == 0:
            raise _too_little(cut, len(rest), reader.count)
        yield Window(samples, count, begin)
        if once and ends_epoch:
            return
        begin = Begin(place, rest, begin.number + count, 0 if ends_epoch else begin.in_epoch + count)


def _chunks(reader: Reader, place: Place, chunk_bytes: int) -> Iterator[tuple[pa.StringArray, Place, bool]]:
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


def _ahead(found: Iterator[Window]) -> Iterator[Window]:
    """The same, each made while the one before is used."""
    with ThreadPoolExecutor(1, "stream") as pool:
        coming = pool.submit(next, found, None)
        while (window := coming.result()) is not None:
            coming = pool.submit(next, found, None)
            yield window


# ---- samples ----
class StreamedSamples(torch.utils.data.IterableDataset):
    """Training samples, without end: where a reader has read its share of the text, it begins anew.

    Each is an item of packing.Blocks, DocumentBlocks or packing.Lines, with its `number`, (reader, how many came before).
    Within an epoch of a reader no document comes twice and none is left out. No reader waits for another, so that none
    hangs where shares are unequal. Files, or the shards of a dataset on the hub, are read in another order in each epoch.

    rank, ranks: of this process; DataLoader workers are told apart by themselves. limit: train on so many samples only,
    those that come first in the readers' shares.

    state_dict holds where the reader stands: a few numbers and less than a block of ids, all of it JSON. A new object that
    loads it goes on with the very next sample.
    """

    def __init__(
        self,
        stream: Stream,
        encode: StreamEncoder,
        cut: Cutter,
        buffer_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        limit: int | None = None,
    ):
        self.stream = stream
        self.encode = encode
        self.cut = cut
        self.buffer_size = buffer_size
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.limit = limit
        self.state: dict | None = None

    @property
    def description(self) -> dict:
        """What a position depends on, by the flags that say it."""
        shards = [len(source.shards) for source in self.stream.sources]
        split = self.stream.first
        return {
            "train_file (files or shards)": shards,
            "data_mix (weights)": self.stream.weights,
            "validation_split_percentage": split,
            "packing": self.cut.kind,
            "block_size": self.cut.length,
            "shuffle_buffer_size": self.buffer_size,
            "seed": self.seed,
            "max_train_samples": self.limit,
        }

    def state_dict(self) -> dict:
        return self.state or {}

    def load_state_dict(self, state: dict) -> None:
        self.state = state or None

    def __iter__(self) -> Iterator[dict]:
        reader = self._reader()
        limit = None
        if self.limit is not None:
            limit = len(range(reader.index, self.limit, reader.count))
            if limit == 0:
                raise UsageError(
                    f"--max_train_samples {self.limit}: less than one for each of {reader.count} readers, one for each "
                    "process and each of its --dataloader_num_workers; give more, or use fewer",
                    of_one_rank=True,
                )
        begin, taken = Begin(reader.start(), NOTHING), 0
        if self.state is not None:
            begin, taken = Begin.from_json(self.state), self.state["taken"]
        for window in _ahead(windows(reader, self.encode, self.cut, self.buffer_size, begin, limit)):
            begin = window.begin
            order = np.arange(window.count)
            if self.buffer_size > 1:
                order = np.random.default_rng((self.seed, reader.index, begin.number)).permutation(order)
            state = begin.to_json()
            for place in range(taken, window.count):
                # Set before the sample is out: what is asked for the state then is to go on behind it.
                self.state = {**state, "taken": place + 1}
                yield {**window.samples[int(order[place])], "number": (reader.index, begin.number + place)}
            taken = 0

    def _reader(self) -> Reader:
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return Reader(self.stream, self.rank, self.ranks, self.seed, shuffles=self.limit is None)
        # Workers share the machine's cores already.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        index = self.rank * worker.num_workers + worker.id
        return Reader(self.stream, index, self.ranks * worker.num_workers, self.seed, shuffles=self.limit is None)


class EvaluatedSamples(torch.utils.data.IterableDataset):
    """Samples for evaluation: one pass, in order, the first `limit` of them; the same for any number of ranks.

    Sample i is read by rank i % ranks, and its `number` is (0, i). For one DataLoader worker at most. Iterating raises
    UsageError if there is no sample at all.
    """

    def __init__(
        self,
        stream: Stream,
        encode: StreamEncoder,
        cut: Cutter,
        buffer_size: int = EVALUATED_WINDOW,
        rank: int = 0,
        ranks: int = 1,
        limit: int | None = None,
    ):
        self.stream = stream
        self.encode = encode
        self.cut = cut
        self.buffer_size = buffer_size
        self.rank = rank
        self.ranks = ranks
        self.limit = limit

    def __iter__(self) -> Iterator[dict]:
        reader = Reader(self.stream)
        begin = Begin(reader.start(), NOTHING)
        for window in _ahead(windows(reader, self.encode, self.cut, self.buffer_size, begin, self.limit, once=True)):
            first = window.begin.number
            for index in range(first, first + window.count):
                if index % self.ranks == self.rank:
                    yield {**window.samples[index - first], "number": (0, index)}
