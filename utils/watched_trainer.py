"""A Trainer that watches its training: speed, bad numbers, lost ranks, and requests to stop.

What is watched for lives in files of its own, each a callback or a leaf; here is where Trainer lets them in.
"""

import logging
import time

from transformers import ProgressCallback, TrainerCallback

from utils import sharding
from utils.bad_numbers import BadSteps, LossSpike, LossSpikes
from utils.checkpointed_trainer import CheckpointedTrainer
from utils.errors import one_line
from utils.heartbeat import EXIT_CODE, Heartbeats
from utils.preemption import EvaluationStopped, Preemption, evaluation_is_missing
from utils.progress_bar import ProgressBar
from utils.signals import Stopped
from utils.throughput import Throughput, ThroughputClock

logger = logging.getLogger(__name__)


class SkippedSteps(TrainerCallback):
    """Counts the steps that were skipped because a gradient overflowed, and tells of each."""

    def on_step_end(self, args, state, control, optimizer=None, **_):
        if optimizer.scaler is None or not optimizer.step_was_skipped:  # DeepSpeed tells of its own
            return
        optimizer.scaler.skipped_steps += 1
        logger.warning(
            "step %d: a gradient overflowed, so weights and learning rate stay as they are; the loss scale is now %g",
            state.global_step,
            optimizer.scaler.get_scale(),
        )


class WatchedTrainer(CheckpointedTrainer):
    """Trainer for LanguageModelingArguments; see the module."""

    throughput: Throughput  # by ThroughputClock, when training begins

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        # transformers would read each loss on the host, to put a mean in the place of one that is not finite.
        self.args.logging_nan_inf_filter = False
        self.add_callback(SkippedSteps())
        self.bad_steps = BadSteps(self)
        self.add_callback(self.bad_steps)
        self.loss_spikes = LossSpikes(self.args)
        self._skips_to: int | None = None  # after a rollback: the last step whose batches are skipped
        self._skipped_steps = 0
        self._logged_before = 0
        self.add_callback(ThroughputClock(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressBar())
        self.heartbeats = Heartbeats()
        self.add_callback(self.heartbeats)
        self.preemption = Preemption(self)
        self.add_callback(self.preemption)

    def train(self, resume_from_checkpoint=None, **named):
        while True:
            try:
                return self._train_until_the_loss_leaps(resume_from_checkpoint, **named)
            except LossSpike as spike:
                resume_from_checkpoint, self._skips_to = spike.checkpoint, spike.step

    def _train_until_the_loss_leaps(self, resume_from_checkpoint, **named):
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **named)
        except RuntimeError as error:
            lost = self.heartbeats.explain()
            if lost is None or logger.isEnabledFor(logging.DEBUG):
                raise
            logger.error("%s; so this rank ends too (%s)", lost, one_line(error))
            raise Stopped(EXIT_CODE, None) from error

    # ---- after a rollback ----
    def _init_training_state(self, max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial):
        place = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        if self._skips_to is None:
            return place
        # A skipped step counts as one that updated nothing: data, schedule and the run's length stay what they were.
        self._skipped_steps = self._skips_to - self.state.global_step
        self.state.global_step, self._skips_to = self._skips_to, None
        epoch, steps = divmod(self.state.global_step, steps_per_epoch)
        return epoch, steps * self.args.gradient_accumulation_steps

    def _prepare_for_training(self, *arguments, **named):
        prepared = super()._prepare_for_training(*arguments, **named)
        while self._skipped_steps > 0:
            self.lr_scheduler.step()
            self._skipped_steps -= 1
        return prepared

    # ---- steps ----
    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = sharding.whole(super()._get_grad_norm(model, grad_norm=grad_norm))
        self.bad_steps.before_update(grad_norm)
        return grad_norm

    def log(self, logs, start_time=None) -> None:
        if "loss" in logs:
            self.bad_steps.settle()
            if self.bad_steps.since_log:
                logs["bad_steps"], self.bad_steps.since_log = self.bad_steps.since_log, 0
            logs |= self.throughput.log()
        if "loss" in logs and (self.args.use_combine_grad or self.args.precision.level != "O0"):
            logs["loss_scale"], logs["skipped_steps"] = self._scaling()
        super().log(logs, start_time)
        if "loss" in logs:
            if self.args.on_loss_spike == "rollback":
                self.finish_saves()  # so that the newest can be gone back to
            self.loss_spikes.look(logs["loss"], self._logged_before, self.state.global_step)

    def _scaling(self) -> tuple[float, int]:
        """The loss scale, and how many steps were skipped for an overflow."""
        if self.deepspeed is not None:
            return getattr(self.deepspeed.optimizer, "loss_scale", 1.0), self.deepspeed.skipped_steps
        scaler = self.accelerator.scaler
        return (scaler.get_scale(), scaler.skipped_steps) if scaler is not None else (1.0, 0)

    def get_batch_samples(self, *arguments, **named):
        if self.state.global_step >= self.state.max_steps:  # stopped after its last step: Trainer would do one more
            self.control.should_training_stop = True
            return [], None
        self.heartbeats.at(self.state, "waiting for a batch")
        start = time.perf_counter()
        batches = super().get_batch_samples(*arguments, **named)
        self.throughput.wait(time.perf_counter() - start)
        return batches

    def training_step(self, model, inputs, num_items_in_batch=None):
        samples, length = inputs["input_ids"].shape
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.throughput.count(samples, length)
        return loss

    def _maybe_log_save_evaluate(self, *arguments, **named):
        busy = self.control.should_evaluate or self.control.should_save
        self._logged_before = self._globalstep_last_logged
        if self.control.should_save:
            self.bad_steps.settle()
        start = time.perf_counter()
        try:
            super()._maybe_log_save_evaluate(*arguments, **named)
        except EvaluationStopped:
            self.control.should_evaluate, self.control.should_save = False, True
            super()._maybe_log_save_evaluate(*arguments, **named)
        self.preemption.stop_if_saved(self.args, self.state, self.control)
        if busy:
            self.throughput.pause(time.perf_counter() - start)

    def evaluate_what_was_missed(self) -> None:
        """Evaluates the step that training goes on from, if it was stopped before it could be evaluated."""
        if evaluation_is_missing(self.args, self.state):
            self._determine_best_metric(self._evaluate(None, None), None)
