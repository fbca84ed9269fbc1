"""The order in which samples are seen: a matter of seed and epoch alone, in every process and after a resumption."""

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler


class LengthGroups(LengthGroupedSampler):
    """transformers' LengthGroupedSampler: batches of samples of about one length, each sample once in an epoch.

    transformers' own draws from torch's generator, whose state is another after a resumption within an epoch, and reads
    every sample for its length. lengths: tokens of each sample, int (samples,).
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        super().__init__(batch_size, lengths=lengths.tolist(), generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class EpochBegins(TrainerCallback):
    """Tells samples and sampler which epoch begins.

    accelerate tells either of them, and with several processes, or after a resumption within an epoch, not always the
    one that draws.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **_):
        epoch = int((state.epoch or 0) + 1e-6)
        sampler = train_dataloader
        while sampler is not None:  # batch samplers within each other, then the sampler
            inner = (getattr(sampler, name, None) for name in ("batch_sampler", "sampler"))
            # Not by truth: that asks for a length, which the sampler of a stream does not have.
            last, sampler = sampler, next((part for part in inner if part is not None), None)
        for part in (last, getattr(train_dataloader, "dataset", None)):
            if part is not None and hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
