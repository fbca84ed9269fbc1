"""From a text file to blocks: the stock recipe (datasets.map and group_texts) beside this package.

    python -m benchmarks.text_to_blocks --tokenizer FOLDER [--megabytes 20 | --text FILE]
    python -m benchmarks.text_to_blocks --tokenizer FOLDER --growth

The text is what is found on this machine, no paragraph twice, or a text file of yours. Each measurement is a fresh process
with a cold cache; sides take turns. The time is from the file to blocks that can be read; imports and the loading of the
tokenizer, which both sides do alike, are before it. CPU seconds are of all threads: other work on the machine changes them
less. All token ids are compared, with those that are dropped.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from benchmarks import text_on_this_machine

BLOCK_SIZE = 1024
GROWTH = (20, 80, 320)  # megabytes


@dataclass(frozen=True)
class Outcome:
    """Of one measurement. peak: bytes of memory of the process's own. checksum: of all ids."""

    seconds: float
    cpu_seconds: float
    peak: int
    tokens: int
    dropped: int
    checksum: str


def stock(file: Path, tokenizer, cache: str):
    """Blocks as transformers' run_clm.py makes them."""
    import datasets

    text = datasets.load_dataset("text", data_files=str(file), split="train", keep_linebreaks=True, cache_dir=cache)
    tokens = text.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=["text"])

    def group_texts(batch: dict) -> dict:
        joined = {name: list(chain(*rows)) for name, rows in batch.items()}
        end = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
        cut = {name: [ids[i : i + BLOCK_SIZE] for i in range(0, end, BLOCK_SIZE)] for name, ids in joined.items()}
        return {**cut, "labels": cut["input_ids"].copy()}

    return tokens.map(group_texts, batched=True), tokens


def ours(file: Path, tokenizer, cache: str):
    """(blocks, all token ids)."""
    from utils import corpus, packing, tokenization
    from utils.data_arguments import DataArguments

    small = file.with_name("validation.txt")  # so that none of the text is taken for validation
    data = DataArguments(train_file=[str(file)], validation_file=[str(small)])
    text = corpus.load_text(data, ["train"], cache)["train"]
    tokens = tokenization.tokenize(text, tokenizer, cache)
    return packing.pack(tokens, BLOCK_SIZE, "train"), tokens


def measure(side: str, file: Path, tokenizer_folder: str, connection) -> None:
    """Sends an Outcome."""
    import datasets
    import numpy as np
    import transformers
    import xxhash

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    from utils import corpus, packing, tokenization  # noqa: F401 - imports do not count, for either side

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    file.with_name("validation.txt").write_text("a\n")
    peak = PeakMemory()
    with tempfile.TemporaryDirectory() as cache, peak:
        begin, cpu_begin = time.perf_counter(), time.process_time()
        blocks, tokens = ours(file, tokenizer, cache) if side == "ours" else stock(file, tokenizer, cache)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
        peak.stop()
        checksum, count = xxhash.xxh3_64(), 0
        if side == "ours":
            parts = (tokens.ids[start : start + (1 << 20)] for start in range(0, len(tokens.ids), 1 << 20))
        else:
            tables = tokens.with_format("arrow").iter(batch_size=10_000)
            parts = (chunk.flatten().to_numpy() for table in tables for chunk in table.column("input_ids").chunks)
        for ids in parts:
            count += len(ids)
            checksum.update(ids.astype(np.int64).tobytes())
        dropped = count - len(blocks) * BLOCK_SIZE
        connection.send(Outcome(seconds, cpu_seconds, peak.bytes, count, dropped, checksum.hexdigest()))


class PeakMemory:
    """The most anonymous memory that this process has at a time: pages of files mapped into memory are not counted.

    Those the system takes back when it needs room.
    """

    def __init__(self):
        self.bytes = 0
        self.done = threading.Event()

    def __enter__(self) -> "PeakMemory":
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            [line] = [line for line in status.splitlines() if line.startswith("RssAnon")]
            self.bytes = max(self.bytes, int(line.split()[1]) * 1024)

    def stop(self) -> None:
        self.done.set()

    def __exit__(self, *error) -> None:
        self.stop()


def in_a_process(side: str, file: Path, tokenizer_folder: str) -> Outcome:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=measure, args=(side, file, tokenizer_folder, there))
    process.start()
    there.close()
    outcome = here.recv()
    process.join()
    return outcome


