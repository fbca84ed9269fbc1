"""utils/metrics.py: sums that do not grow, and what throughput leaves out."""

import math

import pytest
import torch

from utils import metrics
from utils.metrics import RunningSums, Throughput, TokenAccuracy


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


class Clock:
    """Seconds that pass only when they are told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", clock)
    return clock


def test_throughput_leaves_out_the_warm_up_and_what_is_not_training(clock):
    throughput = Throughput(steps=20, processes=2, on=torch.device("cpu"))
    for step in range(20):
        clock.now += 9.0 if step < 2 else 1.0  # two steps of warm-up, then half of each is spent waiting
        throughput.wait(8.0 if step < 2 else 0.5)
        throughput.count(samples=4, tokens=64)
        throughput.step_done()
        if step == 9:
            clock.now += 30.0  # an evaluation
            throughput.pause(30.0)
    throughput.stop()
    assert throughput.metrics() == {"fps": 8.0, "tokens_per_second": 128.0, "data_wait": 0.5}


def test_the_share_of_waiting_is_counted_anew_after_each_log(clock):
    throughput = Throughput(steps=100, processes=1, on=torch.device("cpu"))
    clock.now += 10.0
    throughput.wait(1.0)
    assert throughput.data_wait_since_log() == pytest.approx(0.1)
    clock.now += 14.0
    throughput.pause(10.0)
    throughput.wait(3.0)
    assert throughput.data_wait_since_log() == pytest.approx(0.75)
