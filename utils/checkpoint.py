"""Checkpoints that are whole or not there: commit, verify, find, rotate.

A checkpoint is written into a passing folder, `_incomplete/checkpoint-N`. When all its files are on the disk it gets a
manifest of their sizes and checksums, and one rename makes it `checkpoint-N`. What a killed process leaves is thus the
checkpoint before, whole, and a passing folder, which the next start removes. Files are covered by the manifest whoever
wrote them.

The newest checkpoint of a run is the one committed last, not the one with the highest number of steps: another run, or
this one before it went back to an earlier step, may have left higher numbers. This module knows neither torch nor
transformers.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from utils.errors import UsageError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STAGING = "_incomplete"  # the hub's clients leave out names with an underscore
NAME = re.compile(r"checkpoint-(\d+)")
REPLACED = re.compile(r"replaced-(checkpoint-\d+)")
PIECE = 2**24


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint must hold.

    run: the id of the run that wrote it, as in the output folder's run.json; None for a trainer without one.
    number: counts the commits of the run, from 1.
    files: {path in the checkpoint, with slashes: (bytes, XXH3-128 in hex)}.
    """

    run: str | None
    number: int
    step: int
    processes: int
    files: dict[str, tuple[int, str]]


def staged_folder(output_dir: str | Path, step: int) -> Path:
    """Where a checkpoint is written before it is committed."""
    return Path(output_dir, STAGING, f"checkpoint-{step}")


def names_by_size(staged: Path) -> list[str]:
    """The files in a folder, of any depth, the largest first: every nth name is about an nth of the bytes."""
    return [
        path.relative_to(staged).as_posix()
        for path in sorted(_files_in(staged), key=lambda path: -path.stat().st_size)
    ]


