"""Parameters and their gradients as slices of flat tensors. This module knows torch only."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import nn

# Slices start at multiples of this many bytes: what CUDA's and Ascend's allocators give a tensor of its own.
ALIGNMENT = 512
# The norm is taken in two steps, rows of this many elements first. One float32 sum over the squares of 124 million
# gradients is off by 1.3 % on a CPU; in rows it is right to 1e-7, and faster.
NORM_ROW = 4096


@dataclass(eq=False)
class Member:
    """One parameter and its place in a flat buffer."""

    source: nn.Parameter  # the model's parameter: backward leaves its gradient here
    target: nn.Parameter  # what the optimizer updates: the source itself, or its float32 master
    index: int  # number in torch.optim's order, which checkpoints use
    group: int
    start: int = 0
    stop: int = 0
    gradient: torch.Tensor = field(init=False)  # its slice of the gradient buffer, in the parameter's shape


@dataclass
class FlatBuffer:
    """Weights and gradients of all members of one dtype, each one contiguous tensor of the same length."""

    weights: torch.Tensor
    gradients: torch.Tensor
    members: list[Member]

    @property
    def elements(self) -> int:
        """Number of elements that belong to parameters: the padding between them is not counted."""
        return sum(member.target.numel() for member in self.members)


def make_buffers(members: list[Member]) -> list[FlatBuffer]:
    """One buffer per dtype of the targets, which become views of it.

    Groups follow each other, and in each group the members with a master come first: their half weights are then one
    run, which is written back at once.
    """
    order = sorted(members, key=lambda member: (member.group, member.source is member.target, member.index))
    buffers = []
    for dtype in dict.fromkeys(member.target.dtype for member in order):
        inside = [member for member in order if member.target.dtype == dtype]
        step = ALIGNMENT // dtype.itemsize
        end = 0
        for member in inside:
            member.start, member.stop = end, end + member.target.numel()
            end = -(-member.stop // step) * step
        length = -(-end // NORM_ROW) * NORM_ROW
        weights = torch.zeros(length, dtype=dtype, device=inside[0].target.device)
        gradients = torch.zeros_like(weights)
        for member in inside:
            _move_into(member.target, weights[member.start : member.stop])
            member.gradient = gradients[member.start : member.stop].view(member.target.shape)
        buffers.append(FlatBuffer(weights, gradients, inside))
    return buffers


def flatten_half_weights(buffer: FlatBuffer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (half weights, their masters), flat and of equal length: one copy brings a whole run up to date.

    The model's half parameters become views of the first of each pair.
    """
    for (is_own, dtype), neighbours in groupby(buffer.members, lambda m: (m.source is m.target, m.source.dtype)):
        if is_own:
            continue
        run = list(neighbours)
        masters = buffer.weights[run[0].start : run[-1].stop]
        half = torch.zeros(len(masters), dtype=dtype, device=masters.device)
        for member in run:
            _move_into(member.source, half[member.start - run[0].start : member.stop - run[0].start])
        yield half, masters


def _move_into(parameter: nn.Parameter, place: torch.Tensor) -> None:
    """Makes `parameter` a view of the flat slice `place`, which takes over its values."""
    place.copy_(parameter.detach().reshape(-1))
    parameter.data = place.view(parameter.shape)
