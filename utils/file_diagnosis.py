"""Finds the place in a file that keeps it from being read, so that a message can name it."""

import codecs
import csv
import io
import json
import re
import sys
from pathlib import Path

from utils.compressed_files import DAMAGED, SUFFIXES, open_decompressed
from utils.errors import UsageError, one_line

# Bytes that are looked at in one go.
CHUNK = 1 << 20
HALF_A_PAIR = re.compile(r"[\ud800-\udfff]")
ESCAPED_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def is_tsv(file: str) -> bool:
    """Whether the file's columns are separated by tabs, by its name without .gz or .zst."""
    path = Path(file)
    return (Path(path.stem) if path.suffix in SUFFIXES else path).suffix.lower() == ".tsv"


def diagnose(file: str, builder: str) -> None:
    """Raises UsageError with the place where `file` breaks the form that `builder` reads; returns if none is found.

    builder: "text", "csv", "json" or "parquet".
    """
    try:
        check_start(file, builder)
        if builder == "parquet":
            return
        check_encoding(file)
        if builder == "json":
            _check_json(file)
        if builder == "csv":
            _check_long_rows(file)
    except DAMAGED as error:
        raise _damaged(file, error) from error


def check_start(file: str, builder: str) -> None:
    """Raises UsageError if the first bytes tell already that `builder` cannot read the file."""
    try:
        with open_decompressed(file) as stream:
            start = stream.read(1 << 16)
    except DAMAGED as error:
        raise _damaged(file, error) from error
    if not start:
        raise UsageError(f"{file}: is empty")
    if builder == "parquet":
        if not start.startswith(b"PAR1"):
            raise UsageError(f"{file}: is not a parquet file: it does not start with PAR1; name it by what it holds")
        return
    for magic, suffix in ((b"\x1f\x8b", ".gz"), (b"\x28\xb5\x2f\xfd", ".zst")):
        if start.startswith(magic):
            raise UsageError(f"{file}: is compressed; rename it to {file}{suffix}")
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UsageError(f"{file}: is not UTF-8 but UTF-16; convert it, e.g. iconv -f UTF-16 -t UTF-8 {file}")
    if b"\0" in start:
        raise UsageError(f"{file}: is binary, not text (a zero byte at byte offset {start.index(0)}); give UTF-8 text")


def check_encoding(file: str) -> None:
    """Raises UsageError naming the offset of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_decompressed(file) as stream:
        done = 0
        while True:
            chunk = stream.read(CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # The decoder counts from the bytes it had kept of the chunk before.
                offset = done - pending + error.start
                byte = error.object[error.start]
                raise UsageError(
                    f"{file}: is not UTF-8: byte 0x{byte:02x} at byte offset {offset}; convert it, e.g. "
                    f"iconv -f LATIN1 -t UTF-8 {file}"
                ) from error
            if not chunk:
                return
            done += len(chunk)


def check_short_rows(file: str, column: str) -> None:
    """Raises UsageError naming the first row of a csv file that ends before it comes to `column`."""
    for header, row, line in _csv_rows(file):
        if row and column in header and len(row) <= header.index(column):
            raise UsageError(
                f"{file}: line {line} has {len(row)} columns, its header {len(header)}, so that {column!r} is missing; "
                "quote fields that hold line breaks"
            )


def _check_long_rows(file: str) -> None:
    for header, row, line in _csv_rows(file):
        if len(row) > len(header):
            raise UsageError(
                f"{file}: line {line} has {len(row)} columns, its header {len(header)}; quote fields that hold the separator"
            )


def check_surrogates(file: str) -> None:
    """Raises UsageError for a .json file that is one array and has half a surrogate pair, which `datasets` leaves out."""
    if not _is_json_array(file):
        return
    with open_decompressed(file) as stream:
        is_suspect = ESCAPED_PAIR.search(stream.read())
    if is_suspect:
        check_encoding(file)
        _check_json_array(file)


def _csv_rows(file: str):
    """(header, row, number of the row's last line) of each row."""
    csv.field_size_limit(sys.maxsize)
    with open_decompressed(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter="\t" if is_tsv(file) else ",")
        header = next((row for row in reader if row), [])
        for row in reader:
            yield header, row, reader.line_num


def _check_json(file: str) -> None:
    if _is_json_array(file):
        _check_json_array(file)
    else:
        _check_json_lines(file)


def _is_json_array(file: str) -> bool:
    with open_decompressed(file) as stream:
        return stream.read(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _check_json_array(file: str) -> None:
    with open_decompressed(file) as stream:
        text = stream.read().decode("utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{file}: line {error.lineno} is not JSON: {error.msg} at column {error.colno}; mend it"
        ) from error
    kind = str if rows and isinstance(rows[0], str) else dict
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, kind):
            raise UsageError(f'{file}: item {number} of its array is not an object such as {{"text": "..."}}')
        _check_pairs(file, row, f"item {number} of its array")


def _check_json_lines(file: str) -> None:
    with open_decompressed(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"{file}: line {number} is not JSON: {error.msg} at column {error.colno}; mend it"
                ) from error
            if not isinstance(row, dict):
                raise UsageError(f'{file}: line {number} is not an object such as {{"text": "..."}}')
            _check_pairs(file, row, f"line {number}")


def _check_pairs(file: str, row: dict | str, place: str) -> None:
    if half := HALF_A_PAIR.search(json.dumps(row, ensure_ascii=False)):
        raise UsageError(
            f"{file}: {place} holds {ascii(half[0])[1:-1]}, half a surrogate pair and no character; mend it"
        )


def _damaged(file: str, error: BaseException) -> UsageError:
    return UsageError(f"{file}: is not a whole compressed file: {one_line(error)}; fetch or compress it again")
