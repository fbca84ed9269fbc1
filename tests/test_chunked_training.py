"""The trainer with losses in chunks (utils/chunked_head.py), against the same trainer with whole logits."""

import pytest
import tiny
import torch
from test_trainer import LEVELS, logged, trainer_for, weights
from transformers import Trainer

from utils import chunked_loss
from utils.objectives import causal
from utils.trainer import LanguageModelingTrainer


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(chunked_loss.CHUNK_BYTES, "cpu", 4 * tiny.VOCABULARY * 16)


class InChunks(LanguageModelingTrainer):
    """Makes its model's head give sums."""

    def __init__(self, model, args, **named):
        assert causal.predict_in_chunks(model, args.label_smoothing_factor)
        super().__init__(model, args, head_gives_sums=True, **named)


def both(folder, **options) -> tuple[Trainer, Trainer]:
    """(in chunks, whole logits), after training and evaluation."""
    trainers = []
    for kind in (InChunks, LanguageModelingTrainer):
        trainer = trainer_for(folder / kind.__name__, kind=kind, **options)
        trainer.train()
        trainer.measured = trainer.evaluate()
        trainers.append(trainer)
    return tuple(trainers)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True},
        {"use_combine_grad": True, "max_grad_norm": 0.1},
    ],
    ids=lambda options: next(iter(options), "defaults"),
)
def test_losses_norms_and_evaluation_are_those_of_whole_logits(tmp_path, options):
    chunks, whole = both(tmp_path, **options)
    assert logged(chunks, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)
    assert logged(chunks, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-5)
    torch.testing.assert_close(weights(chunks.model), weights(whole.model), rtol=0, atol=1e-4)
    assert chunks.measured["eval_loss"] == pytest.approx(whole.measured["eval_loss"], rel=1e-6)
    assert chunks.measured["eval_accuracy"] == pytest.approx(whole.measured["eval_accuracy"], abs=2e-3)


@pytest.mark.parametrize("level", ["O1", "O2", "O2-bf16", "O3-bf16"])
@pytest.mark.parametrize("combine", [True, False])
def test_half_precision_with_a_loss_scale(tmp_path, level, combine):
    options = {"use_combine_grad": combine, "loss_scale": "1024", "learning_rate": 1e-3, **LEVELS[level]}
    chunks, whole = both(tmp_path, **options)
    tolerance = 1e-3 if "bf16" not in level else 1e-2
    assert logged(chunks, "loss") == pytest.approx(logged(whole, "loss"), rel=tolerance)
    assert logged(chunks, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=5 * tolerance)
    assert logged(chunks, "skipped_steps")[-1] == 0
    assert chunks.measured["eval_loss"] == pytest.approx(whole.measured["eval_loss"], rel=tolerance)


def test_combined_gradients_change_nothing_without_clipping(tmp_path):
    found = [
        trainer_for(tmp_path / str(combine), kind=InChunks, use_combine_grad=combine, max_grad_norm=0.0)
        for combine in (False, True)
    ]
    for trainer in found:
        trainer.train()
    assert logged(found[0], "loss") == logged(found[1], "loss")
    assert torch.equal(weights(found[0].model), weights(found[1].model))


def test_an_overflowed_step_is_skipped(tmp_path):
    trainer = trainer_for(tmp_path, kind=InChunks, fp16=True, fp16_opt_level="O2", loss_scale="1e30", max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    assert logged(trainer, "skipped_steps") == [1, 2]
    assert torch.equal(weights(trainer.model).half(), before.half())
