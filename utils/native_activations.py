"""Activations that transformers spells out in elementwise operators, computed by torch's one kernel of the same function.

The spelt-out tanh form of GELU (arXiv:1606.08415) is eight operators, each of which reads and writes the widest tensors of
the model, and backward keeps most of them. The configuration keeps the name of the activation.
"""

from torch import nn
from transformers import activations

TANH_GELU = (activations.NewGELUActivation, activations.FastGELUActivation, activations.AccurateGELUActivation)


def use_native_activations(model: nn.Module) -> int:
    """Replaces the modules of `model` that are such activations; returns how many there were.

    The functions are equal but for the constants' last digits: 1e-6 in float32. Nothing that is saved changes.
    """
    replaced = 0
    for module in model.modules():
        for name, child in module.named_children():
            native = _native(child)
            if native is not None:
                setattr(module, name, native)
                replaced += 1
    return replaced


def _native(module: nn.Module) -> nn.Module | None:
    act = getattr(module, "act", None)  # the function of those that have two forms
    if type(module) in TANH_GELU or type(module) is activations.GELUTanh and act == module._gelu_tanh_python:
        return nn.GELU(approximate="tanh")
    if type(module) is activations.GELUActivation and act == module._gelu_python:
        return nn.GELU()
    return None
