"""utils/streaming.py: every document once an epoch, by one reader, whatever the shards; a position is where it was."""

import itertools
import json
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pytest
from commands import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stand_in_hub import StandInHub, client_environment, make_small_wikitext

from utils import corpus, stream_shards, streaming
from utils.data_arguments import DataArguments
from utils.errors import UsageError
from utils.streaming import HUNDRED, Place, Position, Reader, Source, Stream

SIZES = st.lists(st.integers(0, 700), min_size=1, max_size=9)


class Listed:
    """A shard in memory, which counts the rows that are read of it."""

    read = 0

    def __init__(self, documents: list[str], number: int):
        self.documents = documents
        self.number = number

    def rows(self, first, offset):
        for start in range(first, len(self.documents), 100):
            part = self.documents[start : start + 100]
            Listed.read += len(part)
            yield pa.table({"text": part}), 0


def stream(*sizes: int, **options) -> Stream:
    """Documents "shard row", some of them long."""
    shards = [
        Listed([f"{i} {row} " + "x" * (row * 37 % 90) for row in range(size)], i) for i, size in enumerate(sizes)
    ]
    return Stream([Source(shards)], **options)


def epochs(reader: Reader, count: int = 1, place: Place | None = None) -> list[list[str]]:
    """What is read, epoch by epoch."""
    found: list[list[str]] = [[]]
    for documents, _ in reader.read(place):
        if documents is None:
            found.append([])
            if len(found) > count:
                return found[:-1]
        else:
            found[-1] += documents.to_pylist()
    raise AssertionError("ended")


def all_of(text: Stream) -> list[str]:
    return [row["text"] for row in text]


# ---- sharing ----
@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, readers=st.integers(1, 9), shuffles=st.booleans(), percentage=st.sampled_from([0, 5, 40]))
@example(sizes=[600], readers=4, shuffles=True, percentage=5)
def test_readers_share_the_documents_of_each_epoch(sizes, readers, shuffles, percentage):
    text = stream(*sizes, first=percentage)
    expected = Counter(all_of(text))
    try:
        shares = [epochs(Reader(text, i, readers, seed=3, shuffles=shuffles), 2) for i in range(readers)]
    except UsageError as error:
        assert "too short to be shared out" in str(error) and readers > 1
        return
    for epoch in range(2):
        assert sum((Counter(share[epoch]) for share in shares), Counter()) == expected


@pytest.mark.parametrize("sizes", [[20_000], [3000] * 7, [6000] * 3])
def test_shares_are_even(sizes):
    text = stream(*sizes)
    shares = [sum(map(len, epochs(Reader(text, i, 4, shuffles=True))[0])) for i in range(4)]
    assert max(shares) < 1.05 * min(shares)


def test_neighbours_stay_together():
    """Of one file, readers get runs of documents, not every fourth line of a text."""
    share = epochs(Reader(stream(20_000), 0, 4))[0]
    rows = np.array([int(document.split()[1]) for document in share])
    assert (np.diff(rows) == 1).mean() > 0.95


def test_as_many_shards_as_readers_are_read_by_one_each():
    text = stream(500, 500, 500, 500)
    Listed.read = 0
    for i in range(4):
        assert len({document.split()[0] for document in epochs(Reader(text, i, 4, shuffles=True))[0]}) == 1
    assert Listed.read == 2000


def test_epochs_have_other_orders_of_shards_and_seeds_too():
    text = stream(*[30] * 8)

    def orders(seed: int) -> list[list[str]]:
        return [
            list(dict.fromkeys(d.split()[0] for d in epoch))
            for epoch in epochs(Reader(text, seed=seed, shuffles=True), 2)
        ]

    assert orders(1) == orders(1)
    assert len({tuple(order) for order in orders(1) + orders(2)}) == 4
    assert len({tuple(order) for order in ([*range(8)], *epochs(Reader(text), 2))}) == 2  # without, one order


def test_nothing_for_a_reader_is_an_error_not_an_endless_search():
    with pytest.raises(UsageError, match="too short to be shared out among 4 readers"):
        for i in range(4):
            epochs(Reader(stream(2), i, 4))


# ---- the validation split ----
@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, percentage=st.integers(1, 99))
def test_the_split_is_exact_and_takes_every_document(sizes, percentage):
    train, validation = stream(*sizes).split(percentage)
    everything = all_of(stream(*sizes))
    assert not set(all_of(train)) & set(all_of(validation))
    assert sorted(all_of(train) + all_of(validation)) == sorted(everything)
    for shard, size in enumerate(sizes):
        found = [int(d.split()[1]) for d in all_of(validation) if d.split()[0] == str(shard)]
        assert found == [row for row in range(size) if (row + shard) % HUNDRED < percentage]


def test_of_many_small_shards_each_hundredth_validates():
    train, validation = stream(*[1] * 1000).split(5)
    assert len(all_of(validation)) == 50 and len(all_of(train)) == 950


def test_the_split_of_several_readers_and_epochs_is_the_same(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"document {i}\n" for i in range(1000)))
    text = corpus.load_text(
        DataArguments(train_file=[str(tmp_path / "a.txt")], streaming=True), ["train", "validation"], str(tmp_path)
    )
    validation = set(all_of(text["validation"]))
    assert validation == {f"document {i}\n" for i in range(1000) if i % 100 < 5}
    for i in range(3):
        for epoch in epochs(Reader(text["train"], i, 3, shuffles=True), 2):
            assert not set(epoch) & validation


