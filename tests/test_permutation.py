"""utils/objectives/permutation.py: the law of permutation language modeling, and XLNet on predicted rows only."""

import types

import numpy as np
import pytest
import torch
from tiny_xlnet import (
    MASK,
    PAD,
    SPECIAL_IDS,
    VOCABULARY,
    WORD,
    assert_same_training,
    batch,
    dataset,
    gradients,
    law,
    mean_loss,
    text,
    xlnet,
)
from transformers import DataCollatorForPermutationLanguageModeling, Trainer, TrainingArguments

from utils.objectives import dynamic_masking, permutation, predicted_rows
from utils.packing import Blocks
from utils.trainer import LanguageModelingTrainer
from utils.training_arguments import LanguageModelingArguments


# ---- predicted rows only ----
@pytest.mark.parametrize("length", [8, 32, 33])
def test_predicted_rows_alone_give_the_same_loss_and_gradients(length):
    samples = text(length=length)
    sparse, full = batch(dataset(samples), 8), batch(dataset(samples, full_head=True), 8)
    assert torch.equal(sparse["perm_mask"], full["perm_mask"])
    assert torch.equal(full["target_mapping"], torch.eye(length).expand(8, -1, -1))
    assert sparse["labels"].shape == (8, permutation.capacity(length, 1 / 6, 5))
    assert (sparse["labels"] != -100).any()
    assert_same_training(sparse, full)


def test_rows_that_are_not_needed_change_nothing():
    inputs = batch(dataset())
    more = dict(inputs)
    more["target_mapping"] = torch.cat([inputs["target_mapping"], torch.zeros(4, 24, 32)], dim=1)
    more["predicted_positions"] = torch.cat([inputs["predicted_positions"], torch.zeros(4, 24).long()], dim=1)
    more["labels"] = torch.cat([inputs["labels"], torch.full((4, 24), -100)], dim=1)
    assert_same_training(inputs, more)
    needed = inputs["labels"] != -100
    assert not needed.all()
    assert torch.equal(inputs["target_mapping"].sum(-1), needed.float())


def test_the_full_head_is_transformers():
    inputs = batch(dataset(full_head=True))
    model = xlnet()
    stock = model(**inputs).loss
    assert mean_loss(model, inputs).item() == pytest.approx(stock.item(), rel=1e-6)
    expected, found = gradients(model, stock), gradients(model, mean_loss(model, inputs))
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=1e-6), name


def test_token_sums_count_predicted_rows_of_each_sample():
    sums = []
    for full_head in (False, True):
        inputs = batch(dataset(full_head=full_head))
        labels = inputs.pop("labels")
        logits = xlnet(inputs)(**inputs).logits
        sums.append(predicted_rows.token_sums(logits, labels))
        assert sums[-1].shape == (4, 3) and sums[-1].dtype == torch.float32
        assert sums[-1][:, 1].tolist() == (labels != -100).sum(1).tolist()
        assert sums[-1][:, 2].sum().item() == pytest.approx(predicted_rows.loss_sum(logits, labels).item(), rel=1e-6)
        correct = (logits.argmax(-1) == labels).sum(1)
        assert sums[-1][:, 0].tolist() == correct.tolist()
    assert torch.allclose(*sums, atol=1e-5)


def test_labels_are_the_hidden_tokens():
    samples = text()
    data = dataset(samples)
    for index in range(len(data)):
        sample, ids = data[index], samples[index]["input_ids"]
        predicted = np.flatnonzero(sample["input_ids"] != ids)
        assert np.array_equal(sample["positions"][: len(predicted)], predicted)
        assert np.array_equal(sample["labels"][: len(predicted)], ids[predicted])
        assert (sample["labels"][len(predicted) :] == -100).all()
        assert (sample["positions"][len(predicted) :] == 0).all()
        assert (sample["input_ids"][predicted] == MASK).all()


def test_types_of_a_batch():
    inputs = batch(dataset())
    assert {name: tensor.dtype for name, tensor in inputs.items()} == {
        "input_ids": torch.int64,
        "perm_mask": torch.float32,
        "target_mapping": torch.float32,
        "predicted_positions": torch.int64,
        "labels": torch.int64,
    }


