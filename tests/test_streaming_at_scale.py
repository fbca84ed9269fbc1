"""Thousands of ranks share a stream: each opens what it needs of it, and one asks the hub what there is."""

import builtins
import itertools
import os
import tracemalloc
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from commands import run_distributed, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in_hub import StandInHub, client_environment

from utils import stream_shards, streaming
from utils.stream_shards import Shards
from utils.streaming import Reader, Source, Stream

RANKS = 4096
opened: list[str] = []


def documents_of(files: list[str]):
    for file in files:
        opened.append(file)
        yield from ({"text": f"{file} {row} {'x' * 150}"} for row in range(100))


def files_on_the_hub(count: int) -> tuple[Stream, list[int]]:
    """A stream of that many files, as `datasets` streams them, and the numbers of the shards that were made of it."""
    names = [f"train-{number:05}-of-{count:05}" for number in range(count)]
    text = datasets.IterableDataset.from_generator(documents_of, gen_kwargs={"files": names})
    shards, made = stream_shards.shards_of(text, lambda error: error), []

    def make(number: int):
        made.append(number)
        return shards[number]

    return Stream([Source(Shards(len(shards), make))]), made


def an_epoch(reader: Reader) -> list[str]:
    arrays = itertools.takewhile(lambda documents: documents is not None, (found for found, _ in reader.read()))
    return [document for array in arrays for document in array.to_pylist()]


@pytest.mark.parametrize("count", [10_000, 1000])
def test_a_rank_opens_its_own_files_and_few_more(count) -> None:
    """More files than ranks, and fewer. Before, a file that was left over was read by all ranks."""
    text, made = files_on_the_hub(count)
    for rank in (0, 1, 2047, RANKS - 1):
        opened.clear(), made.clear()
        tracemalloc.start()
        documents = an_epoch(Reader(text, rank, RANKS, seed=1, shuffles=True))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert documents and len(opened) == len(made) <= count // RANKS + 2
        assert {document.split()[0] for document in documents} <= set(opened)
        assert peak < 16 << 20  # of names, which datasets copies once for a shard; of no list of samples


@pytest.mark.parametrize("count", [1, 1000, RANKS, 5000, 10_000])
def test_the_shares_of_all_ranks_are_the_whole(count) -> None:
    source = Source(range(count))
    slots, whole = Counter(), 0
    sizes = set()
    for rank in range(RANKS):
        share = list(Reader(Stream([source]), rank, RANKS, seed=1, shuffles=True)._share(source, epoch=0))
        sizes.add(sum(len(part) for _, _, part in share))
        whole += sum(len(part) == RANKS for _, _, part in share)
        for _, shard, part in share:
            slots.update({shard: len(part)})
            assert 0 <= part.start < part.stop <= RANKS
    assert slots == {shard: RANKS for shard in range(count)}
    assert sizes == {count}  # of a slot's size each: all ranks have as much
    assert whole >= count - count % RANKS


# ---- one large file ----
class CountingFile:
    """A file that counts what is read of it."""

    read_bytes = 0

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def read(self, size):
        return self._count(self.file.read(size))

    def readline(self):
        return self._count(self.file.readline())

    def _count(self, found: bytes) -> bytes:
        CountingFile.read_bytes += len(found)
        return found


def test_a_rank_reads_two_shards_of_a_large_file_at_most(tmp_path, monkeypatch) -> None:
    path, lines = tmp_path / "large.txt", 400_000
    path.write_text("".join(f"line {row} of a large file\n" for row in range(lines)))
    monkeypatch.setattr(stream_shards, "SHARD_BYTES", 1 << 16)
    shards = stream_shards.shards_of_lines([str(path)], False, lambda error: error)
    size = path.stat().st_size
    assert len(shards) == size // (1 << 16) > 100
    monkeypatch.setattr(stream_shards, "open", lambda *words: CountingFile(builtins.open(*words)), raising=False)
    for rank in (0, 2000, RANKS - 1):
        CountingFile.read_bytes = 0
        an_epoch_or_nothing(Reader(Stream([Source(shards)]), rank, RANKS, seed=1, shuffles=True))
        assert 0 < CountingFile.read_bytes <= 2.1 * (1 << 16)
    few = [an_epoch(Reader(Stream([Source(shards)]), rank, 3, seed=1, shuffles=True)) for rank in range(3)]
    assert sorted(sum(few, [])) == sorted(path.read_text().splitlines())
    counts = list(map(len, few))
    assert max(counts) < 1.02 * min(counts)


