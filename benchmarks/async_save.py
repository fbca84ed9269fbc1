"""How long training stands still for a checkpoint: --async_save beside a save that is waited for, GPT-2 124M in float32.

    python -m benchmarks.async_save [--rounds 6] [--steps 12] [--folder FOLDER] [--output result.json]

Two trainings, each in a process of its own, take turns: each time one does so many steps, the first of which ends with a
save, and waits until that is on the disk before it is the other's turn. Told are medians:

save        how long a save takes that is waited for
stall       how long training does not go on because of a save: what it takes to begin it, and waiting for copies
beside      how much longer the other steps take than those of the other side, which have the machine for themselves
on disk     when the checkpoint was complete, after its step
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from benchmarks.trainers import make_ids
from benchmarks.turns import Side, in_turns
from utils import device
from utils.objectives import causal
from utils.packing import Blocks
from utils.trainer import LanguageModelingTrainer
from utils.training_arguments import LanguageModelingArguments

SIZES = {"gpt2": {}, "tiny": {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 64}}


class TimedTrainer(LanguageModelingTrainer):
    """Adds up what the training thread does for checkpoints."""

    stall = waits = 0.0

    def _save_checkpoint(self, *arguments, **named) -> None:
        start = time.perf_counter()
        super()._save_checkpoint(*arguments, **named)
        self.stall += time.perf_counter() - start

    def wait_for_copies(self) -> None:
        start = time.perf_counter()
        super().wait_for_copies()
        self.waits += time.perf_counter() - start


class Rounds(TrainerCallback):
    """A round of `steps` for each word of the connection; answers with what it took."""

    def __init__(self, trainer: TimedTrainer, steps: int, connection: Connection):
        self.trainer, self.steps, self.connection = trainer, steps, connection
        self.times: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, args, state, control, **_):
        if state.global_step % self.steps == 0:
            self.connection.recv()  # EOFError ends the process
            self.times, self.committed = [], None
            self.trainer.stall = self.trainer.waits = 0.0
        elif state.global_step % self.steps == 1:
            self.first_ends()
        self.start = time.perf_counter()

    def first_ends(self) -> None:
        """The first step and its save are over: what is left of the save goes on beside the others."""
        save = self.trainer.in_background
        if save is not None:
            save.written.add_done_callback(lambda _: setattr(self, "committed", time.perf_counter()))
        self.first_end = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        device.synchronize(args.device)
        self.times.append(time.perf_counter() - self.start)
        control.should_save = state.global_step % self.steps == 1
        if state.global_step % self.steps == 0:
            self.trainer.finish_saves()
            behind = max(0.0, self.committed - self.first_end) if self.committed else 0.0
            loss = self.trainer._tr_loss.item()
            self.connection.send((self.trainer.stall, self.trainer.waits, behind, sum(self.times[1:]), loss))


def drive(
    size: str, on: str, length: int, steps: int, in_background: bool, folder: str, connection: Connection
) -> None:
    """A training that saves in the first step of each round."""
    disable_progress_bar()
    config = GPT2Config(**SIZES[size], use_cache=False)
    torch.manual_seed(0)
    args = LanguageModelingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        max_steps=1_000_000,
        learning_rate=1e-5,
        save_strategy="no",
        logging_strategy="no",
        save_total_limit=1,
        async_save=in_background,
        use_combine_grad=True,
        use_cpu=on == "cpu",
        disable_tqdm=True,
        report_to="none",
    )
    trainer = TimedTrainer(
        model=GPT2LMHeadModel(config),
        args=args,
        train_dataset=Blocks(make_ids(1000, length, config.vocab_size)),
        data_collator=causal.collate,
        token_sums=causal.token_sums,
    )
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(Rounds(trainer, steps, connection))
    trainer.train()


def summary(outcomes: dict[str, list[tuple]]) -> dict:
    """Medians, and ratios to the save that is waited for; times in seconds."""
    begins, waits, ends, others, losses = (
        {name: [outcome[i] for outcome in found] for name, found in outcomes.items()} for i in range(5)
    )
    stalls = [begin + wait for begin, wait in zip(begins["async"], waits["async"], strict=True)]
    save = statistics.median(begins["waited for"])
    stall = statistics.median(stalls)
    beside = [own - alone for own, alone in zip(others["async"], others["waited for"], strict=True)]
    return {
        "save_seconds": save,
        "stall_seconds": stall,
        "stall_share": stall / save,
        "longest_stall_share": max(stalls) / save,
        "waits_for_copies_seconds": statistics.median(waits["async"]),
        "begins": begins,
        "waits": waits["async"],
        "beside_seconds": statistics.median(beside),
        "on_disk_seconds": statistics.median(ends["async"]),
        "losses": losses,
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=device.accelerator() or "cpu")
    parser.add_argument("--size", choices=SIZES, default="gpt2")
    parser.add_argument("--rounds", type=int, default=6, help="saves of each side that count")
    parser.add_argument("--steps", type=int, default=12, help="from one save to the next")
    parser.add_argument("--length", type=int, default=128, help="tokens in the batch")
    parser.add_argument("--folder", help="where the checkpoints are written: the disk counts")
    parser.add_argument("--output", help="write the result here, as JSON")
    options = parser.parse_args(words)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    sides = {
        name: Side(
            drive,
            (options.size, options.device, options.length, options.steps, name == "async", str(folder / name)),
        )
        for name in ("waited for", "async")
    }
    try:
        result = summary(in_turns(sides, "round", options.rounds, warm_up=1))
    finally:
        for side in sides.values():
            side.end()
        shutil.rmtree(folder)
    print(f"save that is waited for {result['save_seconds']:8.3f} s")
    print(
        f"stall by --async_save   {result['stall_seconds']:8.3f} s, {100 * result['stall_share']:.1f} % of it; "
        f"the longest {100 * result['longest_stall_share']:.1f} %"
    )
    print(f"of which for copies     {result['waits_for_copies_seconds']:8.3f} s")
    print(f"other steps take        {result['beside_seconds']:8.3f} s more in all, beside the writing")
    print(f"on disk after           {result['on_disk_seconds']:8.3f} s")
    last = {name: losses[-1] for name, losses in result["losses"].items()}
    print("losses, added up       ", ", ".join(f"{name} {loss:.6f}" for name, loss in last.items()))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
