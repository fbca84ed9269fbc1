"""Loads batches of a stream, and keeps in a checkpoint where each rank's loader stands."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import TrainerCallback

from utils.document_packing import FILLER
from utils.errors import UsageError
from utils.training_arguments import LanguageModelingArguments

FILE = "data_state_{}.json"


class StreamLoader(StatefulDataLoader):
    """A loader of training batches whose state is that of the samples that have been given out.

    It is not accelerate's: that one lets rank 0 read a stream for all, or all ranks read all of it.

    tokens: in all batches so far, padding left out. device: where batches go, beside what is computed if they are pinned.
    """

    tokens = 0
    device = torch.device("cpu")

    def __init__(self, *arguments, **named):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            # Seeds of workers are drawn from a generator of its own: dropout sees nothing of loading.
            super().__init__(*arguments, **named, generator=torch.Generator())

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self._counted(_told(super().__iter__()))

    def _counted(self, batches: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches:
            self.tokens += count_tokens(batch)
            yield send_to_device(batch, self.device, non_blocking=self.pin_memory)


class EvaluationLoader(DataLoader):
    """A loader whose errors of users are those of the process itself."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return _told(super().__iter__())


def _told(batches: Iterator) -> Iterator:
    try:
        yield from batches
    except UsageError as error:
        # A worker's comes with its traceback; the message is behind the error's name.
        raise UsageError(str(error).rsplit("UsageError: ", 1)[-1].strip(), of_one_rank=True) from error


def count_tokens(batch: dict[str, torch.Tensor]) -> int:
    """The tokens of a batch, padding left out."""
    if "documents" in batch:
        return int((batch["documents"] != FILLER).sum())
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


class StreamEpochs(TrainerCallback):
    """Counts a stream's epochs by steps, since its loader knows no end: up to `epochs` at the last step."""

    def __init__(self, epochs: float):
        self.epochs = epochs

    def on_step_end(self, args, state, control, **_):
        before = self.epochs * (state.global_step - 1) / state.max_steps
        state.epoch = self.epochs * state.global_step / state.max_steps
        if int(before) < int(state.epoch) and state.global_step < state.max_steps:
            control.should_log = control.should_log or args.logging_strategy == "epoch"
            control.should_save = control.should_save or args.save_strategy == "epoch"
            control.should_evaluate = control.should_evaluate or args.eval_strategy == "epoch"


def loader(
    samples: IterableDataset, batch_size: int, collate: Callable, args: LanguageModelingArguments, is_training: bool
) -> StreamLoader | EvaluationLoader:
    """Batches of StreamedSamples (training) or EvaluatedSamples, as --dataloader_* flags say."""
    workers = args.dataloader_num_workers or 0
    if not is_training:
        workers = min(1, workers)  # each reads all
    batches = (StreamLoader if is_training else EvaluationLoader)(
        samples,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        persistent_workers=args.dataloader_persistent_workers and workers > 0 and is_training,
        multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
    )
    if is_training:
        batches.device = args.device
    return batches


def save(batches: StreamLoader, folder: str, args: LanguageModelingArguments) -> None:
    """Writes where this rank's loader stands into a checkpoint. For every rank to call."""
    state = {"stream": _description(batches, args), "loader": batches.state_dict(), "tokens": batches.tokens}
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, FILE.format(args.process_index)).write_text(json.dumps(state) + "\n", encoding="utf-8")


def load(batches: StreamLoader, folder: str, args: LanguageModelingArguments) -> None:
    """Lets the loader go on where it stood when the checkpoint was written. For every rank to call.

    Raises UsageError if the checkpoint does not say where that was, or has been written by another number of readers or
    of another stream.
    """
    remedy = "or add --ignore_data_skip to begin the text anew"
    first = Path(folder, FILE.format(0))
    if not first.exists():
        raise UsageError(f"{folder}: has no {first.name}, which says how far the stream was read; {remedy[3:]}")
    before = _read(first)["stream"]
    for flag, now in _description(batches, args).items():
        if before.get(flag) != now:
            raise UsageError(
                f"{folder}: its stream was read with {flag} {before.get(flag)}, now it is {now}; go on with what it was, "
                f"{remedy}"
            )
    state = _read(Path(folder, FILE.format(args.process_index)))
    batches.load_state_dict(state["loader"])
    batches.tokens = state["tokens"]


def _description(batches: StreamLoader, args: LanguageModelingArguments) -> dict:
    readers = {"processes": args.world_size, "dataloader_num_workers": args.dataloader_num_workers}
    return json.loads(json.dumps(readers | batches.dataset.description))


def _read(file: Path) -> dict:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        return {"stream": dict(state["stream"]), "loader": dict(state["loader"]), "tokens": int(state["tokens"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{file}: cannot be read, so how far the stream was read is unknown; name another checkpoint, or add "
            "--ignore_data_skip to begin the text anew",
            of_one_rank=True,
        ) from error