# ---- samples of unequal length ----
@pytest.mark.parametrize("full_head", [False, True])
def test_padding_of_shorter_samples_changes_nothing(full_head):
    samples = [text(1, length, seed=length)[0] for length in (32, 11, 24, 7)]
    data = dataset(samples, full_head=full_head)
    together = batch(data)
    assert together["attention_mask"].sum(1).tolist() == [32, 11, 24, 7]
    assert together["attention_mask"].dtype == torch.float32
    assert (together["input_ids"][1, 11:] == PAD).all() and (together["input_ids"][1, :11] != PAD).all()
    model = xlnet(together)
    labels = together["labels"]
    logits = model(**{name: tensor for name, tensor in together.items() if name != "labels"}).logits
    sums = predicted_rows.token_sums(logits, labels)
    for index in range(4):
        alone = permutation.PermutationCollator(PAD, full_head=full_head)([data[index]])
        assert "attention_mask" not in alone
        targets = alone.pop("labels")
        expected = predicted_rows.token_sums(model(**alone).logits, targets)[0]
        assert torch.allclose(sums[index], expected, atol=1e-4), index
    assert_same_training(
        together, {**together, "input_ids": together["input_ids"].masked_fill(together["attention_mask"] == 0, 50)}
    )


# ---- the law ----
def stock_collator(**options) -> DataCollatorForPermutationLanguageModeling:
    def special_tokens_mask(ids: list[int], already_has_special_tokens: bool) -> list[int]:
        return [int(index in SPECIAL_IDS) for index in ids]

    tokenizer = types.SimpleNamespace(
        mask_token="<mask>",
        mask_token_id=MASK,
        pad_token="<pad>",
        pad_token_id=PAD,
        get_special_tokens_mask=special_tokens_mask,
    )
    return DataCollatorForPermutationLanguageModeling(tokenizer, **options)


