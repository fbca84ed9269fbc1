"""Counts what a training step reads from its tensors on the host: each read would wait for a device."""

import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

# Operators whose result, or its shape, the host must know, and methods that copy a tensor to the host in other ways.
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal"}
METHODS = {"tolist", "numpy", "cpu", "__array__", "storage", "untyped_storage"}
OURS = ("/utils/", "/transformers/", "/accelerate/", "/tests/")


def place() -> str:
    """The innermost line of the project, transformers or accelerate: "file.py:function"."""
    frames = [frame for frame in traceback.extract_stack() if any(part in frame.filename for part in OURS)]
    frame = next(f for f in reversed(frames) if "/torch/" not in f.filename and f.filename != __file__)
    return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.name}"


class HostReads(TorchDispatchMode):
    """Within it, `places` collects where operators are launched that read."""

    def __init__(self):
        super().__init__()
        self.places: list[str] = []
        self.operators = 0

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        self.operators += 1
        name = operator.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in arguments[1]
        )
        if name in READS or by_mask:
            self.places.append(f"{name} at {place()}")
        return operator(*arguments, **(named or {}))


class MethodReads(TorchFunctionMode):
    """Within it, `places` collects where a method of a tensor is called that copies it to the host."""

    def __init__(self, places: list[str]):
        super().__init__()
        self.places = places

    def __torch_function__(self, function, types, arguments=(), named=None):
        if getattr(function, "__name__", "") in METHODS:
            self.places.append(f"{function.__name__} at {place()}")
        return function(*arguments, **(named or {}))


class Watch(TrainerCallback):
    """Looks on from the end of one step to that of another, between which nothing is logged."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last
        self.reads = HostReads()
        self.methods = MethodReads(self.reads.places)

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.first:
            self.reads.__enter__()
            self.methods.__enter__()
        elif state.global_step == self.last:
            self.methods.__exit__(None, None, None)
            self.reads.__exit__(None, None, None)