def describe(staged: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Flushes files of a folder and returns {name: (bytes, checksum)}. Raises OSError."""
    found = {}
    for name in names:
        path = staged / name
        _flush(path)
        found[name] = (path.stat().st_size, checksum(path))
    return found


def commit(
    staged: Path, run: str | None, step: int, processes: int, files: dict[str, tuple[int, str]] | None = None
) -> Path:
    """Flushes what is in `staged_folder`, adds the manifest and makes it the run's newest checkpoint; returns its path.

    For one process to call, after all have written. files: what `describe` found, where several processes have shared that
    work. What stands in the checkpoint's place is replaced if it is this run's, and else kept under another name. Raises
    OSError, with `staged` still there.
    """
    output_dir = staged.parent.parent
    final = output_dir / staged.name
    if files is None:
        files = describe(staged, names_by_size(staged))
    number = 1 + max((manifest.number for _, manifest in own(output_dir, run)), default=0)
    _write_manifest(staged, Manifest(run, number, step, processes, files))
    for folder in {path.parent for path in _files_in(staged)} | {staged, staged.parent}:
        _flush(folder)
    replaced = _make_way(final, run)
    try:
        os.rename(staged, final)
    except OSError:
        if replaced is not None:
            os.rename(replaced, final)
        raise
    _flush(output_dir)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def _make_way(final: Path, run: str | None) -> Path | None:
    if not os.path.lexists(final):
        return None
    manifest = None if final.is_symlink() else read_manifest(final)
    if manifest is not None and manifest.run == run:
        # Two renames, so for a moment neither is in place: `recover` puts this one back.
        replaced = final.parent / STAGING / f"replaced-{final.name}"
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
        return replaced
    kept = next(
        path for count in range(1, 10**6) if not os.path.lexists(path := final.with_name(f"{final.name}.kept{count}"))
    )
    os.rename(final, kept)
    logger.warning("%s: is not a checkpoint of this run; it is kept as %s", final, kept.name)
    return None


def recover(output_dir: str | Path) -> None:
    """Puts back a checkpoint whose replacement was cut off between two renames. For one process to call at a start."""
    for entry in _entries(Path(output_dir, STAGING)):
        name = REPLACED.fullmatch(entry.name)
        if name and not os.path.lexists(final := Path(output_dir, name[1])):
            os.rename(entry, final)


def discard_leftovers(output_dir: str | Path) -> None:
    """Removes what a killed save or removal left. For one process to call, when no save is under way."""
    staging = Path(output_dir, STAGING)
    for entry in _entries(staging):
        if NAME.fullmatch(entry.name) or re.fullmatch(r"(replaced|removed)-checkpoint-\d+", entry.name):
            discard(entry)
    if staging.is_dir() and not staging.is_symlink():
        with contextlib.suppress(OSError):  # something of somebody else's is in it
            staging.rmdir()


def discard(folder: Path) -> None:
    """Removes a passing folder, or a link in its place."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


# ---- verify ----
def checksum(path: Path) -> str:
    """XXH3-128 of a file's content, in hex."""
    digest = xxhash.xxh3_128()
    piece = memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def read_manifest(checkpoint: Path) -> Manifest | None:
    """The manifest; None where there is none, or where it is damaged itself."""
    try:
        content = json.loads((checkpoint / MANIFEST).read_bytes())
        if content.pop("checksum") != _checksum_of(content):
            return None
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        if not all(map(_is_inside, files)):
            return None
        run, number, step = content["run"], int(content["number"]), int(content["step"])
        return Manifest(None if run is None else str(run), number, step, int(content["processes"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_inside(name: str) -> bool:
    return bool(name) and not name.startswith("/") and "\\" not in name and ".." not in name.split("/")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if all is as it was committed. Reads every byte."""
    manifest = read_manifest(checkpoint)
    if manifest is None:
        state = "is damaged" if (checkpoint / MANIFEST).exists() else "is missing"
        return f"{MANIFEST} {state}"
    for name, (size, digest) in manifest.files.items():
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, {size} were written"
            if checksum(checkpoint / name) != digest:
                return f"{name} differs from what was written (checksum)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def check_named(resume: str, processes: int | None) -> None:
    """Raises UsageError if the checkpoint that the user names is damaged, or of another number of processes.

    One without a manifest, of transformers or of an earlier version, is taken as it is.
    """
    checkpoint = Path(resume)
    if not (checkpoint / MANIFEST).exists():
        return
    if (found := damage(checkpoint)) is not None:
        raise UsageError(
            f"--resume_from_checkpoint {resume}: {found}; name another checkpoint, or 'auto' for the newest whole one"
        )
    check_processes(checkpoint, processes)


def check_processes(checkpoint: Path, processes: int | None) -> None:
    """Raises UsageError unless the checkpoint was written by that many processes. None: any number will do."""
    manifest = read_manifest(checkpoint)
    if processes is not None and manifest is not None and manifest.processes != processes:
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint}: was written by {manifest.processes} processes, this run has "
            f"{processes}, which would see other data in another order; start it with --nproc_per_node so that there are "
            f"{manifest.processes}, or add --elastic"
        )


# ---- find ----
def own(output_dir: str | Path, run: str | None) -> list[tuple[Path, Manifest]]:
    """The run's checkpoints, the one committed first in front; their files are not looked at."""
    found = []
    for entry in _entries(Path(output_dir)):
        if NAME.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            manifest = read_manifest(entry)
            if manifest is not None and manifest.run == run:
                found.append((entry, manifest))
    return sorted(found, key=lambda pair: pair[1].number)


def newest(output_dir: str | Path, run: str | None, until: float = float("inf")) -> Path | None:
    """The run's newest checkpoint that is whole. Warns of damaged ones, and of those that have no manifest.

    until: how many steps it may have.
    """
    for entry in _entries(Path(output_dir)):
        if NAME.fullmatch(entry.name) and entry.is_dir() and read_manifest(entry) is None:
            logger.warning("%s: %s; it is passed over unless it is named", entry, damage(entry))
    for checkpoint, manifest in reversed(own(output_dir, run)):
        if manifest.step > until:
            continue
        found = damage(checkpoint)
        if found is None:
            return checkpoint
        logger.warning("%s: %s; going back to the checkpoint before", checkpoint, found)
    return None


# ---- rotate ----
def rotate(output_dir: str | Path, run: str | None, limit: int | None, best: str | None) -> None:
    """Removes the run's oldest checkpoints, so that `limit` are left; never the newest or the best.

    limit: None or 0 keeps all. best: the best checkpoint's folder. Other runs' checkpoints do not count and stay.
    """
    if not limit or limit < 0:
        return
    checkpoints = [path for path, _ in own(output_dir, run)]
    keep = {checkpoints[-1].name} if checkpoints else set()
    if best is not None and Path(best).absolute().parent == Path(output_dir).absolute():
        keep.add(Path(best).name)
    excess = len(checkpoints) - max(limit, len(keep))
    for checkpoint in [path for path in checkpoints if path.name not in keep][: max(excess, 0)]:
        remove(checkpoint)


def remove(checkpoint: Path) -> None:
    """Removes a committed checkpoint; files that are not in its manifest stay."""
    manifest = read_manifest(checkpoint)
    assert manifest is not None, checkpoint
    names = {*manifest.files, MANIFEST}
    try:
        if all(path.relative_to(checkpoint).as_posix() in names for path in _files_in(checkpoint)):
            # Out of sight at once, so that no half of it is ever met.
            removed = checkpoint.parent / STAGING / f"removed-{checkpoint.name}"
            removed.parent.mkdir(exist_ok=True)
            discard(removed)
            os.rename(checkpoint, removed)
            discard(removed)
        else:
            remove_files(checkpoint, [MANIFEST, *manifest.files])
    except OSError as error:
        logger.warning("%s: cannot be removed (%s)", checkpoint, error.strerror)


def remove_files(folder: Path, names: Collection[str]) -> None:
    """Removes those files, and the folders in which nothing is left then."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
    for path in sorted({parent for name in names for parent in (folder / name).parents}, reverse=True):
        if path.is_relative_to(folder):
            with contextlib.suppress(OSError):
                path.rmdir()


# ---- files ----
def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir()) if not folder.is_symlink() or folder.name != STAGING else []
    except OSError:
        return []


def _files_in(folder: Path) -> Iterator[Path]:
    for path, _, names in os.walk(folder):
        yield from (Path(path, name) for name in sorted(names))


def _checksum_of(content: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    content = {
        "run": manifest.run,
        "number": manifest.number,
        "step": manifest.step,
        "processes": manifest.processes,
        "files": {name: list(record) for name, record in manifest.files.items()},
    }
    content["checksum"] = _checksum_of(content)
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
