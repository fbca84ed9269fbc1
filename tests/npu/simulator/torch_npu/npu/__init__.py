"""torch.npu of the simulated device."""

import types

import torch

import torch_npu
from torch_npu.npu import random, utils  # noqa: F401
from torch_npu.npu.random import (  # noqa: F401
    get_rng_state,
    get_rng_state_all,
    manual_seed,
    manual_seed_all,
    set_rng_state,
    set_rng_state_all,
)

Event = torch.Event
Stream = torch.Stream
_initialized = True  # torch.utils.checkpoint keeps the random numbers of initialized devices only


def index_of(device: torch.device | str | int | None) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index if device is not None else None
    return index if index is not None else current_device()


def device_count() -> int:
    return torch_npu._device.device_count()


def is_available() -> bool:
    return device_count() > 0


def current_device() -> int:
    return torch_npu._device.current_device()


def set_device(device) -> None:
    torch_npu._device.set_device(index_of(device))


class device:  # noqa: N801
    """Makes another device the current one within a `with` block."""

    def __init__(self, device):
        self.index = index_of(device)

    def __enter__(self):
        self.previous = current_device()
        set_device(self.index)

    def __exit__(self, *_):
        set_device(self.previous)


def synchronize(device=None) -> None:
    torch.accelerator.synchronize(index_of(device))


def empty_cache() -> None:
    pass


def memory_allocated(device=None) -> int:
    return torch_npu._device.memory_allocated(index_of(device))


def max_memory_allocated(device=None) -> int:
    return torch_npu._device.max_memory_allocated(index_of(device))


def reset_peak_memory_stats(device=None) -> None:
    torch_npu._device.reset_peak_memory_stats(index_of(device))


def mem_get_info(device=None) -> tuple[int, int]:
    return torch_npu._device.free_memory(index_of(device)), torch_npu._device.total_memory()


def get_device_name(device=None) -> str:
    return "Simulated NPU"


# Settings: kept, and without effect.
config = types.SimpleNamespace(allow_internal_format=True)
compile_mode = {"jit_compile": True}


def set_compile_mode(jit_compile: bool) -> None:
    compile_mode["jit_compile"] = jit_compile


def is_jit_compile_false() -> bool:
    return not compile_mode["jit_compile"]


def is_bf16_supported() -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16, torch.float32]


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def _lazy_init() -> None:
    pass
