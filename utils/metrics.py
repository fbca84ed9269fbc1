"""Accuracy and perplexity, in memory that does not grow with what is measured."""

import math
from collections.abc import Callable

import datasets
import evaluate
import torch


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
