"""utils/objectives/masked.py: the law of masking, and the head on masked positions only."""

import dataclasses

import families
import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from utils.objectives import dynamic_masking, masked, predicted_rows
from utils.packing import Blocks, Lines
from utils.trainer import LanguageModelingTrainer
from utils.training_arguments import LanguageModelingArguments

MASK, PAD, SPECIAL = 4, 0, 5  # ids below SPECIAL are special tokens


def law(probability: float = 0.15, starts_word: np.ndarray | None = None) -> masked.MaskingLaw:
    return masked.MaskingLaw(
        probability, MASK, families.VOCABULARY, np.arange(families.VOCABULARY) < SPECIAL, starts_word
    )


def text(count: int = 16, length: int = 32, seed: int = 0) -> Blocks:
    ids = np.random.default_rng(seed).integers(SPECIAL, families.VOCABULARY, (count, length))
    ids[:, 0], ids[:, -1] = 2, 3
    return Blocks(ids.astype(np.int32))


def batch(full_head: bool, samples=None, **options) -> dict[str, torch.Tensor]:
    samples = samples or dynamic_masking.DrawnSamples(text(4), law(), seed=1)
    return masked.MaskedCollator(law(), PAD, full_head=full_head, **options)([samples[i] for i in range(4)])


def mean_loss(model, inputs: dict) -> torch.Tensor:
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    return predicted_rows.loss_sum(model(**inputs).logits, labels) / (labels != -100).sum()


# ---- the head ----
@pytest.mark.parametrize("family", families.MASKED)
def test_masked_positions_alone_give_the_same_loss_and_gradients(family):
    full, sparse = families.make(family), families.make(family)
    assert masked.predict_only_masked(sparse)
    losses = [mean_loss(full, batch(True)), mean_loss(sparse, batch(False))]
    stock = families.make(family)(**batch(True)).loss
    assert losses[0].item() == pytest.approx(stock.item(), rel=1e-6)
    assert losses[1].item() == pytest.approx(stock.item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(full.named_parameters(), sparse.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6), name


@pytest.mark.parametrize("family", families.MASKED)
def test_the_head_computes_fewer_rows_of_a_fixed_number(family):
    model = families.make(family)
    masked.predict_only_masked(model)
    samples = dynamic_masking.DrawnSamples(text(64), law(), seed=1)
    collate = masked.MaskedCollator(law(), PAD)
    shapes = set()
    for start in range(0, 64, 4):
        inputs = collate([samples[i] for i in range(start, start + 4)])
        labels = inputs.pop("labels")
        shapes.add(model(**inputs).logits.shape)
        assert labels.shape[1] < 32
    count, chunk = masked.row_numbers(32, law())
    assert shapes <= {(4, count + k * chunk, families.VOCABULARY) for k in range(3)}


def test_a_model_without_a_known_head_keeps_its_full_one():
    import tiny

    assert not masked.predict_only_masked(tiny.gpt2())


# ---- no target is dropped ----
@pytest.mark.parametrize("rows_and_chunk", [(1, 1), (3, 2), (8, 8), (40, 8)])
def test_a_batch_beyond_the_capacity_goes_on_in_further_chunks(rows_and_chunk):
    labels = np.full((3, 20), -100)
    labels[0, [1, 5, 19]] = [7, 8, 9]
    labels[1] = np.arange(100, 120)
    positions, gathered = masked.gather_predicted(labels, *rows_and_chunk)
    count, chunk = rows_and_chunk
    assert positions.shape == gathered.shape
    assert positions.shape[1] >= 20 and (positions.shape[1] - count) % chunk == 0
    for row in range(3):
        kept = gathered[row] != -100
        assert np.array_equal(labels[row][positions[row][kept]], gathered[row][kept])
        assert kept.sum() == (labels[row] != -100).sum()


def test_an_overflowing_batch_has_the_loss_of_the_full_head(monkeypatch):
    monkeypatch.setattr(masked, "row_numbers", lambda length, law: (1, 2))
    full, sparse = families.make("bert"), families.make("bert")
    masked.predict_only_masked(sparse)
    inputs = batch(False)
    assert inputs["labels"].shape[1] > 1
    assert mean_loss(sparse, inputs).item() == pytest.approx(mean_loss(full, batch(True)).item(), rel=1e-6)


# ---- the law ----
def test_the_law_is_transformers():
    """Shares of predicted, hidden, random and kept tokens, within four standard errors of BERT's."""
    ids = text(1, 200_000).ids[0]
    seen, labels = law().apply(ids, np.random.default_rng(0)).values()
    words = ids >= SPECIAL
    predicted = labels != -100
    assert not predicted[~words].any()
    assert np.array_equal(labels[predicted], ids[predicted])
    assert np.array_equal(seen[~predicted], ids[~predicted])
    share = predicted[words].mean()
    assert abs(share - 0.15) < 4 * np.sqrt(0.15 * 0.85 / words.sum())
    count = predicted.sum()
    hidden = (seen[predicted] == MASK).mean()
    kept = (seen[predicted] == ids[predicted]).mean()
    vocabulary = families.VOCABULARY
    for found, expected in ((hidden, 0.8 + 0.1 / vocabulary), (kept, 0.1 + 0.1 / vocabulary)):
        assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / count)


