"""Numbers that go wrong: gradients that are not finite, and losses that leap.

A step whose gradient norm is not finite updates nothing. The norm is that of the gradients averaged over all ranks, so
that one rank's overflow makes all skip. With loss scaling torch's GradScaler sees to it. Without, the fused kernels take
the verdict on the device (`found_inf`, as GradScaler would hand it to them), and the host reads it a step later, when it
is long known: nothing waits. For kernels that do not obey it, torch_npu's among them, an explicit --max_bad_steps costs
one read of the norm a step. Without that flag such a device counts bad steps by itself, and training ends when the host
next reads anyway, to log or to save: the weights are lost then, but no checkpoint is written with them. Where all numbers are finite, every bit stays what it would be.

A loss leaps if it lies above the median of the last SPIKE_WINDOW logged losses by more than SPIKE_DEVIATIONS robust
standard deviations (1.4826 times the median absolute deviation; at least SPIKE_FLOOR of the median, since a loss that
hardly moves deviates by nothing). Logged losses are the mean over ranks, and on the host anyway.
"""

import logging
import math
import statistics
from collections import deque
from itertools import islice
from pathlib import Path

import torch
from transformers import TrainerCallback

from utils import checkpoint, device, output_folder
from utils.errors import UsageError
from utils.main_process import told_by_main

logger = logging.getLogger(__name__)

DEFAULT_LIMIT = 20  # a dynamic loss scale that starts at 65536 may skip half a dozen before it fits
SPIKE_WINDOW = 64
SPIKE_MINIMUM = 16  # logged losses before anything is called a leap
SPIKE_DEVIATIONS = 6.0
SPIKE_FLOOR = 0.01
MAX_ROLLBACKS = 3
SHOWN_SAMPLES = 64


