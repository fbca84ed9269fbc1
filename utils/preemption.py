"""A training that ends on request with a complete checkpoint: on SIGTERM, on SIGINT, or when its time is over.

transformers has --enable_jit_checkpoint for this, on which nothing here is built. It knows SIGTERM alone; waits three
seconds in a Timer before it looks; each rank decides by itself, so that a signal on one of them leaves the others
waiting in a collective; it saves in the middle of a step as well, and past the hooks that save; SIGTERM during an
evaluation is seen when that is over; the exit code is 0; and the best model is loaded at the end.

Here utils/signals.py hears a signal, utils/agreement.py brings all ranks to one step without a word on the device, and
the callback below has Trainer save there by its own means, then ends the process with Stopped.
"""

import logging
import os
import signal
import time

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from utils import signals
from utils.agreement import Agreement, connect
from utils.durations import seconds_of

logger = logging.getLogger(__name__)

SAVE, TIME, RESTART = "SIGUSR1", "time", "restart"
# Before a save has been measured, this share of --max_train_time is kept for it, at most so many seconds.
UNMEASURED_SHARE, UNMEASURED_SECONDS = 0.05, 120.0
# Afterwards this many times the longest: file systems have bad days.
SAVE_MARGIN = 2.0


class EvaluationStopped(signals.Stopped):
    """All ranks leave the evaluation at this batch."""


