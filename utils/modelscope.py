"""Models and datasets from ModelScope (--hub modelscope), for where the Hugging Face hub cannot be reached.

Its own library fetches them, which is optional: pip install modelscope.
"""

import importlib
import logging
import os
from pathlib import Path

import filelock

from utils import doctor_checks
from utils.errors import UsageError, one_line

logger = logging.getLogger(__name__)


def check_installed() -> None:
    """Raises UsageError if ModelScope's library cannot be imported."""
    try:
        importlib.import_module("modelscope")
    except ImportError as error:
        raise UsageError(
            f"--hub modelscope: its library cannot be imported ({one_line(error)[:100]}); pip install modelscope, or leave "
            "the flag out and set HF_ENDPOINT to a mirror"
        ) from error


def model_folder(flag: str, name: str, revision: str | None, cache_dir: str | None) -> str:
    """The folder that holds the model of this name (OWNER/NAME on ModelScope), fetched if it is not there yet.

    revision: None for the newest. Raises UsageError, naming `flag`, if it cannot be had.
    """
    return _fetch("snapshot_download", flag, name, revision, cache_dir)


def dataset_folder(flag: str, name: str, cache_dir: str | None) -> str:
    """As model_folder, for the files of a dataset, which `datasets` reads."""
    return _fetch("dataset_snapshot_download", flag, name, None, cache_dir)


def _fetch(function: str, flag: str, name: str, revision: str | None, cache_dir: str | None) -> str:
    import modelscope

    lock = doctor_checks.cache_folder() / "modelscope.lock"
    try:
        Path(lock).parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock):  # of several processes one fetches, the others find it
            folder = getattr(modelscope, function)(name, revision=revision, cache_dir=cache_dir)
    except Exception as error:
        raise UsageError(
            f"{flag} {name}: ModelScope does not give it: {one_line(error)[:200]}; name it as ModelScope does, OWNER/NAME, "
            "or name a local folder"
        ) from error
    logger.info("%s from ModelScope, in %s", name, folder)
    return os.fspath(folder)
