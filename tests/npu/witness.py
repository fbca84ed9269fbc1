"""Looks on while a script trains, and writes one JSON file for each process:

device: of the training arguments. backend: of the process group, or null.
tensor_devices: all that hold a parameter, a buffer, or a tensor of the optimizer's state of one dimension or more.
tied: the groups of parameters that have more than one name and one memory.
steps: from the first step that is asked for, for each step the requests to the simulated device, as
    [phase, name, tensors, place]: see simulator/recorder.h. A step lasts from the end of the one before to its own end.
    Its phases are "backward", which includes getting the batch and the forward pass, and "optimizer", all that follows.

The hooks are transformers' list of default callbacks and accelerate's `backward`.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import accelerate
import torch
from transformers import TrainerCallback, trainer


def install(folder: str, from_step: int | None) -> None:
    """Lets the Trainer of this process be looked at; must come before it is made."""
    trainer.DEFAULT_CALLBACKS.append(Witness(Path(folder), from_step))
    if from_step is None:
        return
    backward = accelerate.Accelerator.backward

    def backward_then_optimizer(self, loss, **named):
        backward(self, loss, **named)
        _device().mark("optimizer")

    accelerate.Accelerator.backward = backward_then_optimizer


class Witness(TrainerCallback):
    """Writes its report when training ends."""

    def __init__(self, folder: Path, from_step: int | None):
        self.folder = folder
        self.from_step = from_step
        self.steps: list[list] = []

    def on_step_end(self, args, state, control, **_):
        if self.from_step is None or state.global_step < self.from_step - 1:
            return
        if state.global_step >= self.from_step:
            self.steps.append([[r.phase, r.name, r.tensors, r.place] for r in _device().stop_recording()])
        _device().start_recording("backward")

    def on_train_end(self, args, state, control, model=None, optimizer=None, **_):
        if self.from_step is not None:
            _device().stop_recording()
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        report = {
            "device": str(args.device),
            "backend": torch.distributed.get_backend() if distributed else None,
            "tensor_devices": sorted(devices(model, optimizer)),
            "tied": tied(model),
            "steps": self.steps,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"rank{args.process_index}.json").write_text(json.dumps(report))


def _device():
    """The simulated device: what the stand-in for torch_npu has loaded."""
    return sys.modules["torch_npu"]._device


def devices(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    return {str(tensor.device) for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.dim() > 0}


def tied(model: torch.nn.Module) -> list[list[str]]:
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter), parameter.data_ptr()].append(name)
    return [sorted(group) for group in names.values() if len(group) > 1]
