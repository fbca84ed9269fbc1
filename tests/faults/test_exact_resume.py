"""Training that is gone on with from a checkpoint is, bit for bit, the training that was never stopped."""

import json
import shutil
from types import SimpleNamespace

import pytest
import resume
import torch
from commands import run_distributed
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerCallback

from utils.sample_order import EpochBegins

ON_TWO_RANKS = [
    *("O0", "O2, combined, accumulating, workers", "masked", "masked, accumulating, workers", "by length"),
    *("permuted, O2, accumulating, workers", "best model"),
]


@pytest.fixture
def folder():
    made = resume.memory_folder()
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("case", resume.CASES)
def test_every_step_is_one_to_resume_from(case, folder):
    """Weights, masters, moments, schedule, scale, random numbers, logged means and metrics."""
    found = resume.compare(folder, resume.CASES[case])
    assert len(found) >= 3 and found == {step: [] for step in found}


@pytest.fixture(scope="module")
def two_ranks() -> dict:
    done = run_distributed("tests/faults/resume.py", *ON_TWO_RANKS, timeout=600)
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("case", ON_TWO_RANKS)
def test_the_same_on_two_ranks(case, two_ranks):
    assert len(two_ranks[case]) >= 3 and two_ranks[case] == {step: [] for step in two_ranks[case]}


class Stop(TrainerCallback):
    """Ends the run inside the accumulation of an update: after its first micro-batch."""

    def __init__(self, after_step: int):
        self.after_step = after_step

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == self.after_step:
            raise resume.Stopped


@pytest.mark.parametrize("combine", [False, True])
def test_a_stop_inside_an_accumulation_costs_only_that_update(combine, folder):
    options = {**resume.O2, "use_combine_grad": combine, "gradient_accumulation_steps": 3}
    whole = resume.train(folder / "whole", **options)
    trainer = resume.trainer_in(folder / "stopped", callbacks=[Stop(4)], **options)
    with pytest.raises(resume.Stopped):
        trainer.train()
    assert trainer.last_saved.name == "checkpoint-4"
    assert resume.differences(whole, resume.train(folder / "stopped", trainer.last_saved, **options)) == []


def test_scale_and_growth_counter_are_resumed(folder):
    """The scale falls in the first steps, since the first gradients overflow, and grows again after each third step."""

    def growing(trainer):
        trainer.accelerator.scaler.set_growth_interval(3)
        return trainer

    options = {**resume.O2, "use_combine_grad": True, "learning_rate": 1e-4}
    trainer = growing(resume.trainer_in(folder / "whole", **options))
    trainer.accelerator.scaler._init_scale = 2.0**24
    whole = resume.outcome(trainer, trainer.train().metrics)
    scales = [entry["loss_scale"] for entry in trainer.state.log_history if "loss_scale" in entry]
    assert trainer.accelerator.scaler.skipped_steps > 0 and len(set(scales)) > 1
    again = growing(resume.trainer_in(folder / "resumed", **options))
    metrics = again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-8")).metrics
    assert resume.differences(whole, resume.outcome(again, metrics)) == []


def test_a_resumed_run_reports_the_time_of_both_parts(folder):
    whole = resume.trainer_in(folder / "whole", num_train_epochs=1)
    whole.train()
    state = json.loads((folder / "whole" / "checkpoint-5" / "progress_0.json").read_text())
    metrics = resume.trainer_in(folder / "2", num_train_epochs=1).train(str(folder / "whole" / "checkpoint-5")).metrics
    assert metrics["train_runtime"] > state["seconds"] > 0
    assert metrics["train_steps_per_second"] == pytest.approx(7 / metrics["train_runtime"], rel=0.01)


def test_a_moved_output_folder_keeps_its_best_model(folder):
    options = resume.CASES["best model"]
    whole = resume.train(folder / "whole", **options)
    shutil.copytree(folder / "whole", folder / "moved")
    shutil.rmtree(folder / "whole")
    best = json.loads((folder / "moved" / "checkpoint-14" / "trainer_state.json").read_text())["best_global_step"]
    assert best < 13, "the case is not the one that is meant: a better one was found after the move"
    resumed = resume.train(folder / "moved", folder / "moved" / "checkpoint-13", **options)
    assert resume.differences(whole, resumed) == []


# ---- the order of the data ----
class Counting:
    """Notes the epoch it was told."""

    epoch = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Numbers(Counting, torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return index


class Order(Counting, torch.utils.data.SequentialSampler):
    pass


def test_dataset_and_sampler_both_learn_of_the_epoch():
    """accelerate tells one of them, so that a resumed BERT was shown the masks of the first epoch."""
    numbers = Numbers()
    order = Order(numbers)

    class Wrapped(BatchSampler):
        def __init__(self, batch_sampler):
            self.batch_sampler = batch_sampler

        def __iter__(self):
            return iter(self.batch_sampler)

    loader = DataLoader(numbers, batch_sampler=Wrapped(Wrapped(BatchSampler(order, 2, False))))
    state = SimpleNamespace(epoch=3.4)
    EpochBegins().on_epoch_begin(None, state, None, train_dataloader=loader)
    assert (numbers.epoch, order.epoch) == (3, 3)
