"""Finds the place in a file that keeps it from being read, so that a message can name it."""

import codecs
import csv
import gzip
import io
import json
from typing import BinaryIO

from utils.errors import UsageError


def open_decompressed(file: str) -> BinaryIO:
    """The bytes of a file, of its content if it is .gz or .zst."""
    if file.endswith(".gz"):
        return gzip.open(file, "rb")
    if file.endswith(".zst"):
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(open(file, "rb"), read_across_frames=True))
    return open(file, "rb")


def diagnose(file: str, builder: str) -> None:
    """Raises UsageError with the place where `file` breaks the form that `builder` reads; returns if none is found.

    builder: "text", "csv", "json" or "parquet".
    """
    if builder == "parquet":
        with open_decompressed(file) as stream:
            if stream.read(4) != b"PAR1":
                raise UsageError(f"{file}: is not a parquet file: it does not start with PAR1")
        return
    check_encoding(file)
    if builder == "json":
        _check_json(file)
    if builder == "csv":
        _check_csv(file)


def check_encoding(file: str) -> None:
    """Raises UsageError naming the offset of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_decompressed(file) as stream:
        done = 0
        while True:
            chunk = stream.read(1 << 20)
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


def _check_json(file: str) -> None:
    with open_decompressed(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8")
        start = text.read(1 << 10).lstrip()
    if start.startswith("["):
        with open_decompressed(file) as stream:
            try:
                json.loads(stream.read())
            except json.JSONDecodeError as error:
                raise UsageError(f"{file}: line {error.lineno} is not JSON: {error.msg}") from error
        return
    with open_decompressed(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{file}: line {number} is not JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise UsageError(f'{file}: line {number} is not an object such as {{"text": "..."}}')


def _check_csv(file: str) -> None:
    delimiter = "\t" if ".tsv" in file else ","
    with open_decompressed(file) as stream:
        reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8", newline=""), delimiter=delimiter)
        header = next(reader, [])
        for row in reader:
            if len(row) > len(header):
                raise UsageError(
                    f"{file}: line {reader.line_num} has {len(row)} columns, its header {len(header)}; quote fields that "
                    "hold the separator"
                )
