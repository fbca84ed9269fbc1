"""What a run ran on: versions, device, machine; and the command that repeats it."""

import os
import platform
import shlex
import sys
from collections.abc import Sequence

import torch

from utils import cann, device

PACKAGES = (
    "torch",
    "torch_npu",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "apex",
)
SECRETS = ("--token", "--hub_token", "--push_to_hub_token", "--use_auth_token")


def describe(on: torch.device, processes: int) -> dict[str, str]:
    """{what: its name or version}, of the device, the machine and the packages that are installed."""
    found = {
        "device": f"{processes} × {device.describe(on)}" if processes > 1 else device.describe(on),
        "device memory" if on.type != "cpu" else "memory": f"{device.memory(on)['total'] / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores",
        "Python": platform.python_version(),
    }
    if processes > 1:
        found["exchange"] = device.backend(on)
    folder = cann.home()
    if on.type == "npu" and folder is not None:
        found["CANN"] = cann.version(folder) or "unknown"
        found["driver"] = cann.driver_version() or "unknown"
    if on.type == "cuda":
        found["CUDA"] = torch.version.cuda or "unknown"
    found |= {package: version for package in PACKAGES if (version := cann.version_of(package))}
    return found


def command(script: str, argv: Sequence[str], processes: int, local_processes: int) -> str:
    """The command line that started the run, without tokens for the hub.

    processes: of all nodes; local_processes: of this one.
    """
    words = ["python", script]
    if processes > 1:
        nodes = max(1, processes // max(1, local_processes))
        words = ["torchrun", f"--nproc_per_node={local_processes}", *([f"--nnodes={nodes}"] * (nodes > 1)), script]
    return shlex.join(words + without_secrets(argv))


def without_secrets(argv: Sequence[str] = ()) -> list[str]:
    """The words of a command line, those left out that tell a token."""
    kept: list[str] = []
    hides_next = False
    for word in argv:
        flag, is_assignment, _ = word.partition("=")
        if flag.replace("-", "_").replace("__", "--", 1) in SECRETS:
            hides_next = not is_assignment
            continue
        if not (hides_next and not word.startswith("-")):
            kept.append(word)
        hides_next = False
    return kept


def script_words() -> tuple[str, list[str]]:
    """The script that runs, and its words."""
    return os.path.basename(sys.argv[0]), sys.argv[1:]
