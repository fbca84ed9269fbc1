"""Trains the cases of test_elastic.py under torchrun: FOLDER NAME [FROM STEP], into FOLDER/<case>/NAME.

With FROM and STEP it goes on from FOLDER/<case>/FROM/checkpoint-STEP.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import resume
import torch

# All with dropout, and with epochs that end within a step.
CASES = {
    "causal": {"use_combine_grad": True, "logging_steps": 1},
    "causal, logs between": {"logging_steps": 4},
    "masked, accumulating": {"objective": "masked", "gradient_accumulation_steps": 2, "logging_steps": 1},
    "by length": {"train_sampling_strategy": "group_by_length", "logging_steps": 1},
}


def train(folder: Path, name: str, come_from: str | None = None, step: int = 0) -> None:
    for case, options in CASES.items():
        checkpoint = folder / case / come_from / f"checkpoint-{step}" if come_from else None
        resume.train(
            folder / case / name,
            checkpoint,
            elastic=True,
            per_device_train_batch_size=2,
            num_train_epochs=3,
            **options,
        )


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    train(Path(sys.argv[1]), *sys.argv[2:4], *map(int, sys.argv[4:]))
    torch.distributed.destroy_process_group()
