"""The order of the training data as a matter of seed and epoch alone, so that a resumed run sees what it would have seen."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler


class SeededByEpoch(Sampler):
    """A sampler with an attribute `generator`, which is seeded anew for each epoch.

    transformers lets such samplers draw from the process's random numbers, whose state at the start of an epoch is not
    in a checkpoint of the middle of it.
    """

    def __init__(self, sampler: Sampler, seed: int):
        self.sampler = sampler
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


def set_epoch(dataloader: DataLoader, epoch: int) -> None:
    """Tells the epoch to the dataset and to every sampler within the dataloader's.

    accelerate tells one of them: the samplers, or else the dataset. And it does not reach through the wrapper that skips
    batches on resuming. A stream is left to itself: where it stands is no matter of the epoch alone.
    """
    if isinstance(dataloader.dataset, IterableDataset):
        return
    within = [dataloader.dataset, dataloader.batch_sampler]
    while within:
        part = within.pop()
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
        within += [vars(part)[name] for name in ("batch_sampler", "sampler") if name in vars(part)]
