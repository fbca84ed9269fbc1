"""What a benchmark says of the machine that it has measured: the processor or device, and the versions, but no host's name."""

import os
import platform
from pathlib import Path

import torch
import transformers

from utils import device


def describe(on: torch.device) -> str:
    """Such as "AMD EPYC, 2 cores, torch 2.13.0, transformers 5.24.0"."""
    name = processor() if on.type == "cpu" else device.describe(on)
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, transformers {transformers.__version__}"


def processor(listed: str = "/proc/cpuinfo") -> str:
    """The CPU's model."""
    try:
        lines = Path(listed).read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
