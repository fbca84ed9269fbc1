"""A stream whose token ids tell which document they are of."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import corpus
from utils.data_arguments import DataArguments
from utils.fast_encoding import Encoded

LONGEST = 64


class Numbered:
    """Encodes "n tokens …": that many ids from LONGEST * n on; of "none" there is none. Counts the documents."""

    def __init__(self):
        self.documents = 0

    def __call__(self, documents: pa.StringArray) -> Encoded:
        pairs = [list(map(int, text.split()[:2])) for text in documents.fill_null("").to_pylist() if text.strip()]
        self.documents += len(pairs)
        counts = np.array([count for _, count in pairs], dtype=np.int64)
        ids = [LONGEST * number + place for number, count in pairs for place in range(count)]
        return Encoded(np.array(ids, dtype=np.int64), counts)


def write(folder: Path, *sizes: int, first: int = 0, longest: int = 40) -> list[str]:
    """Files of so many documents each, numbered through from `first` on."""
    files, number = [], first
    for file, size in enumerate(sizes):
        rows = [f"{number + i} {1 + (number + i) * 7 % longest} {'x' * 60}" for i in range(size)]
        (folder / f"{first}-{file}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        files.append(str(folder / f"{first}-{file}.jsonl"))
        number += size
    return files


def load(files: list[str], *splits: str, **options):
    """The streams of corpus.load_text."""
    data = DataArguments(train_file=files, streaming=True, **options)
    return corpus.load_text(data, list(splits or ["train"]), str(Path(files[0]).parent))


def tokens(documents: int, longest: int = 40) -> list[int]:
    """All ids of so many documents."""
    return [LONGEST * n + place for n in range(documents) for place in range(1 + n * 7 % longest)]