@pytest.mark.parametrize("options", [{}, {"plm_probability": 0.15, "max_span_length": 7}])
@pytest.mark.parametrize("length", [2, 10, 64])
def test_transformers_collator_fed_with_our_draws_makes_our_batch(monkeypatch, length, options):
    """Bit for bit: its draws are replaced by ours, made here once more, and all else is its own."""
    probability, longest = options.get("plm_probability", 1 / 6), options.get("max_span_length", 5)
    samples = text(8, length)
    for index in range(8):
        draw = np.random.default_rng((1, 0, index))
        spans = draw.integers(1, longest + 1, int(np.ceil(length / int(1 / probability))))
        offsets = draw.integers(0, [int(span / probability) - span + 1 for span in spans])
        half = draw.permutation(length // 2)
        numbers = iter(np.stack([spans, offsets], axis=1).ravel())

        def replay(*bounds_and_size, numbers=numbers):
            low, high = (0, *bounds_and_size[:-1])[-2:]
            number = int(next(numbers))
            assert low <= number < high
            return torch.tensor([number])

        monkeypatch.setattr(torch, "randint", replay)
        monkeypatch.setattr(torch, "randperm", lambda count, half=half: torch.from_numpy(half))
        ids = torch.from_numpy(samples[index]["input_ids"].astype(np.int64))
        stock = stock_collator(**options)([{"input_ids": ids}])
        ours = permutation.PermutationCollator(full_head=True)([dataset(samples, full_head=True, **options)[index]])
        assert ours.keys() == stock.keys()
        for name in stock:
            assert torch.equal(ours[name], stock[name]), name


def statistics(input_ids: np.ndarray, perm_mask: np.ndarray) -> np.ndarray:
    """Per sample, (samples, numbers): share of ones in perm_mask, runs of 1 to 10 predicted tokens, each position's fate."""
    predicted = input_ids == MASK
    edges = np.diff(np.pad(predicted, ((0, 0), (1, 1))).astype(int), axis=1)
    runs = np.zeros((len(predicted), 10))
    starts, ends = np.nonzero(edges == 1), np.nonzero(edges == -1)
    np.add.at(runs, (starts[0], np.minimum(ends[1] - starts[1], 10) - 1), 1)
    means = np.stack([perm_mask.mean((1, 2)), predicted.mean(1)], axis=1)
    return np.concatenate([means, runs, predicted], axis=1)


def test_distributions_are_those_of_transformers():
    count, length = 4000, 64
    samples = text(count, length)
    torch.manual_seed(0)
    stock = stock_collator()([{"input_ids": torch.from_numpy(ids.astype(np.int64))} for ids in samples.ids])
    data = dataset(samples)
    drawn = [data[index] for index in range(count)]
    ours = [np.stack([sample[name] for sample in drawn]) for name in ("input_ids", "perm_mask")]
    numbers = [statistics(stock["input_ids"].numpy(), stock["perm_mask"].numpy()), statistics(*ours)]
    difference = numbers[0].mean(0) - numbers[1].mean(0)
    error = np.sqrt((numbers[0].var(0) + numbers[1].var(0)) / count)
    assert (error[:7] > 0).all()
    scores = np.abs(difference) / np.maximum(error, 1e-12)
    assert scores.max() < 4.5, scores.round(1)


@pytest.mark.parametrize("length", [1, 2, 9, 24])
def test_who_sees_whom(length):
    draw = np.random.default_rng(length)
    for _ in range(20):
        fate = draw.integers(0, 3, length)  # 0: context, 1: predicted, 2: functional
        order = permutation.draw_order(length, draw)
        found = permutation.visibility(fate == 1, fate == 2, order)
        place = [-1 if fate[i] == 0 else order[i] for i in range(length)]
        for i in range(length):
            for j in range(length):
                assert found[i, j] == (fate[j] == 1 and place[i] <= place[j])


@pytest.mark.parametrize("length", [1, 2, 7, 32, 33])
def test_the_order_permutes_both_halves_alike(length):
    orders = np.stack([permutation.draw_order(length, np.random.default_rng(seed)) for seed in range(200)])
    half = length // 2
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(length), (200, 1)))
    assert np.array_equal(orders[:, :half] + half, orders[:, half : 2 * half])
    if length % 2:
        assert (orders[:, -1] == length - 1).all()
    if half > 1:  # each place is equally likely: within five standard errors
        assert abs(orders[:, 0].mean() - (half - 1) / 2) < 5 * np.sqrt((half**2 - 1) / 12 / 200)


@pytest.mark.parametrize("length", [24, 33])
def test_no_row_depends_on_its_own_token_or_on_later_ones(length):
    """With the tokens themselves in place of the mask: visibility alone must hide them."""
    samples = text(3, length, special=False)
    data = dataset(samples)
    inputs = batch(data, 3)
    model = xlnet(inputs)
    ids = torch.from_numpy(samples.ids.astype(np.int64))
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(
        inputs_embeds=embeddings,
        **{name: inputs[name] for name in ("perm_mask", "target_mapping", "predicted_positions")},
    ).logits
    for index in range(3):
        draw = np.random.default_rng((1, 0, index))
        predicted = permutation.draw_predicted(length, 1 / 6, 5, draw)
        order = permutation.draw_order(length, draw)
        assert predicted.any() and not predicted.all()
        for row in np.flatnonzero(inputs["labels"][index].numpy() != -100):
            position = data[index]["positions"][row]
            hidden = torch.from_numpy(predicted & (order >= order[position]))
            assert hidden[position]
            (gradient,) = torch.autograd.grad(logits[index, row, :3].sum(), embeddings, retain_graph=True)
            reaches = (gradient[index] != 0).any(-1)
            assert torch.equal(reaches, ~hidden), (index, row)
            others = torch.arange(3) != index
            assert not gradient[others].any()


def test_what_the_model_sees_does_not_depend_on_what_it_predicts():
    samples = text()
    before = dataset(samples)[0]
    positions = before["positions"][before["labels"] != -100]
    samples.ids[0, positions] = (samples.ids[0, positions] - WORD + 1) % (VOCABULARY - WORD) + WORD
    after = dataset(samples)[0]
    for name in ("input_ids", "perm_mask", "positions"):
        assert np.array_equal(before[name], after[name])
    assert (before["labels"] != after["labels"])[: len(positions)].all()


