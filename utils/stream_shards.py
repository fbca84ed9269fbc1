"""Where a stream's text lies: files, parts of files and parts of datasets, each a shard with its rows in a fixed order."""

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import pandas
import pyarrow as pa
from datasets import Dataset, IterableDataset

from utils.errors import UsageError

ROWS = 256  # read at once
READ_BYTES = 1 << 17  # of a text file that are read at once
SHARD_ROWS = 1000  # of a dataset that is mapped into memory, at least
MOST_SHARDS = 1024
SHARD_BYTES = 1 << 22  # of a text file, at least
MOST_SHARDS_OF_A_FILE = 1 << 16

Explain = Callable[[Exception], Exception]


class Shard(Protocol):
    """Documents in a fixed order. number: its place among the shards of its source."""

    @property
    def number(self) -> int: ...

    def rows(self, first: int, offset: int) -> Iterator[tuple[pa.Table, int]]:
        """Tables of the rows from `first` on, each with what is to be given as `offset` to go on behind it."""


@dataclass(frozen=True)
class StreamedShard:
    """One file, or one part of a dataset on the hub. What is passed over to come to a row is read, but not encoded."""

    text: IterableDataset
    number: int
    explain: Explain

    def rows(self, first: int, offset: int = 0) -> Iterator[tuple[pa.Table, int]]:
        # pandas only warns that it drops the columns beyond a header. For good: this may be a thread of its own.
        warnings.filterwarnings("error", category=pandas.errors.ParserWarning)
        try:
            for table in self.text.with_format("arrow").iter(batch_size=ROWS):
                wanted, first = table.slice(first), max(first - len(table), 0)
                if len(wanted):
                    wanted.validate(full=True)  # that it is UTF-8
                    yield wanted, 0
        except UsageError:
            raise
        except Exception as error:
            raise self.explain(error) from error


@dataclass(frozen=True)
class LinesShard:
    """The lines of a text file, as `datasets` reads them, from any place on: what was read is not read again.

    start, end: bytes; the lines that begin from the one to before the other.
    """

    file: str
    number: int
    keep_linebreaks: bool
    explain: Explain
    start: int = 0
    end: int = sys.maxsize

    def rows(self, first: int, offset: int = 0) -> Iterator[tuple[pa.Table, int]]:
        try:
            with open(self.file, "rb") as file:
                file.seek(offset or max(self.start - 1, 0))
                if self.start and not offset:
                    file.readline()  # the rest of a line that began before
                while block := file.read(max(0, min(READ_BYTES, self.end - file.tell()))):
                    if not block.endswith(b"\n"):
                        block += file.readline()
                    text = block.decode()
                    lines = io.StringIO(text, newline=None).readlines()
                    if not self.keep_linebreaks:
                        lines = [line.rstrip("\n") for line in lines]
                    yield pa.table({"text": pa.array(lines, pa.string())}), file.tell()
        except Exception as error:
            raise self.explain(error) from error


@dataclass(frozen=True)
class MappedShard:
    """Rows `start` to `end` of a dataset that is mapped into memory."""

    text: Dataset
    number: int
    start: int
    end: int

    def rows(self, first: int, offset: int = 0) -> Iterator[tuple[pa.Table, int]]:
        text = self.text.with_format("arrow")
        for row in range(self.start + first, self.end, ROWS):
            yield text[row : min(row + ROWS, self.end)], 0


@dataclass(frozen=True)
class Shards(Sequence):
    """`size` shards, each made when it is wanted: a reader wants few of them. make: shard number -> the shard."""

    size: int
    make: Callable[[int], Shard]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> Shard:  # type: ignore[override]  # of one number, not of a slice
        return self.make(range(self.size)[number])


def shards_of(text: Dataset | IterableDataset, explain: Explain) -> Shards:
    """explain: makes the error to be raised of one that came while a shard was read."""
    if isinstance(text, IterableDataset):
        return Shards(text.num_shards, partial(_streamed_shard, text, text.num_shards, explain))
    count = max(1, min(MOST_SHARDS, len(text) // SHARD_ROWS))
    return Shards(count, partial(_mapped_shard, text, count))


def shards_of_lines(files: list[str], keep_linebreaks: bool, explain: Explain) -> list[LinesShard]:
    """Of each file as many as it has times SHARD_BYTES, so that many readers can share a large one."""
    shards: list[LinesShard] = []
    for file in files:
        size = os.path.getsize(file)
        count = max(1, min(MOST_SHARDS_OF_A_FILE, size // SHARD_BYTES))
        edges = [size * i // count for i in range(count)] + [sys.maxsize]
        shards += [
            LinesShard(file, len(shards) + i, keep_linebreaks, explain, edges[i], edges[i + 1]) for i in range(count)
        ]
    return shards


def _streamed_shard(text: IterableDataset, count: int, explain: Explain, number: int) -> StreamedShard:
    return StreamedShard(text.shard(num_shards=count, index=number), number, explain)


def _mapped_shard(text: Dataset, count: int, number: int) -> MappedShard:
    return MappedShard(text, number, len(text) * number // count, len(text) * (number + 1) // count)
