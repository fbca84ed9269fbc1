"""utils/preemption.py in this process: requests at exact places of a training, without the signals that bring them."""

import json
import time

import pytest
import torch
from test_trainer import logged, trainer_for, weights
from transformers import TrainerCallback

from utils import durations, signals
from utils.preemption import SAVE


class At(TrainerCallback):
    """Calls `act(trainer)` at the n-th event of a name, and waits until the request is known to the agreement."""

    def __init__(self, event: str, count: int, word: str):
        self.event, self.count, self.word = event, count, word
        self.trainer = None
        setattr(self, f"on_{event}", self.happened)

    def happened(self, *_, **__):
        self.count -= 1
        if self.count == 0:
            agreement = self.trainer.preemption.agreement
            agreement.request(self.word)
            end = time.monotonic() + 10
            while agreement._due is None and time.monotonic() < end:
                time.sleep(0.01)


def asked_at(folder, event: str, count: int, word: str = "SIGTERM", **options):
    callback = At(event, count, word)
    trainer = trainer_for(folder, callbacks=[callback], **options)
    callback.trainer = trainer
    return trainer


def stop(trainer) -> signals.Stopped:
    with pytest.raises(signals.Stopped) as stopped:
        trainer.train()
    return stopped.value


def test_a_stop_within_a_step_saves_at_its_end(tmp_path) -> None:
    whole = trainer_for(tmp_path / "whole")
    whole.train()
    stopped = stop(asked_at(tmp_path / "run", "step_begin", 3))
    assert (stopped.code, stopped.together) == (143, True)
    assert stopped.message == (
        "stopped by SIGTERM at step 3; checkpoint-3 is complete; the same command goes on from there"
    )
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = trainer_for(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_sigint_has_its_own_exit_code(tmp_path) -> None:
    assert stop(asked_at(tmp_path, "step_begin", 1, "SIGINT")).code == 130


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_stop_in_an_evaluation_leaves_it_and_it_is_made_up_for(tmp_path, strategy) -> None:
    options = {"eval_strategy": strategy, "load_best_model_at_end": True, "save_strategy": strategy, "max_steps": 14}
    if strategy == "steps":
        options |= {"eval_steps": 4, "save_steps": 4}
    # Stock Trainer keeps the best checkpoint as a path, so the whole run is made in a folder of its own.
    whole = trainer_for(tmp_path / "whole", **options)
    whole.train()
    trainer = asked_at(tmp_path / "run", "prediction_step", 2, per_device_eval_batch_size=4, **options)
    stopped = stop(trainer)
    step = 4 if strategy == "steps" else 12
    assert f"at step {step}; checkpoint-{step} is complete" in stopped.message
    assert logged(trainer, "eval_loss") == []
    resumed = trainer_for(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert logged(resumed, "eval_loss") == logged(whole, "eval_loss")
    assert resumed.state.best_global_step == whole.state.best_global_step
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_a_stop_in_a_save_finishes_that_and_writes_the_next(tmp_path) -> None:
    stopped = stop(asked_at(tmp_path, "save", 1, save_strategy="steps", save_steps=2))
    assert "at step 3; checkpoint-3 is complete" in stopped.message
    for step in (2, 3):
        assert json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())["global_step"] == step


def test_the_checkpoint_of_a_stop_is_not_removed_for_the_best_one(tmp_path) -> None:
    """At the end of a training Trainer keeps only the best one with --save_total_limit 1: this is not the end."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"load_best_model_at_end": True, "save_total_limit": 1, "learning_rate": 1.0}  # it only gets worse
    stop(asked_at(tmp_path, "step_begin", 5, **options))
    assert {folder.name for folder in tmp_path.glob("checkpoint-*")} >= {"checkpoint-5"}


def test_a_stop_at_the_last_step_goes_on_with_nothing_left_to_train(tmp_path) -> None:
    whole = trainer_for(tmp_path / "whole")
    whole.train()
    stopped = stop(asked_at(tmp_path / "run", "step_begin", 8))
    assert "at step 8" in stopped.message
    resumed = trainer_for(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    assert resumed.state.global_step == 8
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_save_on_signal_saves_and_goes_on(tmp_path) -> None:
    trainer = asked_at(tmp_path, "step_begin", 3, SAVE)
    trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert trainer.state.global_step == 8


def test_training_ends_before_its_time_is_over(tmp_path) -> None:
    trainer = trainer_for(tmp_path, max_steps=100_000, max_train_time="3s", save_strategy="steps", save_steps=10_000)
    stopped = stop(trainer)
    step = trainer.state.global_step
    assert stopped.code == 0 and f"stopped by --max_train_time 3s at step {step}; checkpoint-{step}" in stopped.message
    assert (tmp_path / f"checkpoint-{step}" / "trainer_state.json").exists()


def test_the_measured_save_is_what_is_kept_for_the_last_one(tmp_path) -> None:
    class SlowDisk(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_save = state.global_step == 2

    trainer = trainer_for(tmp_path, callbacks=[SlowDisk()], max_steps=100_000, max_train_time="5s")
    save = trainer._save_optimizer_and_scheduler
    trainer._save_optimizer_and_scheduler = lambda *folder: (time.sleep(1), save(*folder))
    stop(trainer)
    assert trainer.preemption._reserve(5.0) >= 2 * 1.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3600", 3600), ("1.5", 1.5), ("90s", 90), ("55m", 3300), ("11h30m", 41400), ("2d", 172800), ("1d1h1m1s", 90061)],
)
def test_times(text, seconds) -> None:
    assert durations.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0m", "-5", "1:30", "30m11h", "5 m", "h", "inf", "nan"])
def test_what_is_no_time(text) -> None:
    with pytest.raises(ValueError, match="give seconds, such as 3600, or a time such as 55m"):
        durations.seconds_of(text)
