"""utils/objectives/dynamic_masking.py: what is hidden depends on seed, epoch and sample alone."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from utils.objectives import dynamic_masking, masked, permutation
from utils.packing import Blocks

VOCABULARY = 120
IS_SPECIAL = np.arange(VOCABULARY) < 5
LAWS = {
    "masked": masked.MaskingLaw(0.15, 4, VOCABULARY, IS_SPECIAL),
    "permuted": permutation.PermutationLaw(1 / 6, 5, 4, IS_SPECIAL),
}
COUNT = 16


def blocks() -> Blocks:
    return Blocks(np.random.default_rng(0).integers(5, VOCABULARY, (COUNT, 32)).astype(np.int32))


class Stream(torch.utils.data.IterableDataset):
    """The blocks as a stream, dealt out to the workers of a DataLoader."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        yield from ({**blocks()[index], "number": (3, index)} for index in range(first, COUNT, step))


def content(sample: dict) -> bytes:
    return b"".join(np.asarray(array).tobytes() for array in sample.values())


def take(law: str, seed: int = 1, epoch: int = 0, order=range(COUNT), workers: int = 0) -> dict[int, bytes]:
    samples = dynamic_masking.draw(blocks(), LAWS[law], seed)
    samples.set_epoch(epoch)
    loader = DataLoader(samples, sampler=list(order), batch_size=None, num_workers=workers)
    return {index: content(sample) for index, sample in zip(order, loader, strict=True)}


@pytest.mark.parametrize("law", LAWS)
def test_a_draw_depends_on_seed_epoch_and_sample_alone(law):
    first = take(law)
    assert len(set(first.values())) == COUNT
    assert first == take(law, order=range(COUNT - 1, -1, -1)) == take(law, workers=2)
    for other in (take(law, epoch=1), take(law, seed=2)):
        assert all(first[index] != other[index] for index in range(COUNT))


@pytest.mark.parametrize("law", LAWS)
def test_persistent_workers_see_the_epoch_change(law):
    samples = dynamic_masking.draw(blocks(), LAWS[law], 1)
    loader = DataLoader(samples, batch_size=None, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        samples.set_epoch(epoch)
        epochs.append([content(sample) for sample in loader])
    assert epochs[0] != epochs[1] and epochs[0] == epochs[2]


@pytest.mark.parametrize("law", LAWS)
def test_a_streams_draw_depends_on_seed_and_number_alone(law):
    def take(seed: int = 1, workers: int = 0) -> set[bytes]:
        stream = dynamic_masking.draw(Stream(), LAWS[law], seed)
        samples = list(DataLoader(stream, batch_size=None, num_workers=workers))
        assert not any("number" in sample for sample in samples)
        return {content(sample) for sample in samples}

    assert len(take()) == COUNT
    assert take() == take(workers=2)
    assert not take() & take(seed=2)


def test_equal_samples_of_a_stream_are_drawn_independently():
    ids = np.arange(5, 69)

    class Same(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ({"input_ids": ids, "documents": ids, "number": (0, index)} for index in range(4))

    samples = list(dynamic_masking.draw(Same(), LAWS["masked"], 1))
    assert len({content(sample) for sample in samples}) == 4
    assert all(sample["documents"] is ids for sample in samples)
