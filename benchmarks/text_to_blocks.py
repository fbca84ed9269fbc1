"""From a text file to blocks: the stock recipe (datasets.map and group_texts) beside this package.

    python -m benchmarks.text_to_blocks --tokenizer FOLDER --megabytes 20
    python -m benchmarks.text_to_blocks --tokenizer FOLDER --growth

Each measurement is a fresh process with a cold cache; sides take turns. The time is from the file to blocks that can be
read; imports and the loading of the tokenizer, which both sides do alike, are before it. All token ids are compared, with
those that are dropped.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import threading
import time
from itertools import chain
from pathlib import Path

BLOCK_SIZE = 1024
SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def paragraphs() -> list[str]:
    """The texts in ../shared/data, a paragraph each; where they are absent the sample corpus."""
    if not SHARED.is_dir():
        from utils import sample_corpus

        with tempfile.TemporaryDirectory() as folder:
            sample_corpus.write(Path(folder) / "a.txt", documents=20_000, seed=1)
            return (Path(folder) / "a.txt").read_text(encoding="utf-8").split("\n")
    found = []
    for name in ("wikitext-2-raw-v1/wiki.valid.raw", "wikitext-2-raw-v1/wiki.test.raw", "wiki_demo.txt"):
        found += (SHARED / name).read_text(encoding="utf-8").split("\n")
    for name in ("c4_demo.jsonl", "state_union.jsonl"):
        for row in (SHARED / name).read_text(encoding="utf-8").splitlines():
            found += json.loads(row)["text"].split("\n")
    return found


def write_text(file: Path, megabytes: float) -> int:
    """Paragraphs in random order, again and again, a line each. Returns the bytes written."""
    order, written, draw = paragraphs(), 0, random.Random(0)
    with file.open("w", encoding="utf-8") as output:
        while written < megabytes * 1e6:
            draw.shuffle(order)
            for paragraph in order:
                output.write(paragraph + "\n")
                written += len(paragraph.encode()) + 1
                if written >= megabytes * 1e6:
                    break
    return written


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
    from utils import corpus, packing, tokenization
    from utils.data_arguments import DataArguments

    small = file.with_name("validation.txt")  # so that none of the text is taken for validation
    small.write_text("a\n")
    data = DataArguments(train_file=[str(file)], validation_file=[str(small)])
    text = corpus.load_text(data, ["train"], cache)["train"]
    return packing.pack(tokenization.tokenize(text, tokenizer, cache), BLOCK_SIZE, "train")


def measure(side: str, file: Path, tokenizer_folder: str, connection) -> None:
    """Sends seconds, peak memory of the process's own, tokens, tokens dropped, and a checksum of all ids."""
    import datasets
    import numpy as np
    import transformers
    import xxhash

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    from utils import corpus, packing, tokenization  # noqa: F401 - imports do not count, for either side

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    peak = PeakMemory()
    with tempfile.TemporaryDirectory() as cache, peak:
        begin = time.perf_counter()
        if side == "ours":
            blocks = ours(file, tokenizer, cache)
        else:
            blocks, tokens = stock(file, tokenizer, cache)
        seconds = time.perf_counter() - begin
        peak.stop()
        total = xxhash.xxh3_64()
        if side == "ours":
            whole = blocks.ids.base  # the remainder too
            while whole.base is not None and isinstance(whole.base, np.ndarray):
                whole = whole.base
            count, dropped = blocks.tokens, blocks.dropped_tokens
            for start in range(0, count, 1 << 20):
                total.update(whole[start : start + (1 << 20)].astype(np.int64).tobytes())
        else:
            count = 0
            for table in tokens.with_format("arrow").iter(batch_size=10_000):
                ids = np.concatenate([c.flatten().to_numpy() for c in table.column("input_ids").chunks])
                count += len(ids)
                total.update(ids.astype(np.int64).tobytes())
            dropped = count - len(blocks) * BLOCK_SIZE
    connection.send((seconds, peak.bytes, count, dropped, total.hexdigest()))


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


def in_a_process(side: str, file: Path, tokenizer_folder: str) -> tuple:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=measure, args=(side, file, tokenizer_folder, there))
    process.start()
    there.close()
    outcome = here.recv()
    process.join()
    return outcome


def compare(file: Path, size: int, tokenizer_folder: str, rounds: int) -> None:
    measured: dict[str, list[tuple]] = {"stock": [], "ours": []}
    for number in range(rounds):
        for side in ("stock", "ours") if number % 2 == 0 else ("ours", "stock"):
            measured[side].append(in_a_process(side, file, tokenizer_folder))
    ratios = [a[0] / b[0] for a, b in zip(*measured.values(), strict=True)]
    for side, outcomes in measured.items():
        seconds, memory = (statistics.median(outcome[i] for outcome in outcomes) for i in (0, 1))
        _, _, tokens, dropped, _ = outcomes[0]
        print(
            f"{side:5}  {seconds:7.2f} s  {size / 1e6 / seconds:6.1f} MB/s  peak {memory / 2**20:5.0f} MiB  "
            f"{tokens} tokens, {dropped} dropped ({dropped / tokens:.2%})"
        )
    sums = {outcome[4] for outcomes in measured.values() for outcome in outcomes}
    print(f"ids: {'the same' if len(sums) == 1 else 'DIFFERENT'}")
    print(f"ratio, median of {rounds} pairs: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
    if len(sums) != 1:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="a tokenizer's folder")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of measurements")
    parser.add_argument("--growth", action="store_true", help="ours alone, at 20, 80 and 320 MB")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"load of the machine at the start: {load:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.txt"
        if not arguments.growth:
            compare(file, write_text(file, arguments.megabytes), arguments.tokenizer, arguments.rounds)
            return
        for megabytes in (20, 80, 320):
            size = write_text(file, megabytes)
            seconds, memory, tokens, _, _ = in_a_process("ours", file, arguments.tokenizer)
            print(
                f"{size / 1e6:4.0f} MB  {seconds:6.2f} s  {size / 1e6 / seconds:5.1f} MB/s  peak {memory / 2**20:5.0f} MiB  "
                f"{tokens} tokens"
            )


if __name__ == "__main__":
    main()
