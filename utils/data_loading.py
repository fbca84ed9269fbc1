"""How batches reach the device: what a run does that says nothing of it.

On an accelerator batches are pinned and copied while it computes: without `non_blocking` the host would wait, in each step,
until all that was launched before is done, and then launch the next step onto an idle device.

Worker processes are used where a sample costs something, which is where tokens are drawn (0.25 ms a sample of 512 for
run_mlm.py, 2 ms for run_plm.py): on an accelerator, and where cores and shared memory are there for them. Blocks of
tokens are slices of a mapped file, 0.2 ms a batch: a worker would take longer to hand them over. On a CPU workers would
take cores from the computation. A stream cuts its text in a thread of its own.
"""

import json
import logging
import os
import shutil
from pathlib import Path

import torch
from transformers import TrainingArguments

from utils import device
from utils.objectives import dynamic_masking

logger = logging.getLogger(__name__)

WORKERS = 2
# Workers hand batches over in shared memory, of which containers often have 64 MiB: without it a run dies of SIGBUS.
SHARED_BYTES = 2**30


def begin(args: TrainingArguments) -> None:
    """Sets what needs no data: before TrainingArguments.__post_init__, which knows no number that is not given."""
    args.workers_are_chosen = args.dataloader_num_workers is None  # by `settle`
    args.dataloader_num_workers = args.dataloader_num_workers or 0
    if args.dataloader_pin_memory and not args.use_cpu:
        args.accelerator_config = copies_beside_computing(args.accelerator_config)


def copies_beside_computing(asked: dict | str | None) -> dict | str | None:
    """--accelerator_config with `non_blocking` true, unless it says something of that itself."""
    content = asked
    if isinstance(asked, str):
        content = json.loads(asked if asked.startswith("{") else Path(asked).read_text(encoding="utf-8"))
    if content is not None and (not isinstance(content, dict) or "non_blocking" in content):
        return asked
    return {**(content or {}), "non_blocking": True}


def settle(args: TrainingArguments, samples: torch.utils.data.Dataset | None) -> None:
    """Sets args.dataloader_num_workers for these samples, where no number was given."""
    if not args.workers_are_chosen or not isinstance(samples, dynamic_masking.DrawnSamples):
        return
    processes = device.local_process_count()
    args.dataloader_num_workers = workers(
        args.device.type != "cpu", _cores() // processes, _shared_bytes() // processes
    )
    if args.dataloader_num_workers:
        args.dataloader_persistent_workers = True  # new ones in each epoch would begin with an empty queue
        logger.info(
            "%d processes draw and collate samples; --dataloader_num_workers 0 leaves them out",
            args.dataloader_num_workers,
        )


def workers(has_accelerator: bool, cores: int, shared_bytes: int) -> int:
    """How many worker processes a process gets. cores, shared_bytes: what there is for each process of the run."""
    if not has_accelerator or shared_bytes < SHARED_BYTES:
        return 0
    return max(0, min(WORKERS, cores - 2))  # one core launches, and one pins


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _shared_bytes() -> int:
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0