def an_epoch_or_nothing(reader: Reader) -> None:
    """Of so little text not every one of so many ranks has a document; a rank without is told so."""
    try:
        an_epoch(reader)
    except streaming.UsageError as error:
        assert "too short to be shared out" in str(error)


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("ab\n\r é"), min_size=1, max_size=80),
    size=st.integers(1, 30),
    block=st.integers(1, 9),
)
def test_shards_of_a_file_hold_its_lines(text, size, block, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_shards, "SHARD_BYTES", size)
        patch.setattr(stream_shards, "READ_BYTES", block)
        shards = stream_shards.shards_of_lines([str(path)], True, lambda error: error)
        found = [line for shard in shards for table, _ in shard.rows(0, 0) for line in table["text"].to_pylist()]
        whole = stream_shards.LinesShard(str(path), 0, True, lambda error: error)
        assert found == [line for table, _ in whole.rows(0, 0) for line in table["text"].to_pylist()]
        for shard in shards:  # and from each place in it on
            steps = list(shard.rows(0, 0))
            for number, (_, offset) in enumerate(steps):
                assert [t.to_pylist() for t, _ in shard.rows(9, offset)] == [
                    t.to_pylist() for t, _ in steps[number + 1 :]
                ]


# ---- the hub ----
READ_MY_SHARE = """
import itertools, os, sys
import torch.distributed as dist
from utils import corpus
from utils.data_arguments import DataArguments
from utils.streaming import Reader
rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if ranks > 1:
    dist.init_process_group("gloo")
    from accelerate import PartialState
    PartialState(cpu=True)
text = corpus.load_text(DataArguments(dataset_name="texts", streaming=True), ["train", "validation"])["train"]
arrays = itertools.takewhile(lambda found: found[0] is not None, Reader(text, rank, ranks, 1, True).read())
found = [document for documents, _ in arrays for document in documents.to_pylist()]
print("found", *found)
if ranks > 1:
    dist.destroy_process_group()
"""


def test_one_rank_asks_the_hub_what_there_is(tmp_path) -> None:
    folder = tmp_path / "hub" / "datasets" / "texts" / "texts"
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["of no rank"]}), folder / "validation-00000-of-00001.parquet")
    for number in range(12):
        rows = pyarrow.array([f"{number}-{row}" for row in range(5)])
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / f"train-{number:05}-of-00012.parquet")
    script = tmp_path / "read_my_share.py"
    script.write_text(READ_MY_SHARE)
    asked, read = [], []
    with StandInHub(tmp_path / "hub", {"datasets/texts": "datasets/texts/texts"}) as hub:
        for start in (run_script, run_distributed):
            hub.requests.clear()
            environment = client_environment(hub.url, tmp_path / start.__name__)
            surroundings = {name: environment[name] for name in ("HF_ENDPOINT", "HF_HOME")}
            done = start(str(script), HF_HUB_OFFLINE="0", PYTHONPATH=os.getcwd(), **surroundings)
            asked.append([request for request in hub.requests if "/api/datasets/" in request])
            read.append(
                Counter(request for request in hub.requests if request.startswith("GET") and "/resolve/" in request)
            )
            found = [word for line in done.stdout.splitlines() if "found" in line for word in line.split()[1:]]
            assert sorted(word for word in found if "-" in word) == sorted(
                f"{n}-{r}" for n in range(12) for r in range(5)
            )

    # A listing of the whole set, by one rank; of files each rank asks for its own.
    listings = [Counter(request for request in one if "/paths-info/" not in request) for one in asked]
    assert listings[1] == listings[0], listings
    # The first file is read for its column and its first documents as well; no other one by both ranks.
    assert [sum(one.values()) for one in read][1] <= sum(read[0].values()) + 2, read