class BadSteps(TrainerCallback):
    """Keeps updates that are not finite from happening, and ends a training that has too many of them in a row.

    trainer: whose steps they are. --max_bad_steps 0 leaves everything as torch does it; None is DEFAULT_LIMIT.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        asked = trainer.args.max_bad_steps
        self.limit = DEFAULT_LIMIT if asked is None else asked
        self.may_wait = asked is not None
        self.in_a_row = 0
        self.since_log = 0
        self._pending: tuple[int, device.DeferredNumber] | None = None
        self._spoilt: torch.Tensor | None = None  # int64: bad steps whose updates were made, on the device

    def before_update(self, norm: torch.Tensor | float) -> None:
        """Looks at the norm of the gradients that the next update would use; may have it skipped.

        Raises UsageError if the steps before were too many bad ones.
        """
        self._settle()
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            self._after_update(norm)
            return
        if self.limit == 0 or trainer.accelerator.scaler is not None or not isinstance(norm, torch.Tensor):
            return
        optimizer = trainer.combined.optimizer if trainer.combined is not None else trainer.optimizer.optimizer
        step = trainer.state.global_step + 1
        if getattr(optimizer, "_step_supports_amp_scaling", False) and device.fused_adamw_obeys_grad_scale(
            norm.device
        ):
            optimizer.found_inf = norm.isfinite().logical_not().to(torch.float32)
            self._pending = step, device.DeferredNumber(optimizer.found_inf)
        elif norm.device.type != "cpu" and not self.may_wait:
            if self._spoilt is None:
                self._spoilt = torch.zeros((), dtype=torch.int64, device=norm.device)
            self._spoilt.add_(norm.isfinite().logical_not())
        elif math.isfinite(norm.item()):
            self._count(step, False)
        else:
            self._drop_gradients()
            self._count(step, True)

    def _after_update(self, norm: torch.Tensor | float) -> None:
        """DeepSpeed has updated by then, except where it has seen an overflow itself: bf16 and fp16 at O2."""
        skipped = self.trainer.optimizer.step_was_skipped
        step = self.trainer.state.global_step + 1
        if not (skipped or self.limit == 0 or math.isfinite(norm)):
            raise UsageError(
                f"step {step}: the gradients were not finite, and DeepSpeed has updated with them; no checkpoint holds these "
                "weights, so the same command goes on from the last one; lower --learning_rate, or use --bf16"
            )
        self._count(step, bool(skipped))

    def settle(self) -> None:
        """Counts what is still on the device. To be called where the host waits anyway, and before a save.

        Raises UsageError for too many bad steps in a row, and for one whose update was made.
        """
        self._settle()
        count = 0 if self._spoilt is None else int(self._spoilt.item())
        if count:
            last = self.trainer.state.global_step
            raise UsageError(
                f"step {last - count + 1}: the gradients were not finite, and the optimizer's kernel on this device has "
                "updated with them; no checkpoint holds these weights, so the same command goes on from the last one; with "
                f"--max_bad_steps {self.limit} such steps are skipped, for one wait of the host in each step"
            )

    def _settle(self) -> None:
        if self._pending is not None:
            (step, number), self._pending = self._pending, None
            self._count(step, number.get() != 0)

    def on_train_begin(self, args, state, control, **_):
        self._pending, self._spoilt, self.in_a_row = None, None, 0

    def on_step_end(self, args, state, control, **_):
        if self.trainer.accelerator.scaler is not None:
            skipped = self.trainer.accelerator.optimizer_step_was_skipped
            if skipped:
                self._drop_gradients()
            self._count(state.global_step, skipped)

    def _drop_gradients(self) -> None:
        # Without gradients an optimizer leaves weights and state alone.
        self.trainer.optimizer.zero_grad()
        if self.trainer.combined is not None:
            self.trainer.combined.wipe_gradients()

    def on_train_end(self, args, state, control, **_):
        self.settle()

    def _count(self, step: int, bad: bool) -> None:
        if not bad:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.since_log += 1
        if self.trainer.accelerator.scaler is None and self.trainer.args.process_index == 0:
            logger.warning("step %d: the gradients are not finite, so the weights stay as they are", step)
        if 0 < self.limit <= self.in_a_row:
            ids = sample_ids(self.trainer, step)
            raise UsageError(
                f"--max_bad_steps {self.limit}: the gradients were not finite in {self.in_a_row} steps in a row, up to step "
                f"{step}{shown(ids)}; nothing was updated in them; look at these samples, lower --learning_rate, or go on "
                "from an earlier checkpoint with --resume_from_checkpoint"
            )


def sample_ids(trainer, step: int) -> list[int] | None:
    """The numbers of the training set's samples in this step, of all ranks; None where they are not to be known.

    The order is drawn anew from the sampler's seed: a training keeps no record of it.
    """
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import SequentialSampler

    loader = trainer.callback_handler.train_dataloader
    batches = getattr(loader, "batch_sampler", None)
    ranks = getattr(batches, "num_processes", 1)
    batches = getattr(batches, "batch_sampler", batches)
    sampler = getattr(batches, "sampler", None)
    if batches is None or not isinstance(sampler, SeedableRandomSampler | SequentialSampler):
        return None
    each = trainer.args.gradient_accumulation_steps
    epoch, update = divmod(step - 1, max(1, -(-len(loader) // each)))
    if isinstance(sampler, SeedableRandomSampler):
        sampler.set_epoch(epoch)
    first = update * each * ranks
    return [number for batch in islice(batches, first, first + each * ranks) for number in batch]


def shown(ids: list[int] | None) -> str:
    if not ids:
        return ""
    more = f" and {len(ids) - SHOWN_SAMPLES} more" if len(ids) > SHOWN_SAMPLES else ""
    return f", which has the samples {' '.join(map(str, ids[:SHOWN_SAMPLES]))}{more} of the training set"


class LossSpike(BaseException):
    """Leaves the training loop, to go on from `checkpoint` behind the batches up to step `step`.

    Not an error: nothing on the way may handle it.
    """

    def __init__(self, checkpoint: str, step: int):
        super().__init__(checkpoint, step)
        self.checkpoint = checkpoint
        self.step = step


class LossSpikes:
    """Finds losses that leap.

    args: the run's LanguageModelingArguments, of which --on_loss_spike says what then happens.
    """

    def __init__(self, args):
        self.args = args
        self.rollbacks = 0
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def look(self, loss: float, first_step: int, step: int) -> None:
        """Takes the next logged loss, the mean of the steps after `first_step`.

        Raises LossSpike where it leaps and there is a checkpoint to go back to, and UsageError after MAX_ROLLBACKS.
        """
        if self.args.on_loss_spike is None or not math.isfinite(loss):
            return
        limit = self.limit()
        if loss > limit:
            if self.args.process_index == 0:
                logger.warning("step %d: the loss leaps to %g; up to %g was to be expected", step, loss, limit)
            if self.args.on_loss_spike == "rollback":
                self._roll_back(first_step, step)
        self.losses.append(loss)

    def limit(self) -> float:
        """The greatest loss that is no leap."""
        if len(self.losses) < SPIKE_MINIMUM:
            return math.inf
        median = statistics.median(self.losses)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self.losses)
        return median + SPIKE_DEVIATIONS * max(deviation, SPIKE_FLOOR * abs(median))

    def _roll_back(self, first_step: int, step: int) -> None:
        if self.rollbacks == MAX_ROLLBACKS:
            raise UsageError(
                f"--on_loss_spike rollback: the loss leaps again, at step {step}, after {self.rollbacks} rollbacks; lower "
                "--learning_rate or --max_grad_norm, or look at the data"
            )
        folder = self.args.output_dir
        found = told_by_main(lambda: checkpoint.newest(folder, output_folder.run_id(folder), until=first_step))
        chosen = None if found is None else str(found)
        if self.args.process_index == 0:
            name = "no checkpoint to go back to" if chosen is None else f"going back to {Path(chosen).name}"
            logger.warning("%s%s", name, "" if chosen is None else f"; the batches up to step {step}'s are skipped")
        if chosen is not None:
            self.rollbacks += 1
            raise LossSpike(chosen, step)