def test_special_and_padding_tokens_are_never_predicted():
    ids = text(300, 40).ids
    ids[:, 20:24] = PAD
    data = dynamic_masking.DrawnSamples(Blocks(ids), law(special=(4, 3, PAD)), 0)
    labels = np.concatenate([data[index]["labels"] for index in range(300)])
    assert (labels[labels != -100] >= WORD).all()
    predicted = np.stack([data[index]["input_ids"] for index in range(300)]) == MASK
    assert np.array_equal(predicted.any(axis=0), (ids >= WORD).all(axis=0))


# ---- a fixed number of rows ----
def most_predicted(length: int, probability: float, longest: int) -> int:
    """The most that the law can draw, by trying all spans from the end on."""
    most = [0] * (length + 1)
    for left in range(1, length + 1):
        for span in range(1, longest + 1):
            context = int(span / probability)
            most[left] = max(most[left], min(span, left) + (most[left - context] if context < left else 0))
    return most[length]


LAWS = [(512, 1 / 6, 5), (128, 0.15, 5), (37, 0.4, 3), (20, 1 / 6, 30), (64, 1.0, 4), (9, 0.9, 1)]


@pytest.mark.parametrize("length, probability, longest", LAWS)
def test_no_draw_exceeds_the_capacity(length, probability, longest):
    count = permutation.capacity(length, probability, longest)
    draw = np.random.default_rng(0)
    drawn = [permutation.draw_predicted(length, probability, longest, draw).sum() for _ in range(20_000)]
    assert max(drawn) <= most_predicted(length, probability, longest) <= count
    assert count % 8 == 0 and count < length + 8


def test_the_capacity_is_never_below_what_can_be_drawn_nor_far_above():
    for probability, longest in ((1 / 6, 5), (0.15, 5), (0.37, 4), (0.05, 12), (0.7, 3), (1.0, 2)):
        for length in range(1, 200):
            most = most_predicted(length, probability, longest)
            assert most <= permutation.capacity(length, probability, longest) < most + longest + 8


def test_shapes_never_change():
    data = dataset(text(200, 128))
    assert len({tuple(array.shape for array in data[index].values()) for index in range(200)}) == 1


@pytest.mark.parametrize("count", [0, 1, 8])
def test_no_target_is_lost_beyond_the_capacity(monkeypatch, count):
    samples = text(8, 96)
    full = batch(dataset(samples, full_head=True))
    monkeypatch.setattr(permutation, "capacity", lambda *law: count)
    sparse = batch(dataset(samples))
    most = int((full["labels"] != -100).sum(1).max())
    assert most > 8
    assert sparse["labels"].shape[1] == count + int(np.ceil((most - count) / 8)) * 8
    for index in range(4):
        expected, found = full["labels"][index], sparse["labels"][index]
        assert torch.equal(found[found != -100], expected[expected != -100])
    assert_same_training(sparse, full)


# ---- in the trainer ----
@pytest.mark.parametrize(("full_head", "dropout"), [(True, 0.1), (False, 0.0)])
def test_training_equals_transformers_on_the_same_batches(tmp_path, full_head, dropout):
    """Over 20 steps to 1e-4. With fewer rows dropout draws other numbers, so there it is off."""

    def train(kind, folder, kind_of_arguments, full: bool, **options) -> list[float]:
        trainer = kind(
            model=xlnet({} if full else {"predicted_positions"}, dropout),
            args=kind_of_arguments(
                output_dir=str(tmp_path / folder),
                per_device_train_batch_size=4,
                learning_rate=3e-3,
                logging_steps=1,
                max_steps=20,
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
            ),
            train_dataset=dataset(text(96), full_head=full),
            data_collator=permutation.PermutationCollator(PAD, full_head=full),
            **options,
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    stock = train(Trainer, "stock", TrainingArguments, True)
    sums = {"loss_sum": predicted_rows.loss_sum, "token_sums": predicted_rows.token_sums}
    ours = train(LanguageModelingTrainer, "ours", LanguageModelingArguments, full_head, **sums)
    assert len(ours) == 20 and ours[-1] < ours[0]
    assert ours == pytest.approx(stock, rel=1e-4)
