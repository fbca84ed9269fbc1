"""--elastic: a run that goes on with another number of processes, as if it had always had that many.

Four things make it so. Accumulation adapts, so that a step has the samples that it had (`keep_global_batch`). The order
of samples is cut into whole steps before it is shared out, so that the samples of each step are the same (`WholeSteps`).
Dropout is drawn anew for each micro-batch, by its place in the step and not by the process that computes it
(`MicroBatchSeeds`). And what each process has summed up since the last log goes on as the mean of all
(`mean_progress`). What remains is rounding: the sums of a step are added up in another order.
"""

import json
import logging
import math
import os
from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler
from transformers import TrainerCallback

from utils import checkpoint
from utils.errors import UsageError
from utils.training_arguments import LanguageModelingArguments

logger = logging.getLogger(__name__)

# The processes that the batch size on the command line is meant for, by launch.sh: a run may begin with fewer of them.
PROCESSES = "ELASTIC_PROCESSES"
PROGRESS_FILE = "progress_{}.json"  # of a checkpoint, one for each process that wrote it


def samples_per_step(args: LanguageModelingArguments) -> int:
    """Samples of one update, over all processes and micro-batches."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def keep_global_batch(args: LanguageModelingArguments, resumed: str | None) -> None:
    """Sets args.gradient_accumulation_steps so that a step has as many samples as it had; nothing without --elastic.

    resumed: the checkpoint that the run goes on from. Without one the command line counts, and ELASTIC_PROCESSES.
    Raises UsageError if the samples of a step cannot be shared out evenly.
    """
    if not args.elastic:
        return
    asked = samples_per_step(args)
    if resumed is not None:
        wanted = _samples_before(args, Path(resumed))
    else:
        wanted = asked // args.world_size * int(os.environ.get(PROCESSES) or args.world_size)
    at_once = args.train_batch_size * args.world_size
    if wanted % at_once:
        batches = wanted // args.train_batch_size
        counts = [str(count) for count in range(1, batches + 1) if batches % count == 0]
        raise UsageError(
            f"--elastic: a step of this run has {wanted} samples, which {args.world_size} processes with "
            f"--per_device_train_batch_size {args.per_device_train_batch_size} cannot share out evenly; use "
            f"{', '.join(counts[:12])} processes"
        )
    args.gradient_accumulation_steps = wanted // at_once
    if wanted != asked and args.process_index == 0:
        logger.warning(
            "--elastic: %d samples a step as before, in %d micro-batches of %d on each of %d processes",
            wanted,
            args.gradient_accumulation_steps,
            args.train_batch_size,
            args.world_size,
        )


def _samples_before(args: LanguageModelingArguments, resumed: Path) -> int:
    path = resumed / PROGRESS_FILE.format(0)
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8")).get("samples_per_step")
        if found is not None:
            return int(found)
    manifest = checkpoint.read_manifest(resumed)
    if manifest is None:
        raise UsageError(
            f"--elastic: {resumed} does not say how many processes wrote it; go on without --elastic, with as many as it "
            "had"
        )
    return samples_per_step(args) // args.world_size * manifest.processes


class WholeSteps(Sampler):
    """Another sampler's order, filled up from its beginning to whole steps, so that every number of processes has the same.

    Otherwise the last step of an epoch would be filled up to whole batches on all processes, another time with more and
    another time with fewer samples. step: samples of one. drop_last: leave the last step out in place of filling it up.
    seed: of a random order, which torch would draw from a generator of each process.
    """

    def __init__(self, order: Sampler, step: int, drop_last: bool, seed: int):
        if isinstance(order, RandomSampler):
            order = SeedableRandomSampler(order.data_source, data_seed=seed)
        self.sampler = order  # by this name EpochBegins finds it
        count = len(order)
        self._count = (count // step if drop_last else math.ceil(count / step)) * step

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        order = list(self.sampler)
        return islice(chain.from_iterable(repeat(order)), self._count)


class MicroBatchSeeds(TrainerCallback):
    """Seeds torch's generators before each micro-batch, by seed, step and the micro-batch's place in the step.

    That place is `micro-batch of this process * processes + rank`: accelerate deals batches out in turn. Nothing waits
    for the device.
    """

    def __init__(self):
        self._micro_batch = 0

    def on_step_begin(self, args, state, control, **_):
        self._micro_batch = 0
        self._seed(args, state.global_step)

    def on_substep_end(self, args, state, control, **_):
        self._micro_batch += 1
        self._seed(args, state.global_step)

    def _seed(self, args, step: int) -> None:
        place = self._micro_batch * args.world_size + args.process_index
        [seed] = np.random.SeedSequence((args.seed, step, place)).generate_state(1, np.uint64)
        torch.manual_seed(int(seed) >> 1)


def mean_progress(resumed: str) -> dict:
    """What CheckpointedTrainer keeps of its progress, as a mean over the processes that wrote the checkpoint."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in Path(resumed).glob(PROGRESS_FILE.format("*"))]
    return {name: sum(float(one[name]) for one in found) / len(found) for name in found[0]} if found else {}