# ---- positions ----
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=6),
    readers=st.integers(1, 3),
    weights=st.booleans(),
    stop=st.integers(1, 40),
)
def test_a_reader_goes_on_where_another_stood(sizes, readers, weights, stop):
    text = stream(*sizes)
    if weights:
        text = Stream([*text.sources, *stream(300, 20).sources], weights=[0.7, 0.3])
    reader = Reader(text, readers - 1, readers, seed=5, shuffles=True)
    try:
        steps = list(itertools.islice(reader.read(), stop + 20))
    except UsageError:
        return
    place = Place.from_json(json.loads(json.dumps(steps[stop - 1][1].to_json())))
    assert place == steps[stop - 1][1]
    resumed = list(itertools.islice(reader.read(place), 20))
    assert [(d and d.to_pylist(), p) for d, p in resumed] == [(d and d.to_pylist(), p) for d, p in steps[stop:]]


def test_what_was_read_is_not_read_again():
    text = stream(*[1000] * 10)
    reader = Reader(text)
    steps = list(itertools.islice(reader.read(), 87))
    Listed.read = 0
    assert len(epochs(reader, place=steps[-1][1])[0]) == Listed.read == 1300


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "saved"])
def test_positions_in_files(kind, tmp_path):
    rows = [f"row {i}" for i in range(3000)]
    whole = datasets.Dataset.from_dict({"text": rows})
    path = str(tmp_path / f"a.{kind}")
    if kind == "saved":
        whole.save_to_disk(path)
    elif kind == "txt":
        (tmp_path / "a.txt").write_text("\n".join(rows))
    else:
        whole.to_json(path) if kind == "jsonl" else whole.to_parquet(path)
    source = {"dataset_name": path} if kind == "saved" else {"train_file": [path]}
    text = corpus.load_text(DataArguments(streaming=True, **source), ["train"], str(tmp_path))["train"]
    reader = Reader(text, 1, 2, shuffles=True)
    steps = list(itertools.islice(reader.read(), 12))
    resumed = list(itertools.islice(reader.read(steps[4][1]), 7))
    assert [(d and d.to_pylist(), p) for d, p in resumed] == [(d and d.to_pylist(), p) for d, p in steps[5:]]


FROM_THE_HUB = """
from utils import corpus
from utils.data_arguments import DataArguments
from utils.streaming import Reader
text = corpus.load_text(
    DataArguments(dataset_name="wikitext", dataset_config_name="wikitext-2-raw-v1", streaming=True), ["train"]
)["train"]
reader = Reader(text, 1, 2, shuffles=True)
_, (_, place), (documents, behind) = (step for step, _ in zip(reader.read(), range(3)))
resumed, its = next(reader.read(place))
print(len(list(text)), its == behind, resumed == documents)
"""


def test_a_data_set_on_the_hub(tmp_path):
    make_small_wikitext(tmp_path / "hub" / "datasets/Salesforce/wikitext")
    with StandInHub(tmp_path / "hub", {"datasets/wikitext": "datasets/Salesforce/wikitext"}) as hub:
        environment = client_environment(hub.url, tmp_path / "home", PYTHONPATH=str(ROOT))
        command = [sys.executable, "-c", FROM_THE_HUB]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["300", "True", "True"], done.stderr


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("ab \n\r\u2028\x0b\ufeffé"), min_size=1, max_size=60),
    keep=st.booleans(),
    size=st.integers(1, 30),
)
def test_lines_are_those_of_datasets_and_are_not_read_again(text, keep, size, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "lines.txt"
    file.write_bytes(text.encode())
    options = {"keep_linebreaks": keep, "sample_by": "line", "streaming": True}
    theirs = datasets.load_dataset("text", data_files=[str(file)], split="train", **options)
    shard = stream_shards.LinesShard(str(file), 0, keep, lambda error: error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_shards, "READ_BYTES", size)
        tables = list(shard.rows(0, 0))
        rows = [table.column("text").to_pylist() for table, _ in tables]
        assert sum(rows, []) == [row["text"] for row in theirs]
        for place, (_, offset) in enumerate(tables):
            resumed = [
                table.column("text").to_pylist() for table, _ in shard.rows(len(sum(rows[: place + 1], [])), offset)
            ]
            assert resumed == rows[place + 1 :]


# ---- runs ----
@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 3000), max_size=200), cut=st.integers(0, 200))
def test_runs_do_not_depend_on_how_a_shard_is_cut(sizes, cut):
    sizes = np.array(sizes, dtype=np.int64)
    runs, position = streaming.number_runs(sizes, Position())
    first, middle = streaming.number_runs(sizes[:cut], Position())
    second, end = streaming.number_runs(sizes[cut:], middle)
    assert end == position and np.array_equal(np.concatenate([first, second]), runs)
    assert set(np.diff(runs)) <= {0, 1}
    least, _ = streaming.RUN_BYTES
    for run in range(int(runs[-1]) if len(runs) else 0):
        assert sizes[runs == run].sum() >= least
