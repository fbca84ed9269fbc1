"""How fast a run trains, and what its time goes to: in the log, in the progress bar and in the results."""

import logging
import time
from dataclasses import dataclass, field

import torch
from transformers import TrainerCallback

from utils import device, flops

logger = logging.getLogger(__name__)

MOST_MARKED_STEPS = 256  # between two logs: a run that never logs would collect marks for ever


@dataclass
class Span:
    """What was done since `start`, by this process. Times are in seconds of time.perf_counter()."""

    start: float
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    waiting: float = 0.0  # for batches
    paused: float = 0.0  # for what is no training
    marked_steps: int = 0
    optimizing: float = 0.0  # in marked_steps of the steps

    def seconds(self) -> float:
        return max(time.perf_counter() - self.start - self.paused, 1e-9)


@dataclass
class Throughput:
    """Rates over all processes, and shares of the time of a step.

    steps: that are going to be trained. processes: that train as much as this one. model_flops, peak_flops: what the model
    needs, and what a device can do at most (FLOP/s); without one of them there is no MFU.

    The clock for the results starts after a tenth of the steps, ten at the most, when kernels are compiled and caches warm.
    Evaluation and saving are left out. The device is waited for twice, at the start and at the end of the clock; the log
    comes when its loss has just been read, so that all before has been done.
    """

    steps: int
    processes: int
    device: torch.device
    model_flops: flops.ModelFlops | None = None
    peak_flops: float | None = None
    whole: Span = field(init=False)
    since_log: Span = field(init=False)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.warm_up = min(10, self.steps // 10)
        self._step_number = 0
        self._backward_done = None
        self._marks: list[tuple] = []  # of the ends of backward and step
        self.whole, self.since_log = Span(time.perf_counter()), Span(time.perf_counter())

    def count(self, samples: int, length: int) -> None:
        """Called when forward and backward of a micro-batch of this process have been launched."""
        for span in (self.whole, self.since_log):
            span.samples += samples
            span.tokens += samples * length
            if self.model_flops is not None:
                span.flops += self.model_flops(samples, length)
        if len(self._marks) < MOST_MARKED_STEPS:
            self._backward_done = device.mark(self.device)

    def step_done(self) -> None:
        """Called when all of a step has been launched: clipping, optimizer and zeroing came after its last micro-batch."""
        if self._backward_done is not None:
            self._marks.append((self._backward_done, device.mark(self.device)))
            self._backward_done = None
        self.whole.steps += 1
        self.since_log.steps += 1
        self._step_number += 1
        if self._step_number == self.warm_up:
            device.synchronize(self.device)
            self._read_marks()
            self.whole = Span(time.perf_counter())

    def pause(self, seconds: float) -> None:
        """Leaves out time that was spent on something else than training."""
        self.whole.paused += seconds
        self.since_log.paused += seconds

    def wait(self, seconds: float) -> None:
        """Adds time that was spent waiting for batches: reading, collating, and copying to the device."""
        self.whole.waiting += seconds
        self.since_log.waiting += seconds

    def log(self) -> dict[str, float]:
        """What was done since the last call. The device must have done all of it."""
        self._read_marks()
        span, self.since_log = self.since_log, Span(time.perf_counter())
        return self._rates(span, span.seconds()) | {"peak_memory_bytes": device.peak_memory(self.device)}

    def stop(self) -> None:
        device.synchronize(self.device)
        self._read_marks()
        self.seconds = self.whole.seconds()

    def metrics(self) -> dict[str, float]:
        """Of all steps after the warm-up, once stopped; with what `mfu` is a share of, in TFLOP/s for one device."""
        rates = self._rates(self.whole, self.seconds)
        if self.peak_flops is None or "mfu" not in rates:
            return rates
        return rates | {"peak_tflops": round(self.peak_flops / 1e12, 4)}

    def _read_marks(self) -> None:
        seconds = sum(device.seconds_between(start, end) for start, end in self._marks)
        for span in (self.whole, self.since_log):
            span.optimizing += seconds
            span.marked_steps += len(self._marks)
        self._marks = []

    def _rates(self, span: Span, seconds: float) -> dict[str, float]:
        rates = {
            "fps": round(span.samples * self.processes / seconds, 3),
            "tokens_per_second": round(span.tokens * self.processes / seconds, 1),
        }
        if self.model_flops is not None and self.peak_flops is not None:
            rates["mfu"] = round(span.flops / seconds / self.peak_flops, 4)
        optimizing = span.optimizing / max(span.marked_steps, 1) * span.steps
        shares = {"data_wait": span.waiting / seconds, "optimizer_share": optimizing / seconds}
        return rates | {name: round(min(share, 1.0), 4) for name, share in shares.items()}


class ThroughputClock(TrainerCallback):
    """Starts and stops the trainer's Throughput."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **_):
        model_flops = flops.count_model_flops(self.trainer.model)
        peak, is_measured = device.peak_flops(args.device, args.precision.dtype)
        if model_flops is not None:
            logger.info(
                "mfu is a share of %.4g TFLOP/s, %s of one %s",
                peak / 1e12,
                "the measured peak" if is_measured else "the stated peak",
                device.describe(args.device),
            )
        steps = state.max_steps - state.global_step
        if steps <= 0:
            logger.warning(
                "nothing is left to train: step %d is reached, and the run has %d", state.global_step, state.max_steps
            )
        if not args.dry_run:
            samples = self.trainer.get_total_train_batch_size(args)
            logger.info(
                "training from step %d to %d, with %d samples a step", state.global_step, state.max_steps, samples
            )
        self.trainer.throughput = Throughput(steps, args.world_size, args.device, model_flops, peak)

    def on_step_end(self, args, state, control, **_):
        self.trainer.throughput.step_done()

    def on_train_end(self, args, state, control, **_):
        self.trainer.throughput.stop()
