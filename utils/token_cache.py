"""Token ids in files: written while text is encoded, mapped into memory, kept from run to run.

A folder of the cache holds ids.npy (all documents end to end, the smallest unsigned type), ends.npy (int64, where each
document ends) and index.json (counts and checksums). np.load reads the arrays. A folder is complete or absent: it is
written under another name and renamed at its end, and what is damaged later is found by the checksums.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import filelock
import numpy as np
import xxhash

from utils.errors import UsageError, one_line

logger = logging.getLogger(__name__)

LAYOUT = 1  # part of every key: a change of what is written here wants another number
ARRAYS = ("ids.npy", "ends.npy")
INDEX = "index.json"
READ = 1 << 20


@dataclass(frozen=True)
class Tokens:
    """A split's token ids.

    ids: unsigned, (tokens,), all documents end to end. ends: int64, (documents,): document i is
    ids[ends[i - 1] : ends[i]], the first begins at 0. seconds: what making them took, in whichever run that was.
    cut_off: tokens beyond max_length.
    """

    ids: np.ndarray
    ends: np.ndarray
    seconds: float = 0.0
    cut_off: int = 0


@dataclass
class Totals:
    """What building found beside the arrays."""

    seconds: float = 0.0
    cut_off: int = 0


Build = Callable[["Writer"], Totals]


def cached(folder: str, key: str, dtype: np.dtype, build: Build, overwrite: bool = False) -> Tokens:
    """What is cached under `key`, mapped into memory; builds it if there is nothing, or nothing whole.

    build: appends all documents to the Writer that it is given. Of several processes one builds, the others wait. Where
    the folder cannot be written, the ids go to a temporary file that no other process finds, and the log says so.
    Raises UsageError if there is no room for that either.
    """
    place = Path(folder) / key
    if not overwrite and (found := load(place)) is not None:
        logger.info("token ids found in %s", place)
        return found
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{place}.lock")
        with _acquired(lock, place):
            if not overwrite and (found := load(place)) is not None:
                logger.info("another process has left token ids in %s", place)
                return found
            _build_in_place(place, dtype, build)
        found = load(place)
        if found is None:
            raise OSError(f"what was written in {place} reads differently")
        return found
    except (OSError, NotImplementedError) as error:
        logger.warning(
            "--cache_dir: %s cannot be written (%s); token ids go to a temporary file in %s, and each process and run "
            "makes its own; name a folder with room by --cache_dir",
            place.parent,
            one_line(error)[:200],
            tempfile.gettempdir(),
        )
    return _build_unnamed(dtype, build, folder)


def _acquired(lock: filelock.BaseFileLock, place: Path):
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.info("another process makes %s; waiting for it", place)
        return lock.acquire()


def _build_in_place(place: Path, dtype: np.dtype, build: Build) -> None:
    """Called by the holder of the lock only: what lies there under a passing name is what a killed process left."""
    building, former = Path(f"{place}.building"), Path(f"{place}.former")
    for left in (building, former):
        shutil.rmtree(left, ignore_errors=True)
    building.mkdir()
    try:
        with open(building / ARRAYS[0], "wb") as ids, open(building / ARRAYS[1], "wb") as ends:
            writer = Writer(ids, ends, dtype)
            totals = build(writer)
            writer.finish()
        files = {name: {"bytes": os.path.getsize(building / name), "xxh3": _sum(building / name)} for name in ARRAYS}
        index = {"layout": LAYOUT, "documents": writer.documents, "tokens": writer.tokens}
        (building / INDEX).write_text(json.dumps({**index, **asdict(totals), "files": files}, indent=1) + "\n")
        # A process that has the former one mapped keeps it.
        if place.exists():
            place.rename(former)
        building.rename(place)
        shutil.rmtree(former, ignore_errors=True)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _build_unnamed(dtype: np.dtype, build: Build, folder: str) -> Tokens:
    """In files without a name, which end with the process however it ends."""
    try:
        ids, ends = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        writer = Writer(ids, ends, dtype)
        totals = build(writer)
        writer.finish()
    except OSError as error:
        raise UsageError(
            f"--cache_dir {folder}: token ids can be written neither there nor in {tempfile.gettempdir()}: "
            f"{one_line(error)[:200]}; name a folder with room by --cache_dir"
        ) from error
    return Tokens(_map(ids, dtype, writer.tokens), _map(ends, np.dtype(np.int64), writer.documents), **asdict(totals))


class Writer:
    """Writes two .npy files that grow."""

    def __init__(self, ids: BinaryIO, ends: BinaryIO, dtype: np.dtype):
        self.files = {"ids": ids, "ends": ends}
        self.dtypes = {"ids": np.dtype(dtype), "ends": np.dtype(np.int64)}
        self.documents = 0
        self.tokens = 0
        self._write_headers()

    def append(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Documents: their ids end to end, and the number of ids of each."""
        ends = self.tokens + np.cumsum(counts)
        self.files["ids"].write(ids.astype(self.dtypes["ids"]).data)
        self.files["ends"].write(ends.astype(np.int64).data)
        self.documents += len(counts)
        self.tokens += len(ids)

    def finish(self) -> None:
        for file in self.files.values():
            file.seek(0)
        self._write_headers()
        for file in self.files.values():
            file.flush()

    def _write_headers(self) -> None:
        for name, length in (("ids", self.tokens), ("ends", self.documents)):
            # NumPy leaves room in the header for the length to grow.
            header = {"descr": self.dtypes[name].str, "fortran_order": False, "shape": (length,)}
            np.lib.format.write_array_header_1_0(self.files[name], header)


def _map(file: BinaryIO, dtype: np.dtype, length: int) -> np.ndarray:
    """The array of an open .npy file, read-only."""
    if length == 0:
        return np.zeros(0, dtype=dtype)  # nothing cannot be mapped
    file.seek(0)
    assert np.lib.format.read_magic(file) == (1, 0)
    shape, _, found = np.lib.format.read_array_header_1_0(file)
    assert shape == (length,) and found == dtype
    return np.memmap(file, dtype=dtype, mode="r", offset=file.tell(), shape=(length,))


def load(place: Path) -> Tokens | None:
    """What a folder of the cache holds; None if it is absent or not whole, which the log then says."""
    if not place.is_dir():
        return None
    try:
        index = json.loads((place / INDEX).read_text())
        for name, expected in index["files"].items():
            if os.path.getsize(place / name) != expected["bytes"] or _sum(place / name) != expected["xxh3"]:
                raise ValueError(f"{name} is not what was written")
        arrays = {}
        for name, length in zip(ARRAYS, (index["tokens"], index["documents"]), strict=True):
            with open(place / name, "rb") as file:
                np.lib.format.read_magic(file)
                _, _, dtype = np.lib.format.read_array_header_1_0(file)
                arrays[name.split(".")[0]] = _map(file, dtype, length)
        return Tokens(**arrays, seconds=index["seconds"], cut_off=index["cut_off"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        logger.warning("%s is damaged (%s); tokenizing again", place, one_line(error)[:200])
        return None


def _sum(path: Path) -> str:
    total = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(READ):
            total.update(block)
    return total.hexdigest()
