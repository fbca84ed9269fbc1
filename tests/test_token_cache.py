"""What is cached is whole or made anew; many processes make it once; without a folder that can be written, runs go on."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from commands import ROOT, TINY_GPT2, results, run_distributed, run_script
from datasets import Dataset

from utils import token_cache, tokenization
from utils.data_arguments import DataArguments
from utils.errors import UsageError
from utils.token_cache import Totals, cached, load
from utils.tokenization import tokenize
from utils.tokenizer_training import train

PARTS = [([1, 2, 300], [1, 0, 2]), ([4], [1])]  # (ids, number of ids of each document)


def build(writer) -> Totals:
    for ids, counts in PARTS:
        writer.append(np.array(ids), np.array(counts))
    return Totals(seconds=2.5, cut_off=7)


def never(writer) -> Totals:
    raise AssertionError("built again")


def check(tokens) -> None:
    assert tokens.ids.tolist() == [1, 2, 300, 4] and tokens.ids.dtype == np.uint16
    assert tokens.ends.tolist() == [1, 1, 3, 4] and tokens.ends.dtype == np.int64
    assert (tokens.seconds, tokens.cut_off) == (2.5, 7)


# ---- files ----
def test_what_is_written_is_mapped_and_numpy_reads_it(tmp_path):
    tokens = cached(str(tmp_path), "key", np.uint16, build)
    check(tokens)
    assert isinstance(tokens.ids, np.memmap) and not tokens.ids.flags.writeable
    assert np.load(tmp_path / "key" / "ids.npy", mmap_mode="r").tolist() == [1, 2, 300, 4]
    assert np.load(tmp_path / "key" / "ends.npy").tolist() == [1, 1, 3, 4]
    assert {entry.name for entry in tmp_path.iterdir()} <= {"key", "key.lock"}
    check(cached(str(tmp_path), "key", np.uint16, never))


def test_no_document_and_no_token(tmp_path):
    for key, counts in (("none", []), ("empty", [0, 0])):

        def build_empty(writer, counts=counts) -> Totals:
            writer.append(np.zeros(0, np.int64), np.array(counts, dtype=np.int64))
            return Totals()

        for make in (build_empty, never):
            tokens = cached(str(tmp_path), key, np.uint8, make)
            assert len(tokens.ids) == 0 and tokens.ends.tolist() == counts


def test_overwrite_makes_it_anew_and_leaves_a_mapped_one_alone(tmp_path):
    before = cached(str(tmp_path), "key", np.uint16, build)

    def other(writer) -> Totals:
        writer.append(np.array([9]), np.array([1]))
        return Totals()

    assert cached(str(tmp_path), "key", np.uint16, other, overwrite=True).ids.tolist() == [9]
    check(before)


# ---- damage ----
def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: flip(place / "ids.npy", -1),
        lambda place: flip(place / "ids.npy", 20),
        lambda place: flip(place / "ends.npy", -8),
        lambda place: os.truncate(place / "ids.npy", 130),
        lambda place: (place / "ends.npy").unlink(),
        lambda place: (place / "index.json").unlink(),
        lambda place: (place / "index.json").write_text('{"layout": 1'),
        lambda place: (place / "index.json").write_text("{}"),
        lambda place: (place / "index.json").write_text("[]"),
        lambda place: (place / "index.json").write_text((place / "index.json").read_text().replace(": 4,", ": 3,")),
        lambda place: (place / "index.json").write_bytes(b"\xff"),
    ],
)
def test_damage_is_found_and_mended(damage, tmp_path, caplog):
    cached(str(tmp_path), "key", np.uint16, build)
    damage(tmp_path / "key")
    check(cached(str(tmp_path), "key", np.uint16, build))
    assert "damaged" in caplog.text
    check(cached(str(tmp_path), "key", np.uint16, never))


def test_a_builder_that_is_killed_leaves_nothing_that_counts(tmp_path):
    program = (
        "import sys, time, numpy as np\nfrom utils.token_cache import cached\n"
        "def build(writer):\n    writer.append(np.arange(100_000), np.array([100_000]))\n"
        "    print('half', flush=True)\n    time.sleep(60)\n"
        f"cached({str(tmp_path)!r}, 'key', np.uint16, build)\n"
    )
    builder = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert builder.stdout.readline() == "half\n"
    assert (tmp_path / "key.building").exists() and not (tmp_path / "key").exists()
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    check(cached(str(tmp_path), "key", np.uint16, build))
    assert not (tmp_path / "key.building").exists()


def test_an_error_while_building_is_told_and_leaves_nothing(tmp_path):
    def fail(writer) -> Totals:
        writer.append(np.arange(9), np.array([9]))
        raise ValueError("of the text")

    with pytest.raises(ValueError, match="of the text"):
        cached(str(tmp_path), "key", np.uint16, fail)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"key.lock"}


# ---- several processes ----
def test_eight_processes_at_once_build_it_once(tmp_path):
    program = (
        "import sys, time, numpy as np\nfrom utils.token_cache import Totals, cached\n"
        "def build(writer):\n    open(sys.argv[1] + '/builds', 'a').write('x')\n"
        "    time.sleep(1)\n    writer.append(np.arange(1000), np.array([1000]))\n    return Totals()\n"
        "input()\n"
        "print(cached(sys.argv[1] + '/cache', 'key', np.uint16, build).ids.sum())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [subprocess.Popen(command, **pipes) for _ in range(8)]
    time.sleep(0.5)
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=120)[0] for process in processes] == ["499500\n"] * 8
    assert (tmp_path / "builds").read_text() == "x"


def test_ranks_build_it_once_and_a_second_run_finds_it(corpus, tmp_path):
    command = [*TINY_GPT2, "--train_file", corpus / "train.txt", "--block_size", 32, "--max_steps", 2, "--do_train"]
    command += ["--cache_dir", tmp_path / "cache", "--log_level_replica", "info", "--output_dir"]
    done = run_distributed("run_clm.py", *command, tmp_path / "a")
    assert done.stdout.count("GPT2Tokenizer encodes word by word, through tiktoken") == 1
    assert done.stdout.count("token ids found in") == 1
    done = run_script("run_clm.py", *command, tmp_path / "b")
    assert "encodes" not in done.stdout and "token ids found in" in done.stdout
    first, second = results(tmp_path / "a"), results(tmp_path / "b")
    for name in ("data_seconds", "data_tokens", "data_dropped_tokens"):
        assert first[name] == second[name] >= 0
    assert first["data_tokens"] > 1000 > 32 > first["data_dropped_tokens"] and first["data_seconds"] > 0
    done = run_distributed("run_clm.py", *command, tmp_path / "c", "--overwrite_cache")
    assert done.stdout.count("GPT2Tokenizer encodes word by word, through tiktoken") == 1


# ---- no room ----
def test_a_folder_that_cannot_be_made_is_told_and_the_run_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    tokens = cached(str(tmp_path / "file" / "tokens"), "key", np.uint16, build)
    check(tokens)
    assert isinstance(tokens.ids, np.memmap)
    [message] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "--cache_dir" in message and str(tmp_path / "file") in message and "name a folder with room" in message


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, which may be made read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def build_large(writer) -> Totals:
    for _ in range(20):
        writer.append(np.arange(10_000), np.array([10_000]))
    return Totals()


def test_a_full_disk(small_disk, caplog):
    tokens = cached(str(small_disk), "key", np.uint16, build_large)
    assert tokens.ids.shape == (200_000,) and tokens.ids[-1] == 9999
    assert "No space left on device" in caplog.text and "--cache_dir" in caplog.text
    assert not (small_disk / "key").exists() and not (small_disk / "key.building").exists()


def test_a_read_only_disk(small_disk, caplog):
    check(cached(str(small_disk), "old", np.uint16, build))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    check(cached(str(small_disk), "old", np.uint16, never))  # what is there can be read
    assert caplog.text == ""
    check(cached(str(small_disk), "new", np.uint16, build))
    assert "Read-only file system" in caplog.text


def test_no_room_anywhere(tmp_path):
    program = (
        "import sys, numpy as np\nfrom utils import errors\nfrom utils.token_cache import cached\n"
        "def build(writer):\n    writer.append(np.arange(100_000), np.array([100_000]))\n"
        f"errors.run(lambda: cached({str(tmp_path)!r}, 'key', np.uint16, build), lambda: False)\n"
    )
    limit = (50_000, 50_000)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "error:" in line]
    assert f"--cache_dir {tmp_path}" in line and "File too large" in line and "name a folder with room" in line


def test_the_error_of_no_room_is_one_for_users(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache.tempfile, "tempdir", str(tmp_path / "absent"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--cache_dir"):
        cached(str(tmp_path / "file"), "key", np.uint16, build)


# ---- keys ----
@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train(Dataset.from_dict({"text": (corpus / "train.txt").read_text().splitlines()}), "gpt2", 400)


def test_the_key_follows_what_the_ids_depend_on(corpus, tokenizer, tmp_path):
    datasets.disable_progress_bars()
    file = tmp_path / "a.txt"
    file.write_text("one two\nthree\n" * 30)

    def key(tokenizer=tokenizer, max_length=None, split="train", **arguments) -> str:
        arguments = {"train_file": [str(file)], **arguments}
        text = tokenization_text(arguments, split, tmp_path)
        return tokenization.cache_key(text, tokenizer, tokenization.describe(tokenizer), max_length)

    first = key()
    assert key() == first
    tokenizer("a", truncation=True, max_length=2)  # leaves its mark in the tokenizer
    tokenizer(["a", "b c"], padding=True, pad_to_multiple_of=8) if tokenizer.pad_token else None
    assert key() == first
    other = train(Dataset.from_dict({"text": ["a b a b"]}), "gpt2", 300)
    others = [key(max_length=8), key(max_length=9), key(tokenizer=other), key(split="validation")]
    others += [key(validation_split_percentage=20), key(keep_linebreaks=False)]
    file.write_text("one two\nthrEE\n" * 30)
    others.append(key())
    assert len({first, *others}) == len(others) + 1


def tokenization_text(arguments: dict, split: str, folder: Path) -> Dataset:
    from utils import corpus

    return corpus.load_text(DataArguments(**arguments), ["train", "validation"], str(folder / "cache"))[split]


def test_text_is_tokenized_once(corpus, tokenizer, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    datasets.disable_progress_bars()
    for overwrite, found in ((False, 0), (False, 1), (True, 1)):
        text = tokenization_text({"train_file": [str(corpus / "train.txt")]}, "train", tmp_path)
        tokenize(text, tokenizer, tmp_path / "cache", overwrite=overwrite)
        assert caplog.text.count("token ids found in") == found
    [place] = [place for place in (tmp_path / "cache" / "tokens").iterdir() if place.is_dir()]
    index = json.loads((place / "index.json").read_text())
    assert index["documents"] == len(text) and index["tokens"] == len(load(place).ids) and index["seconds"] > 0
