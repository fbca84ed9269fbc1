"""Text that is read while it is used: who reads which part of its shards, and where a reader stands.

A reader is one process that reads: a rank, or one DataLoader worker of a rank. Readers never speak with each other. All
know the order of the shards in an epoch, drawn from seed and epoch, and find their share of it by their number: of S
shards and R readers S // R shards for themselves, and of those that are left over as much as lies between two places on
a line, which is in two of them at most. So thousands of readers open a few files each, however many there are.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from utils.errors import UsageError
from utils.stream_shards import Shard

HUNDRED = 100
DRAWS = 256  # documents of a mix that are drawn at once
# Documents of a shard that several readers share go to them in runs, so that neighbours stay together: of a hundredth of
# the text before, so that little text too is shared out evenly, and within these bounds.
RUN_BYTES = (1 << 10, 1 << 16)


@dataclass(frozen=True)
class Source:
    """Shards whose rows have the text in `column`. fingerprint: changes with the text; None if that is not known."""

    shards: Sequence[Shard]
    column: str = "text"
    fingerprint: str | None = None


@dataclass(frozen=True)
class Stream:
    """Documents that are read while they are used.

    weights: how often a document is drawn from each of several sources; None: they are read one after another.
    first, last: of every hundred documents of a shard those from `first` to before `last` are in it. A shard's count
    begins its own number further on, so that of many small shards too each hundredth has its part.
    """

    sources: list[Source]
    weights: list[float] | None = None
    first: int = 0
    last: int = HUNDRED

    def split(self, percentage: int) -> "tuple[Stream, Stream]":
        """(train, validation): of every hundred documents the first `percentage` validate."""
        return dataclasses.replace(self, first=percentage), dataclasses.replace(self, last=percentage)

    def first_row(self) -> dict | None:
        """The first row with all its columns; None if there is none."""
        for source in self.sources:
            for shard in source.shards:
                for table, _ in shard.rows(0, 0):
                    return table.slice(0, 1).to_pylist()[0]
        return None

    def __iter__(self) -> Iterator[dict[str, str | None]]:
        """One pass in the order of sources, shards and rows, as `datasets` has its rows. A mix ends when all is read."""
        for documents, _ in Reader(self).read():
            if documents is None:
                return
            yield from ({"text": document} for document in documents.to_pylist())

    def iter(self, batch_size: int) -> Iterator[dict[str, list[str | None]]]:
        rows = iter(self)
        while batch := [row["text"] for row in islice(rows, batch_size)]:
            yield {"text": batch}

    def take(self, count: int) -> "FirstDocuments":
        return FirstDocuments(self, count)


@dataclass(frozen=True)
class FirstDocuments:
    """The first `count` documents of a stream."""

    stream: Stream
    count: int

    def iter(self, batch_size: int) -> Iterator[dict[str, list[str | None]]]:
        left = self.count
        for batch in self.stream.iter(batch_size):
            yield {"text": batch["text"][:left]}
            left -= len(batch["text"])
            if left <= 0:
                return


# ---- where a reader stands ----
class Position(NamedTuple):
    """Where a reader stands in a source.

    shard: its place in the epoch's order. row, offset: of the shard, as Shard.rows takes them. run, filled, size: of the
    shard's text the number of the run in hand, its bytes, and all bytes so far. skip: documents from there on that are
    used already, of a source of a mix.
    """

    epoch: int = 0
    shard: int = 0
    row: int = 0
    offset: int = 0
    run: int = 0
    filled: int = 0
    size: int = 0
    skip: int = 0


class Place(NamedTuple):
    """Where a reader stands in a stream: in each source; of a mix, how often it has drawn, and how many epochs it has told
    the end of."""

    positions: tuple[Position, ...]
    draws: int = 0
    told: int = 0

    @property
    def epoch(self) -> int:
        """How often all sources have been read through."""
        return min(position.epoch for position in self.positions)

    def to_json(self) -> dict:
        return {**self._asdict(), "positions": [list(position) for position in self.positions]}

    @classmethod
    def from_json(cls, state: dict) -> "Place":
        return cls(tuple(Position(*position) for position in state["positions"]), state["draws"], state["told"])


@dataclass(frozen=True)
class Reader:
    """Reader `index` of `count`, whose share of the stream it reads again and again.

    shuffles: read the shards in another order in each epoch.
    """

    stream: Stream
    index: int = 0
    count: int = 1
    seed: int = 0
    shuffles: bool = False

    def start(self, epoch: int = 0) -> Place:
        return Place((Position(epoch),) * len(self.stream.sources), told=epoch)

    def read(self, place: Place | None = None) -> Iterator[tuple[pa.StringArray | None, Place]]:
        """Documents, null for none, each array with the place behind it. Without end; None stands where an epoch ends.

        Raises UsageError if an epoch has nothing for this one of several readers.
        """
        place = place or self.start()
        yield from self._read_in_turn(place) if self.stream.weights is None else self._draw(place)

    def _read_in_turn(self, place: Place) -> Iterator[tuple[pa.StringArray | None, Place]]:
        positions = list(place.positions)
        while True:
            epoch = min(position.epoch for position in positions)
            number = next(i for i, position in enumerate(positions) if position.epoch == epoch)
            for documents, position in self._read_source(number, positions[number]):
                positions[number] = position
                if position.epoch > epoch:
                    break
                yield documents, Place(tuple(positions))
            if min(position.epoch for position in positions) > epoch:
                yield None, Place(tuple(positions))

    def _draw(self, place: Place) -> Iterator[tuple[pa.StringArray | None, Place]]:
        sources = [
            _Drawable(self._read_source(i, position._replace(skip=0)), position)
            for i, position in enumerate(place.positions)
        ]
        while True:
            if place.epoch > place.told:
                place = place._replace(told=place.epoch)
                yield None, place
            draw = np.random.default_rng((self.seed, self.index, place.draws))
            drawn = draw.choice(len(sources), size=DRAWS, p=self.stream.weights)
            parts = [source.take(int((drawn == i).sum())) for i, source in enumerate(sources)]
            # From source by source to the order in which they were drawn.
            order = np.argsort(np.argsort(drawn, kind="stable"))
            place = Place(tuple(source.position for source in sources), place.draws + 1, place.told)
            yield pa.concat_arrays(parts).take(pa.array(order)), place

    def _read_source(self, number: int, position: Position) -> Iterator[tuple[pa.StringArray | None, Position]]:
        source = self.stream.sources[number]
        while True:
            is_whole_epoch, found = position == Position(position.epoch), False
            for place, shard, slots in self._share(source, position.epoch):
                if place < position.shard:
                    continue
                if place > position.shard:
                    position = Position(position.epoch, place)
                for documents, behind in self._read_shard(source, source.shards[shard], slots, position):
                    found = found or len(documents) > 0
                    yield documents, behind
            if is_whole_epoch and not found and self.count > 1:
                raise UsageError(
                    f"--streaming: the text is too short to be shared out among {self.count} readers, one for each "
                    "process and each of its --dataloader_num_workers; use fewer",
                    of_one_rank=True,
                )
            position = Position(position.epoch + 1)
            yield None, position

    def _share(self, source: Source, epoch: int) -> Iterator[tuple[int, int, range]]:
        """(place in the epoch's order, number of the shard, slots of it) of what this reader reads.

        A shard has as many slots as there are readers. Each reader has as many whole shards as the others; those that are
        left over lie end to end on a line of slots, of which each reader has one piece, as long as the others'.
        """
        order = np.arange(len(source.shards))
        if self.shuffles:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        left_over = len(order) % self.count
        alone = len(order) - left_over
        for place in range(self.index, alone, self.count):
            yield place, int(order[place]), range(self.count)
        first, last = self.index * left_over, (self.index + 1) * left_over
        for shard in range(first // self.count, math.ceil(last / self.count)):
            start = shard * self.count
            slots = range(max(first - start, 0), min(last - start, self.count))
            yield alone + shard, int(order[alone + shard]), slots

    def _read_shard(
        self, source: Source, shard: Shard, slots: range, position: Position
    ) -> Iterator[tuple[pa.StringArray, Position]]:
        for table, offset in shard.rows(position.row, position.offset):
            documents = as_text(table, source.column)
            rows = np.arange(position.row, position.row + len(documents)) + shard.number
            is_in = (rows % HUNDRED >= self.stream.first) & (rows % HUNDRED < self.stream.last)
            position = position._replace(row=position.row + len(documents), offset=offset)
            documents = documents.filter(pa.array(is_in))
            if len(slots) < self.count:
                runs, position = number_runs(byte_counts(documents), position)
                slot_of_run = runs * golden_step(self.count) % self.count
                is_ours = (slot_of_run >= slots.start) & (slot_of_run < slots.stop)
                documents = documents.filter(pa.array(is_ours))
            yield documents, position


def golden_step(count: int) -> int:
    """By this step from slot to slot all of `count` are met, and those that were met lie far apart at any time."""
    return next(step for step in range(max(1, round(count * 0.618)), count + 2) if math.gcd(step, count) == 1)


class _Drawable:
    """Documents of one source of a mix, any number at a time. position: where it stands."""

    def __init__(self, arrays: Iterator[tuple[pa.StringArray | None, Position]], position: Position):
        self.arrays = arrays
        self.waiting, self.used = EMPTY, 0
        self.begin = self.end = position._replace(skip=0)
        self.take(position.skip)

    @property
    def position(self) -> Position:
        return self.begin._replace(skip=self.used) if self.used < len(self.waiting) else self.end

    def take(self, count: int) -> pa.StringArray:
        parts = [EMPTY]
        while count:
            if self.used == len(self.waiting):
                self.begin, self.used = self.end, 0
                documents, self.end = next(self.arrays)
                self.waiting = EMPTY if documents is None else documents
            part = self.waiting[self.used : self.used + count]
            parts.append(part)
            self.used, count = self.used + len(part), count - len(part)
        return pa.concat_arrays(parts)


EMPTY = pa.array([], pa.string())


def as_text(table: pa.Table, column: str) -> pa.StringArray:
    """The documents of a table, null for none. Raises UsageError for what is no text: a stream's type is not known."""
    if column not in table.column_names:
        return pa.nulls(len(table), pa.string())
    found = table.column(column)
    if not (pa.types.is_null(found.type) or pa.types.is_string(found.type) or pa.types.is_large_string(found.type)):
        document = next((value for value in found.to_pylist() if value is not None), None)
        raise UsageError(f"--text_column: a document is {str(document)[:50]!r}, not text; name a column of text")
    return pa.concat_arrays([EMPTY, *found.cast(pa.string()).chunks])


def byte_counts(documents: pa.StringArray) -> np.ndarray:
    """UTF-8 bytes of each document, int64; 0 for none."""
    return pa.compute.binary_length(documents).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def number_runs(sizes: np.ndarray, position: Position) -> tuple[np.ndarray, Position]:
    """(each document's run, int64; the position behind them). sizes: bytes of each document, from `position` on."""
    runs = np.empty(len(sizes), dtype=np.int64)
    ends = np.cumsum(sizes)
    run, filled, size = position.run, position.filled, position.size
    start, before = 0, 0
    while start < len(sizes):
        least, most = RUN_BYTES
        full = min(max(size // HUNDRED, least), most)
        # The document that fills the run is its last.
        stop = min(int(np.searchsorted(ends, before + full - filled)) + 1, len(sizes))
        runs[start:stop] = run
        added = int(ends[stop - 1]) - before
        before, size, filled, start = before + added, size + added, filled + added, stop
        if filled >= full:
            run, filled = run + 1, 0
    return runs, position._replace(run=run, filled=filled, size=size)
