"""Data parallelism for combined gradients: the flat gradient buffers themselves are reduced, while backward runs.

torch's DistributedDataParallel copies gradients into buckets of its own and back. Here the buffer that the optimizer
reads is cut into buckets, and a bucket is all-reduced in place as soon as backward has filled it. Nothing is copied,
unless the wire is to carry half of the bytes. This module knows torch only.
"""

import contextlib
from collections.abc import Iterator
from itertools import groupby

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
        self.waiting = set(members)  # those that backward has not filled yet
        self.filled_at = 0  # the number of members of all buckets that had been filled then
        # What is reduced: the gradients themselves, or half of their bytes.
        self.on_the_wire: torch.Tensor | None = None
        self.work: dist.Work | None = None

    def launch(self, world_size: int, wire_dtype: torch.dtype | None) -> None:
        """Starts to average the gradients over all ranks."""
        # Divided first: what is added up then stays as small as what comes out.
        self.gradients.mul_(1 / world_size)
        self.on_the_wire = self.gradients
        if wire_dtype is not None and wire_dtype.itemsize < self.gradients.itemsize:
            self.on_the_wire = self.gradients.to(wire_dtype)
        self.work = dist.all_reduce(self.on_the_wire, async_op=True)

    def land(self) -> None:
        """Waits for the reduction, and makes ready for the next."""
        assert self.work is not None and self.on_the_wire is not None
        self.work.wait()
        if self.on_the_wire is not self.gradients:
            self.gradients.copy_(self.on_the_wire)
        self.on_the_wire, self.work, self.waiting = None, None, set(self.members)


class GradientReducer:
    """Averages the flat gradients of a CombinedOptimizer over all ranks.

    bucket_megabytes: the size of a bucket, as --ddp_bucket_cap_mb means it.
    find_unused_parameters: ranks tell each other which parameters received a gradient, by one small reduction a step;
        only a rank that lacks one waits for it. Without it they must all use the same ones.
    wire_dtype: torch.float16 or torch.bfloat16: gradients of more bytes are cast to it for the reduction, as by torch's
        fp16_compress_hook and bf16_compress_hook. Sums are then rounded to it.
    """

    def __init__(
        self,
        optimizer: CombinedOptimizer,
        bucket_megabytes: float = 25.0,
        find_unused_parameters: bool = True,
        wire_dtype: torch.dtype | None = None,
    ):
        self.world_size = dist.get_world_size()
        self.find_unused_parameters = find_unused_parameters
        self.wire_dtype = wire_dtype
        self.enabled = True
        self.buckets = make_buckets(optimizer, bucket_megabytes)
        self.bucket_of = {member: bucket for bucket in self.buckets for member in bucket.members}
        self.device = optimizer.buffers[0].gradients.device
        self._launched = 0
        self._filled = 0
        self._knows_order = False

    def mark_ready(self, member: Member) -> None:
        """Called when backward has filled the member's slice.

        Raises RuntimeError for a parameter that backward meets again after its bucket was launched: reentrant
        checkpointing does that to shared weights, two backward passes in a step do it to all.
        """
        if not self.enabled:
            return
        bucket = self.bucket_of[member]
        if bucket.work is not None:
            raise RuntimeError(
                "a parameter received a gradient twice in a step, after the first had been sent to the other ranks; turn "
                "reentrant checkpointing off (use_reentrant: false), or run all but the last backward under no_sync()"
            )
        if member in bucket.waiting:
            self._filled += 1
            bucket.waiting.discard(member)
            bucket.filled_at = self._filled
        # Collectives must start in the same order on every rank, so a full bucket waits for those before it.
        while self._launched < len(self.buckets) and not self.buckets[self._launched].waiting:
            self._launch_next()

    def _launch_next(self) -> None:
        self.buckets[self._launched].launch(self.world_size, self.wire_dtype)
        self._launched += 1

    def finish(self, arrived: list[bool]) -> list[int]:
        """Reduces what is left, waits for all, and returns the indices of members with a gradient on any rank.

        arrived: for each member of the optimizer, whether this rank has a gradient; slices without one hold zeros.
        """
        filled_at = [len(arrived) if bucket.waiting else bucket.filled_at for bucket in self.buckets]
        while self._launched < len(self.buckets):
            self._launch_next()
        told = self._tell(arrived) if self.find_unused_parameters else None
        for bucket in self.buckets:
            bucket.land()
        self._launched = self._filled = 0
        if told is not None:
            anywhere, work = told
            work.wait()
            if not all(arrived):  # who has all of them need not read what the others have: no wait for the device
                arrived = anywhere.bool().tolist()
        if not self._knows_order:
            self._learn_order(filled_at)
        return [index for index, flag in enumerate(arrived) if flag]

    def _tell(self, arrived: list[bool]) -> tuple[torch.Tensor, dist.Work]:
        """(for each member whether any rank has a gradient, int32 on the device; the reduction that makes it so)."""
        flags = torch.ones(len(arrived), dtype=torch.int32, device=self.device)
        if not all(arrived):
            flags.copy_(torch.tensor(arrived))
        return flags, dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True)

    def _learn_order(self, filled_at: list[int]) -> None:
        """From the second step on, buckets are launched in the order in which backward has filled them on rank 0."""
        of_rank_0 = torch.tensor(filled_at, dtype=torch.int32, device=self.device)
        dist.broadcast(of_rank_0, src=0)
        order = sorted(range(len(self.buckets)), key=of_rank_0.tolist().__getitem__)
        self.buckets = [self.buckets[number] for number in order]
        self._knows_order = True


def make_buckets(optimizer: CombinedOptimizer, bucket_megabytes: float) -> list[Bucket]:
    """Neighbouring members in buckets of about that size, in the order in which backward is expected to fill them.

    No bucket has members of two groups: backward reaches the end of one when it has just begun with the next.
    """
    buckets = []
    for buffer in optimizer.buffers:
        for _, run in groupby(buffer.members, lambda member: member.group):
            members: list[Member] = []
            for member in run:
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
    reducer_options: of GradientReducer.
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
