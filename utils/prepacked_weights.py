"""Weights packed once for all products of an evaluation on a CPU.

Each product with a matrix of weights first copies it into the order in which the kernel reads it. In an evaluation weights
do not change, so oneDNN's kernels are given copies in that order, which each layer makes once it has seen enough rows to make
up for it. A tenth to a fifth of the products' time is saved, for memory as large as the weights, which training has left over
in an evaluation, since there are no gradients in it.
This module knows torch only.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

# Instruction sets, by torch's names. Measured on AMD's processors with AVX2; on Intel's with AVX-512 MKL's own products are as
# fast as those of packed weights.
GAINS_ON = ("AVX2",)
LEAST = 2**16  # elements of a weight that is worth it
# To pack a weight takes as long as packed weights save in a product with some 1,200 rows (GPT-2, two cores with AVX2).
ENOUGH_ROWS = 1024


class Prepacked:
    """Packed copies of a layer's weights, which are (outputs, inputs) each."""

    def __init__(self, weights: Callable[[], list[torch.Tensor]]):
        self.weights = weights
        self.rows = 0
        self.copies: list[torch.Tensor] | None = None

    def once_it_pays(self, rows: int) -> list[torch.Tensor] | None:
        """What `multiply` takes; None until the rows of all uses, with those `rows` of this one, are enough."""
        self.rows += rows
        if self.copies is None and self.rows >= ENOUGH_ROWS:
            self.copies = [torch.ops.mkldnn._reorder_linear_weight(weight.detach()) for weight in self.weights()]
        return self.copies


def multiply(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """rows @ weight.T + bias: (..., outputs), float32. rows: (..., inputs), float32. No gradients."""
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


@contextlib.contextmanager
def prepacked(model: nn.Module, transposed: tuple[type[nn.Module], ...] = ()) -> Iterator[int]:
    """Within it `model` is evaluated by packed weights, which must not change; gives the number of such layers.

    transposed: classes of layers that are as nn.Linear, but for a weight of (inputs, outputs). A layer that uses its weight
    in a way of its own is left alone; if it has `parts_to_pack`, which gives a list of weights, it finds these in `prepacked`
    (chunked_head's does).
    """
    with contextlib.ExitStack() as undo:
        count = 0
        for module in model.modules() if _can() else ():
            if type(module) is not nn.Linear and type(module) not in transposed or not _gains(module.weight):
                continue
            if hasattr(module, "parts_to_pack"):
                module.prepacked = Prepacked(module.parts_to_pack)
                undo.callback(setattr, module, "prepacked", None)
            elif "forward" not in vars(module):
                module.forward = _forward(module, type(module) in transposed)
                undo.callback(delattr, module, "forward")
            else:
                continue
            count += 1
        yield count


def _forward(layer: nn.Module, transposed: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    plain = layer.forward
    weight = Prepacked(lambda: [layer.weight.t() if transposed else layer.weight])

    def forward(rows: torch.Tensor) -> torch.Tensor:
        if rows.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.is_grad_enabled():
            return plain(rows)
        copies = weight.once_it_pays(rows.shape[:-1].numel())
        return plain(rows) if copies is None else multiply(rows, copies[0], layer.bias)

    return forward


def _gains(weight: torch.Tensor) -> bool:
    whole = type(weight) in (torch.Tensor, nn.Parameter)  # not a part of a sharded one
    return whole and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= LEAST


def _can() -> bool:
    # The two operators are what torch.compile freezes layers to: there since torch 2.1, with no promise that they stay.
    there = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in GAINS_ON
    return there and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
