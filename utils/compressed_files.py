"""Bytes of .gz and .zst files; a damaged one raises an error, it never just ends early, and none expands without end."""

import gzip
import hashlib
import io
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import BinaryIO

import fsspec.compression
import zstandard

from utils.errors import UsageError

SUFFIXES = (".gz", ".zst")
# What a damaged file raises while it is read.
DAMAGED = (EOFError, OSError, zlib.error, zstandard.ZstdError)
READ_SIZE = 1 << 17
# A byte of a .zst may stand for 32 KiB: so few are expanded at once.
SLICE = 1 << 10
# Text shrinks to a tenth, a log of equal lines to a hundredth; what was made to fill a disk, to a thousandth and less.
SUSPICIOUS_BYTES = 1 << 28
SUSPICIOUS_RATIO = 500


class _ZstdFrames(io.RawIOBase):
    """The content of a .zst file of any number of frames.

    zstandard's own stream_reader takes the end of a file that was cut for the end of its content. This one raises
    EOFError there, as gzip does.
    """

    def __init__(self, compressed: BinaryIO):
        self.compressed = compressed
        self.frame: zstandard.ZstdDecompressionObj | None = None  # the frame that is read just now
        self.rest = memoryview(b"")  # of what was read, not yet decompressed
        self.content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.content:
            if not self.rest:
                self.rest = memoryview(self.compressed.read(READ_SIZE))
            if not self.rest and self.frame is not None:
                raise EOFError("Compressed file ended before the end of its last frame")
            if not self.rest:
                return 0
            self.content = memoryview(self._decompress(bytes(self.rest[:SLICE])))
            self.rest = self.rest[SLICE:]
        count = min(len(buffer), len(self.content))
        buffer[:count] = self.content[:count]
        self.content = self.content[count:]
        return count

    def _decompress(self, chunk: bytes) -> bytes:
        parts = []
        while chunk:
            frame = self.frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            parts.append(frame.decompress(chunk))
            chunk = frame.unused_data if frame.eof else b""
            self.frame = None if frame.eof else frame
        return b"".join(parts)

    def close(self) -> None:
        self.compressed.close()
        super().close()


class _Bounded(io.RawIOBase):
    """The content of a compressed file. Raises UsageError where it is so much more than the file that it is no text."""

    def __init__(self, content: io.RawIOBase | gzip.GzipFile, compressed: BinaryIO):
        self.content = content
        self.compressed = compressed
        self.bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.content.readinto(buffer)
        self.bytes += count
        if self.bytes > SUSPICIOUS_BYTES and self.bytes > SUSPICIOUS_RATIO * self.compressed.tell():
            name = getattr(self.compressed, "name", None) or getattr(self.compressed, "path", "a compressed file")
            raise UsageError(
                f"{name}: its first {self.compressed.tell():,} bytes expand to more than {SUSPICIOUS_BYTES:,}, as no text "
                "does; if it is what you want, decompress it and name that file"
            )
        return count

    def close(self) -> None:
        self.content.close()
        self.compressed.close()
        super().close()


def _open_zstd(compressed: BinaryIO, mode: str = "rb", **_) -> BinaryIO:
    if "r" not in mode:
        return zstandard.ZstdCompressor().stream_writer(compressed)
    return io.BufferedReader(_Bounded(_ZstdFrames(compressed), compressed), READ_SIZE)


def _open_gzip(compressed: BinaryIO, mode: str = "rb", **options) -> BinaryIO | gzip.GzipFile:
    if "r" not in mode:
        return gzip.GzipFile(fileobj=compressed, mode=mode, **options)
    return io.BufferedReader(_Bounded(gzip.GzipFile(fileobj=compressed, mode="rb"), compressed), READ_SIZE)


# `datasets` opens compressed files by way of fsspec.
fsspec.compression.register_compression("zstd", _open_zstd, "zst", force=True)
fsspec.compression.register_compression("gzip", _open_gzip, "gz", force=True)


def open_decompressed(file: str) -> BinaryIO | gzip.GzipFile:
    """The bytes of a file, of its content if it is .gz or .zst."""
    if file.endswith(".gz"):
        return _open_gzip(open(file, "rb"))
    if file.endswith(".zst"):
        return _open_zstd(open(file, "rb"))
    return open(file, "rb")


def decompressed_copy(file: str, folder: str) -> str:
    """The name of a copy of `file`'s content in `folder`, made if it is not there. `file` itself if not compressed.

    Several processes may ask at once.
    """
    if not file.endswith(SUFFIXES):
        return file
    state = os.stat(file)
    key = hashlib.sha256(f"{os.path.abspath(file)} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    copy = Path(folder) / f"{key[:16]}-{Path(file).stem}"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=copy.parent, delete=False) as part:
            try:
                with open_decompressed(file) as content:
                    shutil.copyfileobj(content, part, 1 << 20)
            except BaseException:
                os.unlink(part.name)
                raise
        os.replace(part.name, copy)
    return str(copy)
