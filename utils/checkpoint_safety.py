"""What a checkpoint may hold: plain data. Nothing in it is executed when it is read."""

import contextlib
import json
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, TrainerState
from transformers.trainer_pt_utils import safe_globals

from utils.errors import UsageError, one_line
from utils.sharded_checkpoint import first_error

PICKLED = (".pt", ".pth", ".bin")
# What torch says by the same kind of error, and is no fault of a file's.
OF_THE_DEVICE = ("out of memory", "not enough memory", "can't allocate memory")
# What trainer_state.json counts.
COUNTS = (
    "global_step",
    "max_steps",
    "num_train_epochs",
    "num_input_tokens_seen",
    "train_batch_size",
    "best_global_step",
)
PERIODS = ("logging_steps", "eval_steps", "save_steps")


@contextlib.contextmanager
def reading(checkpoint: str | None) -> Iterator[None]:
    """Turns the failure to read a checkpoint's file into a UsageError that names the file.

    The reader must unpickle with `weights_only`, as transformers does: a file that asks for anything else then fails.
    """
    try:
        with first_error():
            yield
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        name, wanted = _asks_for_code(Path(str(checkpoint))) or ("a file", _global_in(error))
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint}: {name} is refused, it asks to call {wanted}, which is not plain data; "
            "nothing was called; use only checkpoints that you trust"
        ) from error
    except (SafetensorError, EOFError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(checkpoint, error) from error
    except RuntimeError as error:
        if isinstance(error, torch.AcceleratorError) or any(words in str(error) for words in OF_THE_DEVICE):
            raise
        raise _unreadable(checkpoint, error) from error


def check_state(checkpoint: str) -> None:
    """Raises TypeError or ValueError unless trainer_state.json tells of a training: to be called within `reading`."""
    state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    for name in (*COUNTS, *PERIODS, "epoch", "total_flos"):
        value = getattr(state, name)
        if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise ValueError(f"trainer_state.json: {name} is {value!r}")
    if not isinstance(state.log_history, list) or not all(isinstance(entry, dict) for entry in state.log_history):
        raise TypeError("trainer_state.json: log_history is no list of entries")
    if not isinstance(state.best_model_checkpoint, str | None):
        raise TypeError(f"trainer_state.json: best_model_checkpoint is {state.best_model_checkpoint!r}")


def check_model(checkpoint: str, config: PreTrainedConfig) -> None:
    """Raises UsageError for a checkpoint of a model of another kind or size, as its config.json tells."""
    path = Path(checkpoint, "config.json")
    if not path.exists():
        return
    saved, own = json.loads(path.read_text(encoding="utf-8")), config.to_dict()
    for name in sorted(saved.keys() & own.keys(), key=lambda name: name != "model_type"):
        differ = saved[name] != own[name] and not name.endswith(("_id", "_index"))
        if differ and (name == "model_type" or type(saved[name]) is type(own[name]) is int):
            raise UsageError(
                f"--resume_from_checkpoint {checkpoint}: is of a model with {name} {saved[name]}, this run's has {own[name]}; "
                "name a checkpoint of the same model"
            )


def _unreadable(checkpoint: str | None, error: Exception) -> UsageError:
    told = one_line(error)[:120]
    if isinstance(error, LookupError):  # of which the message is but a name
        told = f"{told} is missing"
    return UsageError(
        f"--resume_from_checkpoint {checkpoint}: a file of it is damaged ({told}); name another checkpoint"
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