class Preemption(TrainerCallback):
    """Stops, saves, or stops in time, at a step that all ranks agree on.

    trainer: whose training it is. --max_train_time counts from the start of the process.

    A request that comes while steps are computed is met at the end of the step; one that comes in an evaluation ends
    that at its next batch, and the evaluation is made up for when the run goes on (`evaluation_is_missing`).
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.started = signals.listener.started if signals.listener is not None else time.monotonic()
        self.time_limit = seconds_of(trainer.args.max_train_time) if trainer.args.max_train_time else None
        self.agreement: Agreement | None = None
        self.stopping: str | None = None  # the word that ends the training
        self._time_is_asked = False
        self._trainings = 0
        self._mark = 0.0  # when what is being measured began
        self._longest_save: float | None = None
        self._longest_step = 0.0
        self._step_began: float | None = None

    # ---- the life of a training ----
    def on_train_begin(self, args, state, control, **_):
        self.close()
        self._trainings += 1
        self._step_began = None
        self.agreement = Agreement(
            connect(f"preemption/{self._trainings}"), args.process_index, args.world_size, self._leave_without_them
        )
        if signals.listener is not None:
            signals.listener.on_request = self._request
            if args.save_on_signal:
                signals.listener.listen(signal.SIGUSR1)
        self.trainer.evaluate_what_was_missed()

    def on_train_end(self, args, state, control, **_):
        self.close()

    def close(self) -> None:
        """Signals end the process at once again."""
        if signals.listener is not None:
            signals.listener.on_request = None
        if self.agreement is not None:
            self.agreement.close()

    def _request(self, word: str) -> None:
        # torchrun ends the ranks of an elastic run to start them with other nodes; what launch.sh hands on, it has noted.
        if word == "SIGTERM" and os.environ.get("ELASTIC_PROCESSES") and not signals.is_noted():
            word = RESTART
        assert self.agreement is not None
        self.agreement.request(word)

    def _leave_without_them(self, word: str, ranks: list[int]) -> None:
        # From the agreement's thread. They will never come to a step's end, so there is none to save at.
        if word != SAVE:
            names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else "the store"
            number = signal.SIGTERM if word in (TIME, RESTART, "") else signal.Signals[word]
            signals.leave_at_once(
                number, f"stopped by {word or number.name}: {names} did not answer, so nothing is saved"
            )

    # ---- the points ----
    def on_step_end(self, args, state, control, **_):
        now = time.monotonic()
        if self._step_began is not None:
            self._longest_step = max(self._longest_step, now - self._step_began)
        self._ask_when_time_is_over(args, now)
        assert self.agreement is not None
        self._obey(self.agreement.point(), state, control)
        if self.stopping:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        self._mark = self._step_began = time.monotonic()

    def on_prediction_step(self, args, state, control, **_):
        if not self.trainer.is_in_train:
            return
        self._ask_when_time_is_over(args, time.monotonic())
        assert self.agreement is not None
        self._obey(self.agreement.point(), state, control)
        if self.stopping:
            raise EvaluationStopped(self._exit_code(), self._message(state, saved=None))

    def on_epoch_end(self, args, state, control, **_):
        if self.stopping:  # saved at the step's end, which was the epoch's as well
            control.should_evaluate = control.should_save = False

    def _obey(self, word: str | None, state, control) -> None:
        if word == SAVE:
            control.should_save = True
            if state.is_world_process_zero:
                logger.warning("%s at step %d: saving, then going on", word, state.global_step)
        elif word is not None:
            self.stopping = word

    def stop_if_saved(self, args, state, control) -> None:
        """Ends the training, if that is asked for: to be called when checkpoint-<step> is written."""
        if not self.stopping:
            return
        saved = self.trainer.save_now() is not None  # written by now, unless in the background or for a full disk
        # What else is under way, logs for example, is finished by those who began it.
        self.trainer.callback_handler.on_train_end(args, state, control)
        is_for_good = self.stopping != RESTART
        raise signals.Stopped(self._exit_code(), self._message(state, saved), together=True, for_good=is_for_good)

    def _exit_code(self) -> int:
        # A training that has used up its time has done what it was asked to: its exit code is 0.
        assert self.stopping is not None
        if self.stopping == TIME:
            return 0
        return signals.exit_code(signal.SIGTERM if self.stopping == RESTART else signal.Signals[self.stopping])

    def _message(self, state, saved: bool | None) -> str | None:
        """saved: None before there was anything to save."""
        if not state.is_world_process_zero:
            return None
        words = {
            TIME: f"--max_train_time {self.trainer.args.max_train_time}",
            RESTART: "the launcher, to start again,",
        }
        assert self.stopping is not None
        word = words.get(self.stopping, self.stopping)
        step = state.global_step
        told = {
            None: "nothing to save yet",
            True: f"checkpoint-{step} is complete; the same command goes on from there",
            False: "it could not be saved; the same command goes on from the checkpoint before",
        }[saved]
        return f"stopped by {word} at step {step}; {told}"

    # ---- time ----
    def on_log(self, args, state, control, **_):
        self._mark = time.monotonic()

    def on_evaluate(self, args, state, control, **_):
        self._mark = time.monotonic()

    def on_save(self, args, state, control, **_):
        now = time.monotonic()
        self._longest_save = max(self._longest_save or 0.0, now - self._mark)
        self._step_began = now

    def _ask_when_time_is_over(self, args, now: float) -> None:
        if self.time_limit is None or self._time_is_asked or args.process_index != 0:
            return
        assert self.agreement is not None
        if now + self._longest_step + self._reserve(self.time_limit) - self.started >= self.time_limit:
            self._time_is_asked = True
            self.agreement.request(TIME)

    def _reserve(self, time_limit: float) -> float:
        """Seconds kept for the last save."""
        if self._longest_save is None:
            return min(UNMEASURED_SHARE * time_limit, UNMEASURED_SECONDS)
        return SAVE_MARGIN * self._longest_save


def evaluation_is_missing(args, state) -> bool:
    """Whether the step that a run resumes from was to be evaluated, and was not: it was stopped first."""
    step = state.global_step
    if step == 0 or any("eval_loss" in entry and entry["step"] == step for entry in state.log_history):
        return False
    if args.eval_strategy == IntervalStrategy.STEPS:
        return step % state.eval_steps == 0 and step >= args.eval_delay
    if args.eval_strategy == IntervalStrategy.EPOCH:
        return state.epoch is not None and float(state.epoch).is_integer() and state.epoch >= args.eval_delay
    return False
