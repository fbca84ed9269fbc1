"""Feeds the readers of arguments, config files and text files with what was never meant for them, for as long as asked:

    python tests/faults/fuzz_readers.py --minutes 10

Each must give a result or one line that tells what is wrong (UsageError); anything else is a find, shown in its smallest
form. What was found is replayed by test_fuzz_finds.py.
"""

import argparse
import contextlib
import gzip
import io
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import pyarrow as pa
import pyarrow.parquet
import zstandard
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from utils import arguments, corpus
from utils.data_arguments import CausalDataArguments, DataArguments
from utils.errors import UsageError

TYPES = (arguments.ModelArguments, CausalDataArguments, arguments.LanguageModelingArguments)
BASE = ["--model_type", "gpt2", "--train_file", "a.txt", "--output_dir", "out", "--do_train", "--use_cpu"]
FLAGS = sorted(arguments.known_flags(arguments.Parser(TYPES)) - {"help", "deepspeed", "fsdp_config"})

# ---- what is fed ----
ODD_WORDS = st.one_of(
    st.sampled_from(
        ["", "0", "-1", "1e400", "nan", "inf", "true", "None", "{}", "[", "{'a': 1}", '{"a": 1}', "~", "\x00"]
    ),
    st.text(max_size=8),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
)
FLAG = st.sampled_from(FLAGS).map(lambda name: f"--{name}")
COMMANDS = st.lists(st.one_of(FLAG, ODD_WORDS, st.tuples(FLAG, ODD_WORDS).map("=".join)), max_size=6)

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
MAPPINGS = st.dictionaries(st.one_of(st.sampled_from(FLAGS), st.text(max_size=8)), VALUES, max_size=4)
CONFIGS = st.one_of(
    st.binary(max_size=60),
    MAPPINGS.map(lambda found: json.dumps(found).encode()),
    st.text(max_size=60).map(str.encode),
)


def parquet() -> bytes:
    content = io.BytesIO()
    pa.parquet.write_table(pa.table({"text": ["one", None, "two\n"], "number": [1, 2, 3]}), content)
    return content.getvalue()


WHOLE = {
    ".txt": "a line\n\nÜ 😀\r\nlast".encode(),
    ".csv": b'id,text\n1,"a, b"\n2,"c\nd"\n',
    ".tsv": b"id\ttext\n1\ta\n",
    ".json": b'[{"text": "a \\ud83d\\ude00"}, {"text": null}]',
    ".jsonl": b'{"text": "a"}\n{"text": "b", "more": [1, {}]}\n',
    ".parquet": parquet(),
}
WHOLE |= {f"{kind}.gz": gzip.compress(content) for kind, content in WHOLE.items()}
WHOLE |= {f"{kind}.zst": zstandard.compress(content) for kind, content in WHOLE.items() if not kind.endswith(".gz")}


@st.composite
def mutated(draw) -> tuple[str, bytes]:
    """(suffix, content): a whole file in which some bytes were changed, left out or put in, or none of it."""
    kind = draw(st.sampled_from(sorted(WHOLE)))
    content = bytearray(WHOLE[kind])
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(content)))
        end = min(len(content), place + draw(st.integers(0, 6)))
        content[place:end] = draw(
            st.one_of(st.binary(max_size=6), st.sampled_from([b'"', b"\n", b"{", b"]", b"\\ud800", b",,"]))
        )
    return kind, bytes(content)


# ---- what reads it ----
@contextlib.contextmanager
def unchanged_environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def allow(read: Callable[[], object]) -> None:
    """`read` gives a result, or a UsageError."""
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            unchanged_environment(),
        ):
            read()
    except UsageError as error:
        assert str(error).strip()


def parse_command(words: list[str]) -> None:
    if not {"--help", "-h"} & set(words):
        allow(lambda: arguments.parse(TYPES, [*BASE, *words]))


def parse_config(suffix: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"run{suffix}"
        path.write_bytes(content)
        allow(lambda: arguments.parse(TYPES, [str(path), *BASE]))


def read_text(file: tuple[str, bytes], streaming: bool) -> None:
    suffix, content = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"text{suffix}"
        path.write_bytes(content)

        def load() -> None:
            data = DataArguments(train_file=[str(path)], validation_file=[str(path)], streaming=streaming)
            text = corpus.load_text(data, ["train"], str(Path(folder) / "cache"))["train"]
            for row in text:
                assert row["text"] is None or isinstance(row["text"], str)

        allow(load)


TARGETS = {
    "arguments": (parse_command, {"words": COMMANDS}),
    "config files": (parse_config, {"suffix": st.sampled_from([".yaml", ".json"]), "content": CONFIGS}),
    "text files": (read_text, {"file": mutated(), "streaming": st.booleans()}),
}


def feed(targets: dict[str, tuple[Callable, dict]], description: str) -> None:
    """A program that feeds the targets, {name: (function, its inputs)}, in turns for as long as asked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    datasets.disable_progress_bars()
    end = time.monotonic() + 60 * asked.minutes
    rounds = {name: 0 for name in targets}
    number = asked.seed
    options = settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    while time.monotonic() < end:
        for name, (target, inputs) in targets.items():
            seed(number)(options(given(**inputs)(target)))()
            rounds[name] += 100
        number += 1
    print(", ".join(f"{name}: {count} inputs" for name, count in rounds.items()), "- nothing found")


if __name__ == "__main__":
    feed(TARGETS, __doc__.splitlines()[0])
