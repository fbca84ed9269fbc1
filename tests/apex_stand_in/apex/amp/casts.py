"""What amp does to a model (O2, O3) and to torch's functions (O1)."""

import functools
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.nn import functional

HALF_FUNCTIONS = [
    (torch, "addmm"),
    (torch, "matmul"),
    (torch, "bmm"),
    (functional, "linear"),
    (functional, "scaled_dot_product_attention"),
]
FLOAT_FUNCTIONS = [(functional, "layer_norm"), (functional, "softmax"), (functional, "cross_entropy")]


def convert(value, dtype: torch.dtype):
    """Casts the floating tensors in `value`. Every kind of mapping becomes a plain dict."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, Mapping):
        return {key: convert(item, dtype) for key, item in value.items()}
    if isinstance(value, Iterable):
        return type(value)(convert(item, dtype) for item in value)
    return value


def cast_model(model: nn.Module, keep_batchnorm: bool) -> None:
    """Half weights and inputs, float32 outputs; the parameters stay the same objects."""
    for module in model.modules():
        if keep_batchnorm and isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.half()
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.half())
    forward = model.forward

    @functools.wraps(forward)
    def patched(*arguments, **named):
        outputs = forward(*convert(arguments, torch.float16), **convert(named, torch.float16))
        return convert(outputs, torch.float32)

    model.forward = patched


def patch_functions() -> None:
    """Casts the inputs of torch's functions, for the rest of the process."""
    for functions, dtype in ((HALF_FUNCTIONS, torch.float16), (FLOAT_FUNCTIONS, torch.float32)):
        for module, name in functions:
            function = getattr(module, name)
            if not hasattr(function, "before_amp"):
                setattr(module, name, _casting(function, dtype))


def _casting(function: Callable, dtype: torch.dtype) -> Callable:
    @functools.wraps(function)
    def casting(*arguments, **named):
        return function(*convert(arguments, dtype), **convert(named, dtype))

    casting.before_amp = function
    return casting
