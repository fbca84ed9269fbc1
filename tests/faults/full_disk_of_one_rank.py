"""Trains on two ranks, of which one finds its disk full in its second save: a link to /dev/full, where the kernel says so.

Run under torchrun; rank 0 prints one JSON line {case: what was seen}, lists being of both ranks.
"""

import json
import logging
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import resume
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from utils import checkpoint

FILES = {0: "optimizer.pt", 1: "rng_state_1.pth"}


class FullDisk(TrainerCallback):
    """Lays the link before the second save, and notes what counts as saved after it and after the third."""

    def __init__(self, file: str):
        self.file = file
        self.seen: dict = {}

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1 and args.process_index == 0:
            folder = checkpoint.staged_folder(args.output_dir, 2)
            folder.mkdir(parents=True)
            (folder / self.file).symlink_to("/dev/full")

    def on_save(self, args, state, control, **_):
        if state.global_step in (2, 3):
            self.trainer.finish_saves()
            saved = self.trainer.saved_now()
            self.seen[f"saved at {state.global_step}"] = gather_object([saved and saved.name])


class Told(logging.Handler):
    def __init__(self):
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def train(folder: Path, file: str, in_background: bool) -> dict:
    disk, told = FullDisk(file), Told()
    logging.getLogger("utils").addHandler(told)
    disk.trainer = resume.trainer_in(
        folder, callbacks=[disk], max_steps=4, eval_strategy="no", async_save=in_background, use_combine_grad=True
    )
    disk.trainer.train()
    logging.getLogger("utils").removeHandler(told)
    seen = {**disk.seen, "steps": gather_object([disk.trainer.state.global_step])}
    if disk.trainer.args.process_index == 0:
        folders = sorted(folder.glob("checkpoint-*"))
        newest = checkpoint.newest(folder, None)
        seen |= {
            "whole": [entry.name for entry in folders if checkpoint.damage(entry) is None],
            "newest": newest and newest.name,
            "told": told.lines,
            "left over": [str(path) for path in (folder / "_incomplete").glob("*")],
        }
    return seen


def main() -> None:
    torch.distributed.init_process_group("gloo")
    folder = [str(resume.memory_folder())] if os.environ["RANK"] == "0" else [""]
    torch.distributed.broadcast_object_list(folder)
    found = {
        f"{how}, rank {rank}": train(Path(folder[0], f"{how} {rank}"), FILES[rank], how == "behind")
        for how in ("at once", "behind")
        for rank in FILES
    }
    torch.distributed.barrier()  # before the files go
    if os.environ["RANK"] == "0":
        print(json.dumps(found))
        shutil.rmtree(folder[0])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
