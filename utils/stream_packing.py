"""Samples of a stream: blocks, whole documents in blocks, or lines, cut and shuffled while it is read.

What is read is cut a window at a time, and each window is shuffled: neighbouring text stays together within a sample,
samples do not.
"""

import logging
import os
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from utils import stream_length
from utils.data_arguments import DataArguments
from utils.errors import UsageError
from utils.main_process import told_by_main
from utils.stream_windows import NOTHING, Begin, Cutter, ahead, windows
from utils.streaming import Reader, Stream
from utils.tokenization import StreamEncoder, check_room
from utils.training_arguments import LanguageModelingArguments

logger = logging.getLogger(__name__)

EVALUATED_WINDOW = 64  # samples of an evaluation that are cut at once
FIRST_DOCUMENTS = 16  # that ways to encode are tried on


def make_samples(
    text: dict[str, Stream],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    data: DataArguments,
    args: LanguageModelingArguments,
    cache_dir: str | None = None,
    line_by_line: bool = False,
) -> "tuple[dict[str, StreamedSamples | EvaluatedSamples], dict[str, float]]":
    """As packing.make_samples, of streams. What is known beforehand: a remainder goes on into the next epoch, so that
    data_dropped_tokens is 0; of lines nothing, since they are cut off while they are read.

    Sets args.max_steps where it is to be counted.
    """
    if line_by_line:
        check_room(length, tokenizer)
    first = next(iter(text.values())).take(FIRST_DOCUMENTS).iter(FIRST_DOCUMENTS)
    documents = [document or "" for document in told_by_main(lambda: next(first)["text"])]
    encode = StreamEncoder(tokenizer, documents, length if line_by_line else None)
    cutter = Cutter("lines" if line_by_line else data.packing, length)
    samples, epochs = {}, None
    for split, stream in text.items():
        if split == "train":
            if args.max_steps <= 0:
                epochs = args.num_train_epochs
                args.max_steps = stream_length.steps(stream, encode, cutter, data, args, cache_dir)
            readers = args.world_size * max(1, args.dataloader_num_workers or 0)
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
                epochs=epochs,
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
    return samples, {"data_dropped_tokens": 0} if "train" in text and not line_by_line else {}


def _tell(stream: Stream, readers: int) -> None:
    shards = sum(len(source.shards) for source in stream.sources)
    shared = sum(len(source.shards) % readers for source in stream.sources)
    logger.info("train: a stream of %d files or shards for %d readers", shards, readers)
    if shared and readers > 1:
        logger.info(
            "in each epoch %d of them are read by several readers, each of which uses its own part of the documents; a "
            "multiple of %d files would be shared out whole",
            shared,
            readers,
        )


# ---- samples ----
class StreamedSamples(torch.utils.data.IterableDataset):
    """Training samples, without end: where a reader has read its share of the text, it begins anew.

    Each is an item of packing.Blocks, DocumentBlocks or packing.Lines, with its `number`, (reader, how many came before).
    Within an epoch of a reader no document comes twice and none is left out. No reader waits for another, so that none
    hangs where shares are unequal. Files, or the shards of a dataset on the hub, are read in another order in each epoch.

    rank, ranks: of this process; DataLoader workers are told apart by themselves. limit: train on so many samples only,
    those that come first in the readers' shares. epochs: what the steps amount to; None where nobody has
    counted, and the log tells the share of the steps.

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
        epochs: float | None = None,
    ):
        self.stream = stream
        self.encode = encode
        self.cut = cut
        self.buffer_size = buffer_size
        self.seed = seed
        self.epochs = epochs
        self.rank = rank
        self.ranks = ranks
        self.limit = limit
        self.state: dict | None = None
        self.resumed: dict | None = None  # until it is gone on from: another iteration begins anew

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
        self.state = self.resumed = state or None

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
        if self.resumed is not None:
            begin, taken = Begin.from_json(self.resumed), self.resumed["taken"]
        self.state, self.resumed = self.resumed, None
        for window in ahead(windows(reader, self.encode, self.cut, self.buffer_size, begin, limit)):
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
        for window in ahead(windows(reader, self.encode, self.cut, self.buffer_size, begin, self.limit, once=True)):
            first = window.begin.number
            for index in range(first, first + window.count):
                if index % self.ranks == self.rank:
                    yield {**window.samples[index - first], "number": (0, index)}