def compare(file: Path, tokenizer_folder: str, rounds: int) -> None:
    size = file.stat().st_size
    measured: dict[str, list[Outcome]] = {"stock": [], "ours": []}
    for number in range(rounds):
        for side in ("stock", "ours") if number % 2 == 0 else ("ours", "stock"):
            measured[side].append(in_a_process(side, file, tokenizer_folder))
    for side, outcomes in measured.items():
        seconds, cpu_seconds, peak = (
            statistics.median(getattr(outcome, name) for outcome in outcomes)
            for name in ("seconds", "cpu_seconds", "peak")
        )
        tokens, dropped = outcomes[0].tokens, outcomes[0].dropped
        print(
            f"{side:5}  {seconds:7.2f} s  {cpu_seconds:7.2f} CPU s  {size / 1e6 / seconds:6.1f} MB/s  "
            f"peak {peak / 2**20:5.0f} MiB  {tokens} tokens, {dropped} dropped ({dropped / tokens:.2%})"
        )
    sums = {outcome.checksum for outcomes in measured.values() for outcome in outcomes}
    print(f"ids: {'the same' if len(sums) == 1 else 'DIFFERENT'}")
    for name, words in (("seconds", "time"), ("cpu_seconds", "CPU time")):
        pairs = zip(measured["stock"], measured["ours"], strict=True)
        ratios = [getattr(stock, name) / getattr(ours, name) for stock, ours in pairs]
        print(
            f"ratio of {words}, median of {rounds} pairs: {statistics.median(ratios):.1f} "
            f"({min(ratios):.1f} to {max(ratios):.1f})"
        )
    if len(sums) != 1:
        raise SystemExit(1)


def write_text(file: Path, megabytes: float) -> None:
    """What is found on this machine, and how much of it is of each kind."""
    total, sizes = text_on_this_machine.write(file, megabytes)
    shares = ", ".join(f"{kind} {size / total:.0%}" for kind, size in sizes.items())
    print(f"text: {total / 1e6:.1f} MB, no paragraph twice; {shares}", flush=True)


def grow(file: Path, tokenizer_folder: str) -> None:
    """Ours alone. Where this machine has less text than is asked for, what there is, then as often as is needed."""
    write_text(file, max(GROWTH))
    whole, found = file.with_name("whole.txt"), file.stat().st_size
    file.rename(whole)
    for megabytes in GROWTH:
        missing = megabytes * 1_000_000
        with file.open("wb") as output, whole.open("rb") as source:
            while missing > 0:
                block = source.read(min(missing, 1 << 20))
                if not block:
                    source.seek(0)
                output.write(block)
                missing -= len(block)
            # Cut where a line ends: a character is not cut either.
            size = output.tell()
        with file.open("rb+") as output:
            output.seek(size - (1 << 16))
            output.truncate(size - (1 << 16) + output.read().rindex(b"\n") + 1)
        outcome, size = in_a_process("ours", file, tokenizer_folder), file.stat().st_size
        print(
            f"{size / 1e6:4.0f} MB  {outcome.seconds:6.2f} s  {outcome.cpu_seconds:6.2f} CPU s  "
            f"{size / 1e6 / outcome.seconds:5.1f} MB/s  peak {outcome.peak / 2**20:5.0f} MiB  {outcome.tokens} tokens"
            + (f"  (the same {found / 1e6:.0f} MB again)" if size > found else ""),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="a tokenizer's folder")
    parser.add_argument("--megabytes", type=float, default=20, help="of text that is found on this machine")
    parser.add_argument("--text", type=Path, help="a text file, instead")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of measurements")
    parser.add_argument("--growth", action="store_true", help="ours alone, at 20, 80 and 320 MB")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"load of the machine at the start: {load:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.txt"
        if arguments.growth:
            grow(file, arguments.tokenizer)
            return
        if arguments.text is not None:
            file.write_bytes(arguments.text.read_bytes())
            print(f"text: {arguments.text}, {file.stat().st_size / 1e6:.1f} MB")
        else:
            write_text(file, arguments.megabytes)
        compare(file, arguments.tokenizer, arguments.rounds)


if __name__ == "__main__":
    main()
