"""utils/metrics.py: sums that do not grow."""

import math

import pytest
import torch

from utils import metrics
from utils.metrics import RunningSums, TokenAccuracy


def test_accuracy_loss_and_perplexity_of_sums_over_batches():
    found = TokenAccuracy().compute(correct=[3, 1], targets=[4, 6], negative_log_likelihood=[8.0, 12.0])
    assert found == {"loss": 2.0, "accuracy": 0.4, "perplexity": math.exp(2.0)}


def test_nothing_to_evaluate_is_told():
    with pytest.raises(ValueError, match="no targets"):
        TokenAccuracy().compute(correct=[0], targets=[0], negative_log_likelihood=[0.0])


def test_perplexity_beyond_a_float_is_infinite():
    assert metrics.perplexity(1000.0) == math.inf


def test_running_sums_are_exact_where_float32_is_not():
    """2 ** 24 ones and more: a plain float32 sum would stand still there."""
    sums = RunningSums(2, torch.device("cpu"))
    sums.add(torch.tensor([2.0**24, 0.1]))
    for _ in range(1000):
        sums.add(torch.tensor([1.0, 0.1]))
    total, tenths = sums.tolist()
    assert total == 2**24 + 1000
    assert tenths == pytest.approx(1001 * torch.tensor(0.1).item(), abs=1e-9)
