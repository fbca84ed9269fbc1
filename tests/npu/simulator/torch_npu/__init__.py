"""A stand-in for torch_npu, for tests: importing it gives torch a SIMULATED device "npu". No NPU is involved.

It has what the scripts, transformers and accelerate ask of torch_npu, and nothing else. Environment variables:

NPUSIM_DEVICES             how many devices the machine has (1)
NPUSIM_BUSY                the numbers of those that have no memory left, e.g. 0,1
ASCEND_RT_VISIBLE_DEVICES  which of them this process sees, as on a real machine
"""

import importlib.util
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed

from torch_npu import build

__version__ = "2.13.0+simulated"


def _load_device():
    spec = importlib.util.spec_from_file_location(build.MODULE, build.library())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def native_operators() -> list[str]:
    """The aten operators ("add.Tensor") that torch_npu 2.13.0 has for the NPU itself; others run on its host."""
    lines = (build.SOURCES / "native_operators.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _running_line() -> str:
    """The innermost line that runs outside torch and this package, as file:line."""
    frames = traceback.extract_stack()
    outside = [frame for frame in frames if not {"torch", "torch_npu"} & set(Path(frame.filename).parts)]
    return f"{outside[-1].filename}:{outside[-1].lineno}" if outside else "no Python"


_device = _load_device()
_device.make_native(native_operators())
_device.set_locator(_running_line)
torch.utils.rename_privateuse1_backend("npu")

from torch_npu import npu  # noqa: E402

torch._register_device_module("npu", npu)
sys.modules["torch.npu"] = npu
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def _make_hccl(store, rank, size, timeout):
    return _device.hccl_over(torch.distributed.ProcessGroupGloo(store, rank, size, timeout=timeout))


torch.distributed.Backend.register_backend("hccl", _make_hccl, devices=["npu"])


def npu_fusion_attention(*_, **__):
    """Imported by transformers, called for flash attention alone."""
    raise NotImplementedError("the simulated NPU has no npu_fusion_attention")


def npu_rotary_mul(*_, **__):
    """Imported by transformers, as npu_fusion_attention."""
    raise NotImplementedError("the simulated NPU has no npu_rotary_mul")
