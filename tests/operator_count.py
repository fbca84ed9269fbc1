"""Counts what torch's operators are handed: the tests' measure of the work that a training step launches."""

from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that compute nothing: other looks at the same memory, and questions about it.
VIEWS = ("view", "detach", "alias", "slice", "select", "as_strided", "expand", "t", "transpose", "reshape", "squeeze")


class OperatorCount(TorchDispatchMode):
    """Within it, `calls` counts dispatched operators by name and `tensors` all tensors among their arguments.

    Lists count by their length: a fused operator over a hundred tensors is handed a hundred. Views are left out.
    """

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.tensors = 0

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        named = named or {}
        name = operator.overloadpacket.__name__
        if name not in VIEWS:
            self.calls[name] += 1
            leaves = torch.utils._pytree.tree_leaves((arguments, named))
            self.tensors += sum(isinstance(leaf, torch.Tensor) for leaf in leaves)
        return operator(*arguments, **named)


def count(work: Callable[[], object]) -> OperatorCount:
    with OperatorCount() as counter:
        work()
    return counter
