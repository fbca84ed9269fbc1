"""Data parallelism for combined gradients: the flat gradient buffers themselves are reduced, while backward runs.

torch's DistributedDataParallel copies gradients into buckets of its own and back. Here the buffer that the optimizer
reads is cut into buckets, and a bucket is all-reduced in place as soon as backward has filled it. This module knows
torch only.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from utils.combine_grad import CombinedOptimizer
from utils.flat_buffer import FlatBuffer, Member


class Bucket:
    """A slice of a gradient buffer, reduced by one call."""

    def __init__(self, buffer: FlatBuffer, members: list[Member]):
        self.gradients = buffer.gradients[members[0].start : members[-1].stop]
        self.members = members
        self.waiting = len(members)
        self.work = None


class GradientReducer:
    """Averages the flat gradients of a CombinedOptimizer over all ranks.

    bucket_megabytes: the size of a bucket, as --ddp_bucket_cap_mb means it.
    find_unused_parameters: ranks tell each other which parameters received a gradient, at the price of one small
        reduction a step; without it they must all use the same ones.
    """

    def __init__(
        self,
        optimizer: CombinedOptimizer,
        bucket_megabytes: float = 25.0,
        find_unused_parameters: bool = True,
    ):
        self.world_size = dist.get_world_size()
        self.find_unused_parameters = find_unused_parameters
        self.enabled = True
        self.buckets = make_buckets(optimizer, bucket_megabytes)
        self.bucket_of = {member: bucket for bucket in self.buckets for member in bucket.members}
        self.device = optimizer.buffers[0].gradients.device
        self._launched = 0

    def mark_ready(self, member: Member) -> None:
        """Called when backward has filled the member's slice."""
        if not self.enabled:
            return
        bucket = self.bucket_of[member]
        bucket.waiting -= 1
        # Collectives must start in the same order on every rank, so a full bucket waits for those before it.
        while self._launched < len(self.buckets) and self.buckets[self._launched].waiting == 0:
            self._launch_next()

    def _launch_next(self) -> None:
        bucket = self.buckets[self._launched]
        bucket.gradients.mul_(1 / self.world_size)
        bucket.work = dist.all_reduce(bucket.gradients, async_op=True)
        self._launched += 1

    def finish(self, arrived: list[bool]) -> list[int]:
        """Reduces what is left, waits for all, and returns the indices of members with a gradient on any rank.

        arrived: for each member of the optimizer, whether this rank has a gradient; slices without one hold zeros.
        """
        while self._launched < len(self.buckets):
            self._launch_next()
        if self.find_unused_parameters:
            flags = torch.tensor(arrived, dtype=torch.int32, device=self.device)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            arrived = flags.tolist()
        for bucket in self.buckets:
            bucket.work.wait()
            bucket.work, bucket.waiting = None, len(bucket.members)
        self._launched = 0
        return [index for index, flag in enumerate(arrived) if flag]


def make_buckets(optimizer: CombinedOptimizer, bucket_megabytes: float) -> list[Bucket]:
    """Neighbouring members in buckets of about that size, in the order in which backward is expected to fill them."""
    buckets = []
    for buffer in optimizer.buffers:
        members: list[Member] = []
        for member in buffer.members:
            members.append(member)
            size = (member.stop - members[0].start) * buffer.gradients.itemsize
            if size >= bucket_megabytes * 2**20:
                buckets.append(Bucket(buffer, members))
                members = []
        if members:
            buckets.append(Bucket(buffer, members))
    # Backward meets a model's parameters last to first: a bucket is full when its first parameter has come. Numbers of
    # different groups are not comparable, so the place within the group counts.
    first = {group: min(m.index for m in optimizer.members if m.group == group) for group in _groups(optimizer)}
    size = {group: sum(m.group == group for m in optimizer.members) for group in _groups(optimizer)}
    return sorted(
        buckets,
        key=lambda bucket: min((m.index - first[m.group]) / size[m.group] for m in bucket.members),
        reverse=True,
    )


def _groups(optimizer: CombinedOptimizer) -> set[int]:
    return {member.group for member in optimizer.members}


class CombinedDataParallel(nn.Module):
    """Wraps a model as DistributedDataParallel does, for an optimizer whose gradients are combined.

    All ranks start from rank 0's weights and buffers. `no_sync()` holds the reduction back, as DDP's does.
    """

    def __init__(self, module: nn.Module, optimizer: CombinedOptimizer, **reducer_options):
        super().__init__()
        self.module = module
        self.reducer = optimizer.reducer = GradientReducer(optimizer, **reducer_options)
        for tensor in [*(buffer.weights for buffer in optimizer.buffers), *module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0)

    def forward(self, *arguments, **named_arguments):
        return self.module(*arguments, **named_arguments)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        enabled, self.reducer.enabled = self.reducer.enabled, False
        try:
            yield
        finally:
            self.reducer.enabled = enabled
