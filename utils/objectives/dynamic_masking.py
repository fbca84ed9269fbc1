"""Samples whose hidden tokens are drawn while they are read, anew in each epoch."""

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

    @property
    def lengths(self) -> np.ndarray | None:
        """Tokens of each sample, int64, without drawing it; None if `samples` does not say."""
        return getattr(self.samples, "lengths", None)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        draw = np.random.default_rng((self.seed, int(self.epoch), index))
        sample = self.samples[index]
        return {**sample, **self.law.apply(sample["input_ids"], draw)}


class DrawnStream(torch.utils.data.IterableDataset):
    """As DrawnSamples, for a stream, whose samples have a `number`, a tuple of ints, of their own.

    What is drawn depends on the seed and that number alone.
    """

    def __init__(self, samples, law, seed: int):
        self.samples = samples
        self.law = law
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for sample in self.samples:
            draw = np.random.default_rng((self.seed, *sample.pop("number")))
            yield {**sample, **self.law.apply(sample["input_ids"], draw)}

    # Where the stream stands, and what it is, its samples know.
    def state_dict(self) -> dict:
        return self.samples.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.samples.load_state_dict(state)

    @property
    def description(self) -> dict:
        return self.samples.description

    @property
    def epochs(self) -> float:
        return self.samples.epochs


def draw(samples, law, seed: int) -> DrawnSamples | DrawnStream:
    """`samples` as the law shows them. samples: items, or a stream of items, {"input_ids": array of int, (length,)}."""
    is_stream = isinstance(samples, torch.utils.data.IterableDataset)
    return DrawnStream(samples, law, seed) if is_stream else DrawnSamples(samples, law, seed)
