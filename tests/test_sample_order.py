"""utils/sample_order.py: batches of about one length, and what an epoch draws, after a resumption and in several processes."""

import families
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainerState

from utils.objectives import dynamic_masking, masked, predicted_rows
from utils.packing import Lines
from utils.sample_order import EpochBegins, LengthGroups
from utils.trainer import LanguageModelingTrainer
from utils.training_arguments import LanguageModelingArguments

COUNT, LONGEST = 160, 60
LAW = masked.MaskingLaw(0.15, 4, families.VOCABULARY, np.arange(families.VOCABULARY) < 5)


def lines() -> Lines:
    lengths = np.random.default_rng(0).integers(3, LONGEST, COUNT)
    ids = np.random.default_rng(1).integers(5, families.VOCABULARY, lengths.sum()).astype(np.uint8)
    return Lines(ids, np.cumsum(lengths))


class Recorder(masked.MaskedCollator):
    """Notes the samples of each batch, and how many tokens it computes and needs."""

    def __call__(self, samples):
        batch = super().__call__(samples)
        if torch.is_grad_enabled():
            self.seen.append([sample["input_ids"].tobytes() for sample in samples])
            self.padding.append((batch["input_ids"].numel(), sum(len(sample["input_ids"]) for sample in samples)))
        return batch


def train(folder, checkpoint=None, **options):
    """(the samples of each batch, the share of padding, the trainer) of two epochs."""
    defaults = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 50, "logging_steps": 100}
    args = LanguageModelingArguments(str(folder), use_cpu=True, disable_tqdm=True, **{**defaults, **options})
    collate = Recorder(LAW, 1)
    object.__setattr__(collate, "seen", [])
    object.__setattr__(collate, "padding", [])
    trainer = LanguageModelingTrainer(
        model=families.make("bert"),
        args=args,
        train_dataset=dynamic_masking.draw(lines(), LAW, 1),
        eval_dataset=dynamic_masking.draw(lines(), LAW, 1),
        data_collator=collate,
        loss_sum=predicted_rows.loss_sum,
        token_sums=predicted_rows.token_sums,
    )
    masked.predict_only_masked(trainer.model)
    trainer.train(resume_from_checkpoint=checkpoint)
    computed, needed = np.sum(collate.padding, axis=0)
    return collate.seen, 1 - needed / computed, trainer


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grouped")
    return folder, *train(folder, train_sampling_strategy="group_by_length")


def test_padding_falls_and_each_sample_is_seen_once_in_an_epoch(grouped, tmp_path):
    _, seen, padding, _ = grouped
    _, plain_padding, _ = train(tmp_path)
    assert padding < 0.7 * plain_padding
    for epoch, batches in enumerate((seen[:40], seen[40:])):
        samples = dynamic_masking.draw(lines(), LAW, 1)
        samples.set_epoch(epoch)
        expected = sorted(samples[index]["input_ids"].tobytes() for index in range(COUNT))
        assert sorted(sample for batch in batches for sample in batch) == expected


def test_a_resumption_within_an_epoch_keeps_order_and_draws(grouped, tmp_path):
    folder, seen, _, _ = grouped
    resumed, _, _ = train(tmp_path, folder / "checkpoint-50", train_sampling_strategy="group_by_length")
    assert resumed == seen[50:] and len(resumed) == 30


def test_a_resumption_within_an_epoch_draws_what_that_epoch_draws(tmp_path):
    seen, _, _ = train(tmp_path / "whole")
    resumed, _, _ = train(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-50")
    assert resumed == seen[50:]


def test_evaluation_counts_every_sample(grouped):
    _, _, _, trainer = grouped
    trainer.evaluate()
    assert trainer.evaluated_samples == COUNT


def test_the_order_is_another_in_each_epoch_and_the_same_again():
    groups = LengthGroups(lines().lengths, 8, 3)
    first = list(groups)
    groups.set_epoch(1)
    second = list(groups)
    groups.set_epoch(0)
    assert first == list(groups) != second and sorted(first) == sorted(second) == list(range(COUNT))


def test_lengths_are_known_without_drawing():
    samples = dynamic_masking.draw(lines(), None, 1)  # no law: drawing would fail
    assert samples.lengths.tolist() == [len(lines()[index]["input_ids"]) for index in range(COUNT)]


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["grouped", "random"])
def test_samples_and_sampler_are_told_through_every_wrapping(kind, processes, skip):
    samples = dynamic_masking.draw(lines(), LAW, 1)
    sampler = LengthGroups(samples.lengths, 8, 3) if kind == "grouped" else RandomSampler(samples)
    loader = prepare_data_loader(
        DataLoader(samples, batch_size=8, sampler=sampler, collate_fn=list),
        num_processes=processes,
        process_index=0,
        put_on_device=False,
        use_seedable_sampler=True,
    )
    loader = skip_first_batches(loader, skip) if skip else loader
    state = TrainerState()
    state.epoch = 1.25
    EpochBegins().on_epoch_begin(None, state, None, train_dataloader=loader)
    assert samples.epoch == 1
    if kind == "grouped":
        assert sampler.epoch == 1


class Stream(torch.utils.data.IterableDataset):
    """Knows no epochs."""

    def __init__(self, told: list[int]):
        self.told = told

    def __iter__(self):
        yield from range(10)


class StreamOfEpochs(Stream):
    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("kind", [Stream, StreamOfEpochs])
def test_a_stream_is_told_if_it_wants_to_know(kind, batch_size):
    loader = DataLoader(kind([]), batch_size=batch_size)
    EpochBegins().on_epoch_begin(None, TrainerState(epoch=2.0), None, train_dataloader=loader)
    assert loader.dataset.told == [2] * (kind is StreamOfEpochs)
