"""What torch finds on this machine, as one line of JSON. The doctor runs this in a process of its own, because torch
may fail to load, hang in a driver, or print."""

import json

from utils import device
from utils.device import torch  # not imported by itself: device tells in one line why it cannot be


def probe() -> dict:
    """Kind, number, names and memory of the devices, what they communicate by, and whether one of them computes."""
    kind = device.accelerator() or "cpu"
    devices = []
    for index in range(device.count()):
        on = torch.device(kind) if kind == "cpu" else torch.device(kind, index)
        devices.append({"name": device.describe(on), **device.memory(on)})
    on = torch.device(kind)
    return {
        "torch": torch.__version__,
        "has_cuda_build": torch.version.cuda is not None,
        "kind": kind,
        "devices": devices,
        "backend": device.backend(on),
        "has_backend": torch.distributed.is_available() and torch.distributed.is_backend_available(device.backend(on)),
        "shows_overflow": device.shows_overflow(on),
        "missing_npu": device.missing_npu(),
        "computes": torch.ones(16, 16, device=on).matmul(torch.ones(16, 16, device=on)).sum().item() == 16**3,
    }


if __name__ == "__main__":
    print(json.dumps(probe()))
