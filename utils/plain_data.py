"""What a checkpoint may hold: plain data. Nothing in it is executed when it is read."""

import contextlib
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.trainer_pt_utils import safe_globals

from utils.errors import UsageError, one_line

PICKLED = (".pt", ".pth", ".bin")


@contextlib.contextmanager
def reading(checkpoint: str) -> Iterator[None]:
    """Turns the failure to read a checkpoint's file into a UsageError that names the file.

    The reader must unpickle with `weights_only`, as transformers does: a file that asks for anything else then fails.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        name, wanted = _asks_for_code(Path(checkpoint)) or ("a file", _global_in(error))
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint}: {name} is refused, it asks to call {wanted}, which is not plain data; "
            "nothing was called; use only checkpoints that you trust"
        ) from error
    except (SafetensorError, EOFError, json.JSONDecodeError) as error:
        raise _unreadable(checkpoint, error) from error
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: str, error: Exception) -> UsageError:
    return UsageError(
        f"--resume_from_checkpoint {checkpoint}: a file of it is damaged ({one_line(error)[:120]}); name another checkpoint"
    )


def _asks_for_code(checkpoint: Path) -> tuple[str, str] | None:
    """The first file whose pickle asks for more than plain data, and what it asks for."""
    for path in sorted(checkpoint.iterdir()):
        if path.suffix in PICKLED and path.name != "training_args.bin":  # that one is never read
            with contextlib.suppress(Exception), safe_globals():
                wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                if wanted:
                    return path.name, ", ".join(sorted(wanted))
    return None


def _global_in(error: Exception) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found[1] if found else "something"
