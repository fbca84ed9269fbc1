"""Accuracy, perplexity and throughput, in memory that does not grow with what is measured."""

import math
import time
from collections.abc import Callable

import datasets
import evaluate
import torch

from utils import device


class TokenAccuracy(evaluate.Metric):
    """Token accuracy, mean negative log-likelihood and perplexity from sums over batches.

    Fed with sums (correct, targets, negative log-likelihood in nats) instead of predictions, it holds three numbers a
    row, however large the evaluation set. It is defined here, not on the hub, and loads with no network.
    """

    def __init__(self):
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Token accuracy and perplexity from per-batch sums.",
            citation="",
            inputs_description="correct, targets: counts of tokens; negative_log_likelihood: nats, summed over targets",
            features=datasets.Features(
                {
                    "correct": datasets.Value("float64"),
                    "targets": datasets.Value("float64"),
                    "negative_log_likelihood": datasets.Value("float64"),
                }
            ),
        )

    def _compute(self, correct, targets, negative_log_likelihood) -> dict[str, float]:
        count = sum(targets)
        if count == 0:
            raise ValueError("no targets to evaluate: every label is ignored")
        loss = sum(negative_log_likelihood) / count
        return {"loss": loss, "accuracy": sum(correct) / count, "perplexity": perplexity(loss)}


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class RunningSums:
    """Sums of small vectors, kept on the device in float32 to about 48 bits (Kahan's compensated summation).

    float64 would do on a CPU; an NPU computes it on its host.
    """

    def __init__(self, length: int, on: torch.device):
        self.total = torch.zeros(length, device=on)
        self.lost = torch.zeros(length, device=on)

    def add(self, values: torch.Tensor) -> None:
        """values: float32 of shape (length,)."""
        corrected = values - self.lost
        total = self.total + corrected
        self.lost = (total - self.total) - corrected
        self.total = total

    def tolist(self, gather: Callable[[torch.Tensor], torch.Tensor] | None = None) -> list[float]:
        """gather: brings the rows of all ranks together, where each has summed up its own."""
        rows = torch.stack([self.total, self.lost])
        rows = (gather(rows) if gather is not None else rows).cpu().double()
        return (rows[0::2] - rows[1::2]).sum(dim=0).tolist()


class Throughput:
    """Samples and tokens per second over all processes, and the share of the time that training waits for data.

    Warm-up steps, evaluation and saving are left out.

    The clock starts after a tenth of the steps, ten at the most, when kernels are compiled and caches warm. The device
    is waited for twice, at the start and at the end of the clock.
    """

    def __init__(self, steps: int, processes: int, on: torch.device):
        self.warm_up = min(10, steps // 10)
        self.processes = processes
        self.device = on
        self.steps = self.samples = self.tokens = 0
        self.paused = self.waiting = 0.0
        self.start = self.logged = time.perf_counter()
        self.waiting_since_log = 0.0
        self.seconds = 0.0

    def count(self, samples: int, tokens: int) -> None:
        """Called with each micro-batch of this process."""
        self.samples += samples
        self.tokens += tokens

    def step_done(self) -> None:
        self.steps += 1
        if self.steps == self.warm_up:
            device.synchronize(self.device)
            self.samples = self.tokens = 0
            self.paused = self.waiting = 0.0
            self.start = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leaves out time that was spent on something else than training."""
        self.paused += seconds
        self.logged += seconds

    def wait(self, seconds: float) -> None:
        """Adds time that was spent waiting for batches: reading, collating, and copying to the device."""
        self.waiting += seconds
        self.waiting_since_log += seconds

    def data_wait_since_log(self) -> float:
        """The share of the time since the last call, from 0 to 1, that was spent waiting for batches."""
        now = time.perf_counter()
        share = self.waiting_since_log / max(now - self.logged, 1e-9)
        self.logged, self.waiting_since_log = now, 0.0
        return min(share, 1.0)

    def stop(self) -> None:
        device.synchronize(self.device)
        self.seconds = max(time.perf_counter() - self.start - self.paused, 1e-9)

    def metrics(self) -> dict[str, float]:
        return {
            "fps": round(self.samples * self.processes / self.seconds, 3),
            "tokens_per_second": round(self.tokens * self.processes / self.seconds, 1),
            "data_wait": round(min(self.waiting / self.seconds, 1.0), 4),
        }
