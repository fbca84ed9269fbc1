"""Checkpoints whose state lies in shards: which engine wrote them, that they hold plain data, and what went wrong with one.

FSDP2's are folders of torch.distributed.checkpoint: a file .metadata, a pickle of what lies where, and a file of each rank
with tensors and, among them, pickles of other values, such as the optimizer's groups. torch unpickles whatever stands there.
"""

import contextlib
import io
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer_pt_utils import safe_globals

from utils.errors import UsageError, one_line

METADATA = ".metadata"
# The modules whose classes .metadata may name, and what it may name of others.
DESCRIBING = {module.__name__: module for module in (metadata, filesystem)}
PLAIN = {
    ("builtins", "set"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


def check_engine(checkpoint: str, flag: str | None) -> None:
    """Raises UsageError for a checkpoint whose state is not as the engine of `flag`, or none, keeps it."""
    names = os.listdir(checkpoint) if os.path.isdir(checkpoint) else []
    wrote = None
    if any(name.startswith("pytorch_model_fsdp") for name in names):
        wrote = "--fsdp"
    elif any(re.fullmatch(r"global_step\d+", name) for name in names):
        wrote = "--deepspeed"
    if wrote != flag:
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint}: was written {_with(wrote)}, and this run is {_with(flag)}; go on as it "
            "began, or begin anew with the weights that it saved, by --model_name_or_path"
        )


def _with(flag: str | None) -> str:
    return "without --fsdp and --deepspeed" if flag is None else f"with {flag}"


def check_plain(checkpoint: str) -> None:
    """Raises pickle.UnpicklingError if reading FSDP2's shards would call more than plain data needs.

    Tensors are not looked at: torch reads them as plain data anyway.
    """
    for description in sorted(Path(checkpoint).glob(f"*/{METADATA}")):
        with open(description, "rb") as file:
            described = _Description(file).load()
        for index, place in described.storage_data.items():
            if not isinstance(described.state_dict_metadata.get(index.fqn), metadata.BytesStorageMetadata):
                continue
            with open(description.parent / place.relative_path, "rb") as file:
                file.seek(place.offset)
                value = io.BytesIO(file.read(place.length))
            with safe_globals():
                torch.load(value, weights_only=True)


class _Description(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        describes = isinstance(getattr(DESCRIBING.get(module), name, None), type)  # no name with a dot passes
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if describes or is_type or (module, name) in PLAIN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


@contextlib.contextmanager
def first_error() -> Iterator[None]:
    """Raises what torch met first in a shard, of whichever rank; torch's own error holds all of them and is no Exception."""
    try:
        yield
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {one_line(first)}") from error
