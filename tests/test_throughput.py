"""utils/throughput.py: rates, shares and MFU, what they leave out, and that they are in log and results."""

import pytest
import torch
from test_trainer import logged, trainer_for
from transformers import TrainerCallback

from utils import throughput
from utils.flops import ModelFlops, count_model_flops
from utils.throughput import Throughput


class Clock:
    """Seconds that pass only when they are told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput.time, "perf_counter", clock)  # the module's own, so device's marks as well
    return clock


def train(measured: Throughput, clock: Clock, steps: int, micro_batches: int = 1) -> None:
    """Steps of a second: half of it waiting, a tenth after backward."""
    for _ in range(steps):
        measured.wait(0.5)
        clock.now += 0.9
        for _ in range(micro_batches):
            measured.count(samples=4, length=16)
        clock.now += 0.1
        measured.step_done()


def test_the_warm_up_and_what_is_not_training_are_left_out(clock):
    measured = Throughput(steps=20, processes=2, device=torch.device("cpu"))
    clock.now += 50.0
    measured.wait(40.0)
    train(measured, clock, 12)
    clock.now += 30.0  # an evaluation
    measured.pause(30.0)
    train(measured, clock, 8)
    measured.stop()
    assert measured.metrics() == {
        "fps": 8.0,
        "tokens_per_second": 128.0,
        "data_wait": 0.5,
        "optimizer_share": 0.1,
    }


def test_each_log_is_told_of_the_steps_since_the_last_one(clock):
    measured = Throughput(steps=100, processes=1, device=torch.device("cpu"))
    train(measured, clock, 3)
    first = measured.log()
    clock.now += 10.0
    measured.pause(10.0)
    measured.wait(1.0)
    clock.now += 1.0
    train(measured, clock, 1)
    second = measured.log()
    assert [first["fps"], first["data_wait"], first["optimizer_share"]] == [4.0, 0.5, 0.1]
    assert [second["fps"], second["data_wait"], second["optimizer_share"]] == [2.0, 0.75, 0.05]
    assert second["peak_memory_bytes"] > 10e6


def test_mfu_is_the_models_flops_of_what_the_device_can_do(clock):
    """20 sequences of 16 tokens in 5 s, 10 * 16 + 2 * 16 * 16 operations each, of 10,000 a second: on each process."""
    measured = Throughput(
        steps=5, processes=2, device=torch.device("cpu"), model_flops=ModelFlops(10.0, 2.0), peak_flops=10_000.0
    )
    train(measured, clock, 5)
    measured.stop()
    found = measured.metrics()
    assert found["mfu"] == pytest.approx(20 * (160 + 512) / 5 / 10_000, rel=1e-9)
    assert found["peak_tflops"] == 0.0


def test_only_what_follows_the_last_micro_batch_is_the_optimizers(clock):
    measured = Throughput(steps=4, processes=1, device=torch.device("cpu"))
    train(measured, clock, 4, micro_batches=3)
    assert measured.log()["optimizer_share"] == 0.1


def test_a_run_that_never_logs_keeps_no_more_marks(clock, monkeypatch):
    monkeypatch.setattr(throughput, "MOST_MARKED_STEPS", 8)
    measured = Throughput(steps=9, processes=1, device=torch.device("cpu"))
    train(measured, clock, 50)
    assert len(measured._marks) == 8
    measured.stop()
    assert measured.metrics()["optimizer_share"] == 0.1  # of all steps, told by eight


def test_a_training_run_measures_itself(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=20, eval_strategy="steps", eval_steps=5)
    trainer.train()
    found = trainer.throughput.metrics()
    assert trainer.throughput.whole.samples == 18 * 4
    assert trainer.throughput.whole.flops == count_model_flops(trainer.model)(18 * 4, 16)
    assert found["tokens_per_second"] == pytest.approx(16 * found["fps"], rel=1e-2)
    assert trainer.throughput.whole.paused > 0
    for name in ("fps", "tokens_per_second", "mfu", "data_wait", "optimizer_share", "peak_memory_bytes"):
        assert len(logged(trainer, name)) == 20 and all(value > 0 for value in logged(trainer, name)), name
        assert name in found or name == "peak_memory_bytes"
    assert 0 < found["optimizer_share"] < 1 and 0 < found["mfu"] < 1 and 0 < found["data_wait"] < 1


class SlowOptimizer(TrainerCallback):
    """Sleeps between backward and the update."""

    def on_pre_optimizer_step(self, *_, **__):
        import time

        time.sleep(0.2)


def test_clipping_and_update_are_the_optimizers_share(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=3, callbacks=[SlowOptimizer()], gradient_accumulation_steps=2)
    trainer.train()
    measured = trainer.throughput.whole
    assert measured.marked_steps == 3 and 0.6 < measured.optimizing < trainer.throughput.seconds
