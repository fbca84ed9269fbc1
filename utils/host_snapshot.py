"""Copies of tensors in host memory, to be written to disk while training goes on."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future

import numpy as np
import torch
from torch import nn

from utils import device

ALIGNMENT = 64  # bytes: where a copy starts in its buffer


class HostSnapshot:
    """Copies tensors into host memory that is kept from one time to the next.

    on: where they come from. Memory for an accelerator is page-locked: it copies there at full speed.

    A copy has its place at once, and its content when `fill` is called: weights and moments stand still from one update
    to the next, so that they can be copied while the next gradients are computed (as in CheckFreq, FAST '21).
    """

    def __init__(self, on: torch.device):
        self.device = on
        self.buffers: dict[torch.dtype, torch.Tensor] = {}
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def take(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors on the host that will be copies of `tensors`. Those of the last time are overwritten."""
        places: list[tuple[torch.dtype, int, int]] = []
        ends: dict[torch.dtype, int] = {}
        for tensor in tensors:
            start, step = ends.get(tensor.dtype, 0), max(ALIGNMENT // tensor.itemsize, 1)
            places.append((tensor.dtype, start, start + tensor.numel()))
            ends[tensor.dtype] = -(-(start + tensor.numel()) // step) * step
        for dtype, length in ends.items():
            if dtype not in self.buffers or len(self.buffers[dtype]) != length:
                self.buffers.pop(dtype, None)  # freed before the new one is made
                # Not written here: the system finds the memory while the copies are made.
                self.buffers[dtype] = torch.empty(length, dtype=dtype, pin_memory=self.device.type != "cpu")
        copies = [
            self.buffers[dtype][start:stop].view(tensor.shape)
            for tensor, (dtype, start, stop) in zip(tensors, places, strict=True)
        ]
        # Detached: what a parameter is now, whatever may take its place.
        self._pending = [(place, tensor.detach()) for place, tensor in zip(copies, tensors, strict=True)]
        return copies

    def fill(self) -> None:
        """Gives the copies their content, which is complete when this returns."""
        pending, self._pending = self._pending, []
        for place, tensor in pending:
            if self.device.type == "cpu" and tensor.is_contiguous():
                # By one thread: torch would take all cores, for which the training's own threads would wait.
                np.copyto(_bytes(place), _bytes(tensor))
            else:
                place.copy_(tensor, non_blocking=True)
        device.synchronize(self.device)

    def fill_in(self, thread: Executor) -> Future | None:
        """`fill`, by a thread: until it is done the tensors may be read, not written. From an accelerator at once, at the
        full speed of its link."""
        if self.device.type == "cpu":
            return thread.submit(self.fill)
        self.fill()
        return None

    def take_tree(self, tree):
        """`take` for nested dicts, lists and tuples: the same, with the copies in place of the tensors."""
        tensors: list[torch.Tensor] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            tensors.append(tensor)
            return tensor

        _replace(tree, note)
        copies = iter(self.take(tensors))
        return _replace(tree, lambda _: next(copies))

    def take_model(self, model: nn.Module) -> nn.Module:
        """`take` for a module: one like it, of the copies. Parameters that are shared stay shared."""
        own = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        copies = self.take(list(own.values()))
        # deepcopy takes what it finds here for copied already.
        memory: dict = {
            key: nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
            for (key, tensor), copied in zip(own.items(), copies, strict=True)
        }
        return copy.deepcopy(model, memory)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(-1).view(torch.uint8).numpy()


def _replace(tree, function: Callable[[torch.Tensor], torch.Tensor]):
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _replace(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_replace(value, function) for value in tree)
    return tree
