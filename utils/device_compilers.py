"""What torch.compile needs on each kind of device. Beside utils/device.py, for which it names devices too."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

# By which inductor builds a CPU's kernels, where $CXX names no other.
CPP = "clang++" if sys.platform == "darwin" else "g++"


def may_pay(on: torch.device) -> bool:
    """Whether a run on this device may compile without having been told to."""
    return on.type == "cuda"


def missing(on: torch.device, backend: str) -> str | None:
    """What a backend lacks here, and the remedy; None if nothing is known to be missing.

    Looks for files only: nothing is imported or built.
    """
    if on.type == "npu" and backend == "npu" and not _has_torchair():
        return (
            "this torch_npu was built without torchair, so its backend npu would compile nothing; install a torch_npu "
            "with torchair"
        )
    if backend != "inductor":
        return None
    if on.type == "npu" and importlib.util.find_spec("triton") is None:
        return "inductor writes its kernels for triton on an NPU; install triton-ascend, or add --torch_compile_backend npu"
    if on.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "inductor writes its kernels for triton; install triton"
    if on.type != "cpu":  # what starts triton's kernels is C, built with Python's headers
        lacking = "a C compiler" if compiler("CC", ["gcc", "clang", "cc"]) is None else None
    else:
        lacking = "a C++ compiler" if compiler("CXX", [CPP]) is None else None
    if lacking is not None:
        return f"inductor needs {lacking}, and there is none; install g++, or set CC and CXX"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "inductor needs Python.h, which is not there; install python3-dev"
    return None


def compiler(variable: str, names: list[str]) -> str | None:
    """The path of the compiler that the environment names, else of the first of `names` that is there; None without."""
    named = os.environ.get(variable)
    return next(filter(None, map(shutil.which, [named] if named else names)), None)


def _has_torchair() -> bool:
    found = importlib.util.find_spec("torch_npu")
    folders = found.submodule_search_locations if found is not None else None
    return folders is not None and Path(folders[0], "dynamo", "torchair").is_dir()