def test_whole_words_are_predicted_or_not():
    starts = np.arange(families.VOCABULARY) % 3 == 0
    ids = text(1, 60_000).ids[0]
    _, labels = law(0.15, starts).apply(ids, np.random.default_rng(0)).values()
    words = np.cumsum(starts[ids])
    predicted = labels != -100
    for word in np.unique(words)[:2000]:
        tokens = (words == word) & (ids >= SPECIAL)
        assert predicted[tokens].all() or not predicted[tokens].any()
    assert abs(predicted[ids >= SPECIAL].mean() - 0.15) < 0.01


@pytest.mark.parametrize("name", ["bert-base-uncased", "gpt2", "albert-base-v2", "xlnet-base-cased"])
def test_words_begin_where_spaces_were(name):
    from commands import SHARED
    from transformers import AutoTokenizer

    folder = SHARED / "data" / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("needs the tokenizers in ../shared/data")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("unquestionably the preposterousness was noticeable", add_special_tokens=False)["input_ids"]
    starts = masked.word_starts(tokenizer)[ids]
    assert len(ids) > 5
    assert starts[1:].sum() == 4 or (starts.sum() == 5 and starts[0])


# ---- lines ----
@pytest.mark.parametrize("full_head", [True, False])
def test_lines_are_padded_and_padding_is_never_predicted(full_head):
    lengths = [5, 12, 9, 3]
    ids = text(1, sum(lengths)).ids[0]
    samples = dynamic_masking.DrawnSamples(Lines(ids, np.cumsum(lengths)), law(0.9), seed=1)
    inputs = batch(full_head, samples)
    assert inputs["input_ids"].shape == (4, 16)
    assert inputs["attention_mask"].sum(1).tolist() == lengths
    padded = batch(full_head, samples, pad_to=24)
    assert padded["input_ids"].shape == (4, 24) and (padded["input_ids"][1, 12:] == PAD).all()
    assert (inputs["labels"] != -100).sum() == (padded["labels"] != -100).sum()


# ---- in the trainer ----
def arguments(folder, kind=LanguageModelingArguments, **options):
    defaults = {"output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1}
    fixed = {
        "max_steps": 20,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    return kind(**{**defaults, **fixed, **options})


def train(folder, family: str, full_head: bool, dropout: float = 0.0, **options) -> LanguageModelingTrainer:
    model = families.make(family, dropout=dropout)
    if not full_head:
        masked.predict_only_masked(model)
    trainer = LanguageModelingTrainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=dynamic_masking.DrawnSamples(text(96), law(), seed=1),
        eval_dataset=dynamic_masking.DrawnSamples(text(10, seed=5), law(), seed=1),
        data_collator=masked.MaskedCollator(law(), PAD, full_head=full_head),
        loss_sum=predicted_rows.loss_sum,
        token_sums=predicted_rows.token_sums,
    )
    trainer.train()
    return trainer


def logged(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("full_head", "dropout"), [(True, 0.1), (False, 0.0)])
@pytest.mark.parametrize("family", families.MASKED)
def test_training_equals_transformers_on_the_same_batches(tmp_path, family, full_head, dropout):
    """Over 20 steps to 1e-4. With fewer rows dropout in the head draws other numbers, so there it is off."""
    stock = Trainer(
        model=families.make(family, dropout=dropout),
        args=arguments(tmp_path / "stock", TrainingArguments),
        train_dataset=dynamic_masking.DrawnSamples(text(96), law(), seed=1),
        data_collator=masked.MaskedCollator(law(), PAD, full_head=True),
    )
    stock.train()
    ours = train(tmp_path / "ours", family, full_head, dropout)
    assert len(logged(ours)) == 20
    assert logged(ours) == pytest.approx(logged(stock), rel=1e-4)


@pytest.mark.parametrize("family", families.MASKED)
def test_every_family_trains_at_o2_with_combined_gradients(tmp_path, family):
    half = {"bf16": True, "fp16_opt_level": "O2", "use_combine_grad": True}
    reference, ours = train(tmp_path / "O0", family, False), train(tmp_path / "O2", family, False, **half)
    assert logged(ours) == pytest.approx(logged(reference), rel=2e-2)
    assert ours.evaluate()["eval_loss"] == pytest.approx(reference.evaluate()["eval_loss"], rel=1e-2)


def test_micro_batches_weigh_by_their_targets(tmp_path):
    """Rung 3 of the numerics ladder: transformers 5 averages the means of the micro-batches, or adds them up."""
    one = train(tmp_path / "one", "bert", False, per_device_train_batch_size=8, max_steps=10)
    four = train(
        tmp_path / "four", "bert", False, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=10
    )
    assert logged(four) == pytest.approx(logged(one), rel=1e-5)


def test_evaluation_is_the_mean_over_all_targets(tmp_path):
    trainer = train(tmp_path, "bert", False, max_steps=2)
    metrics = trainer.evaluate()
    samples = trainer.eval_dataset
    inputs = dataclasses.replace(trainer.data_collator, full_head=True)([samples[i] for i in range(10)])
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = trainer.model.eval()(**inputs).logits
    expected = predicted_rows.token_sums(logits, labels).sum(0)
    assert metrics["eval_loss"] == pytest.approx((expected[2] / expected[1]).item(), rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx((expected[0] / expected[1]).item(), rel=1e-6)
