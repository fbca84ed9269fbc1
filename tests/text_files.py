"""Files of every kind that the scripts read, written from rows of text."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

# Quotes, separators, characters of one to four bytes. 40 rows: 5% of them are two.
ROWS = [f'row {i}, "quoted"\tü 好 😀' for i in range(40)]

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def separated(rows: list[str], separator: str) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(rows))
    return file.getvalue().encode()


def json_lines(rows: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": row}) + "\n" for i, row in enumerate(rows)).encode()


def json_array(rows: list[str]) -> bytes:
    return json.dumps([{"id": i, "text": row} for i, row in enumerate(rows)], indent=1).encode()


def parquet(rows: list[str]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(rows)), "text": rows}), file)
    return file.getvalue()


# By the file's name without .gz and .zst.
KINDS = {
    "lines.txt": lambda rows: "".join(row + "\n" for row in rows).encode(),
    "wiki.raw": lambda rows: "".join(row + "\n" for row in rows).encode(),
    "table.csv": lambda rows: separated(rows, ","),
    "table.tsv": lambda rows: separated(rows, "\t"),
    "array.json": json_array,
    "lines.json": json_lines,
    "lines.jsonl": json_lines,
    "table.parquet": parquet,
}


def write(folder: Path, name: str, rows: list[str] = ROWS) -> str:
    """The path of a file of that name, its kind and compression by its name, with `rows`."""
    suffix = next(s for s in (".gz", ".zst", "") if name.endswith(s))
    kind = next(kind for kind in KINDS if name.removesuffix(suffix).endswith(Path(kind).suffix))
    kind = name.removesuffix(suffix) if name.removesuffix(suffix) in KINDS else kind
    (folder / name).write_bytes(COMPRESS[suffix](KINDS[kind](rows)))
    return str(folder / name)


def content(name: str, row: str) -> str:
    """What is read of a row in a file of that name: text files keep their line breaks."""
    return row + "\n" if ".txt" in name or ".raw" in name else row
