"""Samples whose hidden tokens are drawn while they are read, anew in each epoch."""

import zlib
from collections.abc import Iterator

import numpy as np
import torch


class DrawnSamples(torch.utils.data.Dataset):
    """Samples as a law shows them: item i is law.apply(the ids of sample i, a generator), a dict of arrays.

    What else a sample has, stays.

    What is drawn depends on (seed, epoch, i) alone: not on workers, ranks, or where a run resumed.
    """

    def __init__(self, samples, law, seed: int):
        self.samples = samples
        self.law = law
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        draw = np.random.default_rng((self.seed, int(self.epoch), index))
        sample = self.samples[index]
        return {**sample, **self.law.apply(sample["input_ids"], draw)}


class DrawnStream(torch.utils.data.IterableDataset):
    """As DrawnSamples, for a stream. Its samples have no number, so that what is drawn depends on their tokens instead."""

    def __init__(self, samples, law, seed: int):
        self.samples = samples
        self.law = law
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.samples.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for sample in self.samples:
            ids = sample["input_ids"]
            yield self.law.apply(ids, np.random.default_rng((self.seed, self.epoch, zlib.crc32(ids.tobytes()))))


def draw(samples, law, seed: int) -> DrawnSamples | DrawnStream:
    """`samples` as the law shows them. samples: items, or a stream of items, {"input_ids": array of int, (length,)}."""
    is_stream = isinstance(samples, torch.utils.data.IterableDataset)
    return DrawnStream(samples, law, seed) if is_stream else DrawnSamples(samples, law, seed)
