"""utils/stream_packing.py: samples of a stream hold every token; what follows a state is what would have followed."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import stream_text
from stream_text import LONGEST, Numbered, load, write

from utils.document_packing import DocumentBlocks
from utils.errors import UsageError
from utils.stream_packing import EvaluatedSamples, StreamedSamples
from utils.stream_windows import Cutter

KINDS = ["blocks", "documents", "lines"]


def training(text, kind: str = "blocks", length: int = 16, buffer: int = 50, **options) -> StreamedSamples:
    return StreamedSamples(text, Numbered(), Cutter(kind, length), buffer_size=buffer, seed=1, **options)


def take(samples, count: int) -> list[list[int]]:
    return [sample["input_ids"].tolist() for sample in itertools.islice(samples, count)]


def content(sample: dict) -> tuple:
    return tuple((name, np.asarray(array).tolist()) for name, array in sorted(sample.items()))


# ---- training ----
@pytest.mark.parametrize("buffer", [1, 50, 10_000])
@pytest.mark.parametrize("sizes", [[900], [300, 200, 400]])
def test_blocks_of_an_epoch_hold_all_its_tokens(sizes, buffer, tmp_path):
    text = load(write(tmp_path, *sizes), validation_file=write(tmp_path, 5, first=9000))["train"]
    expected = stream_text.tokens(900)
    whole = len(expected) // 16
    found = take(training(text, buffer=buffer), 2 * whole)
    # What is left over goes on into the next epoch: no token is dropped in between.
    rest = len(expected) - 16 * whole
    assert Counter(sum(found[:whole], [])) <= Counter(expected)
    assert len(set(sum(found[:whole], []))) == 16 * whole
    assert max(Counter(sum(found, [])).values()) == 2
    assert sum(count == 1 for count in Counter(sum(found, [])).values()) == 2 * rest
    assert found[:whole] != found[whole:]


def test_a_window_is_shuffled_and_neighbours_stay_together(tmp_path):
    text = load(write(tmp_path, 900), validation_file=write(tmp_path, 5, first=9000))["train"]
    in_order = take(training(text, buffer=1), 50)
    assert sum(in_order, []) == stream_text.tokens(900)[: 50 * 16]
    shuffled = take(training(text, buffer=50), 50)
    assert shuffled != in_order and sorted(shuffled[:50]) != shuffled[:50]
    assert all(block in take(training(text, buffer=1), 1000) for block in shuffled)


def test_equal_words_make_equal_streams_and_seeds_others(tmp_path):
    text = load(write(tmp_path, 300, 300))["train"]
    samples = StreamedSamples(text, Numbered(), Cutter("blocks", 16), 50, seed=2)
    assert take(training(text), 100) == take(training(text), 100) != take(samples, 100)
    assert take(samples, 70) == take(samples, 70)  # each iteration begins anew


def test_lines_are_documents_and_documents_are_whole(tmp_path):
    text = load(write(tmp_path, 200, 100), validation_file=write(tmp_path, 5, first=9000))["train"]
    lines = take(training(text, "lines"), 300)
    assert sorted(sum(lines, [])) == stream_text.tokens(300)
    assert all(len({token // LONGEST for token in line}) == 1 for line in lines)

    blocks = []
    for sample in training(text, "documents", length=48):
        for document in range(sample["documents"].max() + 1):
            ids = sample["input_ids"][sample["documents"] == document]
            assert ids.tolist() == [ids[0] + i for i in range(len(ids))] and ids[0] % LONGEST == 0
        blocks.append(sample["input_ids"])
        if sum(map(len, blocks)) >= len(stream_text.tokens(300)):
            break
    assert sorted(np.concatenate(blocks).tolist()) == stream_text.tokens(300)
    # Nearly as full as with all documents at hand.
    ends = np.cumsum([1 + n * 7 % 40 for n in range(300)])
    best = len(DocumentBlocks(np.zeros(ends[-1]), ends, 48))
    assert len(blocks) <= 1.1 * best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"rank": 1, "ranks": 3}, {"limit": 30}])
@pytest.mark.parametrize("stop", [1, 29, 30, 75, 400])
def test_a_state_is_gone_on_from(kind, options, stop, tmp_path):
    """Within a window, at its end, in later windows and in another epoch."""
    text = load(write(tmp_path, 400, 300))["train"]
    samples = training(text, kind, **options)
    iterator = iter(samples)
    before = [content(next(iterator)) for _ in range(stop)]
    state = json.loads(json.dumps(samples.state_dict()))
    after = [content(next(iterator)) for _ in range(120)]
    assert len(json.dumps(state)) < 1000
    resumed = training(text, kind, **options)
    resumed.load_state_dict(state)
    assert [content(sample) for sample in itertools.islice(resumed, 120)] == after
    assert len({dict(sample)["number"][1] for sample in before + after}) == stop + 120  # each its own number


def test_resuming_encodes_no_more_than_the_window_in_hand(tmp_path):
    text = load(write(tmp_path, *[1000] * 9), validation_file=write(tmp_path, 5, first=9000))["train"]
    samples = training(text, buffer=10)
    iterator = iter(samples)
    for _ in range(8000):
        next(iterator)
    state = samples.state_dict()
    resumed = training(text, buffer=10)
    resumed.load_state_dict(state)
    iterator = iter(resumed)
    next(iterator)
    iterator.close()
    assert resumed.encode.documents < 1100 < 3000 < samples.encode.documents


def test_a_limit_counts_over_all_readers(tmp_path):
    text = load(write(tmp_path, 400, 300))["train"]
    found = []
    for rank in range(3):
        first, second = np.split(np.array(take(training(text, limit=10, rank=rank, ranks=3), 2 * (3 + (rank < 1)))), 2)
        assert sorted(first.tolist()) == sorted(second.tolist())  # the same ones again
        found += first.tolist()
    assert len({tuple(block) for block in found}) == 10
    with pytest.raises(UsageError, match="--max_train_samples 2: less than one for each of 3 readers"):
        take(training(text, limit=2, rank=2, ranks=3), 1)


def test_too_little_text_is_an_error(tmp_path):
    text = load(write(tmp_path, 6), validation_file=write(tmp_path, 5, first=9000))["train"]
    with pytest.raises(UsageError, match="16_?000: the streamed text has .* tokens only, less than one block"):
        take(training(text, length=16_000), 1)
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n' * 30)
    blank = load([str(tmp_path / "blank.jsonl")])["train"]
    for kind in ("lines", "documents"):
        with pytest.raises(UsageError, match="holds no token"):
            take(training(blank, kind), 1)


# ---- evaluation ----
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [None, 7, 10_000])
def test_ranks_share_the_samples_of_one(kind, limit, tmp_path):
    text = load(write(tmp_path, 700, 500), "validation", validation_split_percentage=50)["validation"]

    def read(rank: int = 0, ranks: int = 1) -> list[dict]:
        return list(EvaluatedSamples(text, Numbered(), Cutter(kind, 48), rank=rank, ranks=ranks, limit=limit))

    one = read()
    assert [sample["number"] for sample in one] == [(0, i) for i in range(len(one))]
    assert len(one) == 7 if limit == 7 else len(one) > 100
    parts = [read(rank, 3) for rank in range(3)]
    assert [len(part) for part in parts] == [len(range(rank, len(one), 3)) for rank in range(3)]
    shared = sorted((sample for part in parts for sample in part), key=lambda sample: sample["number"])
    assert list(map(content, shared)) == list(map(content, one))
    if kind == "blocks":
        rows = [
            n
            for shard, size, first in ((0, 700, 0), (1, 500, 700))
            for n in range(first, first + size)
            if (n - first + shard) % 100 < 50
        ]
        expected = [LONGEST * n + place for n in rows for place in range(1 + n * 7 % 40)]
        assert sum(take(one, len(one)), []) == expected[: len(one) * 48]


def test_an_evaluation_reads_no_further_than_it_needs(tmp_path):
    text = load(write(tmp_path, *[100] * 50), "validation", validation_split_percentage=50)["validation"]
    samples = EvaluatedSamples(text, Numbered(), Cutter("blocks", 16), limit=3)
    assert len(list(samples)) == 3
    assert samples.encode.documents < 1000  # of 2500
