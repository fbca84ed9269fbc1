"""Bytes of .gz and .zst files; a damaged one raises an error, it never just ends early."""

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

SUFFIXES = (".gz", ".zst")
# What a damaged file raises while it is read.
DAMAGED = (EOFError, OSError, zlib.error, zstandard.ZstdError)
READ_SIZE = 1 << 17


class _ZstdFrames(io.RawIOBase):
    """The content of a .zst file of any number of frames.

    zstandard's own stream_reader takes the end of a file that was cut for the end of its content. This one raises
    EOFError there, as gzip does.
    """

    def __init__(self, compressed: BinaryIO):
        self.compressed = compressed
        self.frame = None  # the frame that is read just now
        self.content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.content:
            chunk = self.compressed.read(READ_SIZE)
            if not chunk and self.frame is not None:
                raise EOFError("Compressed file ended before the end of its last frame")
            if not chunk:
                return 0
            self.content = memoryview(self._decompress(chunk))
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


def _open_zstd(compressed: BinaryIO, mode: str = "rb", **_) -> BinaryIO:
    if "r" not in mode:
        return zstandard.ZstdCompressor().stream_writer(compressed)
    return io.BufferedReader(_ZstdFrames(compressed), READ_SIZE)


# `datasets` opens compressed files by way of fsspec.
fsspec.compression.register_compression("zstd", _open_zstd, "zst", force=True)


def open_decompressed(file: str) -> BinaryIO:
    """The bytes of a file, of its content if it is .gz or .zst."""
    if file.endswith(".gz"):
        return gzip.open(file, "rb")
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
