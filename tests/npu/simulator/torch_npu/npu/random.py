"""torch.npu.random of the simulated device: a generator for each device, with the CPU's algorithm."""

import torch

import torch_npu

__all__ = [
    "get_rng_state",
    "get_rng_state_all",
    "manual_seed",
    "manual_seed_all",
    "set_rng_state",
    "set_rng_state_all",
]


def _generator(device) -> torch.Generator:
    return torch_npu._device.default_generator(torch_npu.npu.index_of(device))


def manual_seed(seed: int) -> None:
    _generator(None).manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    for index in range(torch_npu.npu.device_count()):
        _generator(index).manual_seed(int(seed))


def get_rng_state(device="npu") -> torch.Tensor:
    return _generator(device).get_state()


def set_rng_state(state: torch.Tensor, device="npu") -> None:
    _generator(device).set_state(state.cpu())


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state(index) for index in range(torch_npu.npu.device_count())]


def set_rng_state_all(states: list[torch.Tensor]) -> None:
    for index, state in enumerate(states):
        set_rng_state(state, index)
