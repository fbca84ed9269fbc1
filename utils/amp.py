"""Mixed precision by apex's optimization levels, in plain torch.

The levels are those of apex.amp (https://nvidia.github.io/apex/amp.html#opt-levels):

====  ==================  =====================  ===============
 ..   model weights       forward runs under     master weights
====  ==================  =====================  ===============
 O0   float32             nothing                none
 O1   float32             torch.autocast         none
 O2   half, norms fp32    nothing                float32
 O3   half                nothing                none
====  ==================  =====================  ===============

"Half" is float16 or bfloat16. This module knows torch only.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

LEVELS = ("O0", "O1", "O2", "O3")


@dataclass(frozen=True)
class Precision:
    """How a run computes.

    level: one of LEVELS.
    dtype: torch.float16 or torch.bfloat16; torch.float32 at O0.
    loss_scale: "dynamic", a fixed factor, or None for no scaling.
    """

    level: str
    dtype: torch.dtype
    loss_scale: str | float | None

    @property
    def casts_model(self) -> bool:
        return self.level in ("O2", "O3")

    @property
    def has_master_weights(self) -> bool:
        return self.level == "O2"


def choose_precision(fp16: bool, bf16: bool, level: str | None = None, loss_scale: str | None = None) -> Precision:
    """The precision that these flags ask for.

    Without a half type the level is O0; with one and no level it is O1, as in transformers 4. float16 scales its loss
    dynamically unless told otherwise, bfloat16 not at all (it has float32's exponent), O0 never.

    Raises ValueError, naming flag, value and remedy, for flags that contradict each other.
    """
    if fp16 and bf16:
        raise ValueError("--fp16 and --bf16 contradict each other: give one of them")
    if level is not None and level not in LEVELS:
        raise ValueError(f"--fp16_opt_level {level}: unknown level, choose one of {', '.join(LEVELS)}")
    half = fp16 or bf16
    if not half and level not in (None, "O0"):
        raise ValueError(f"--fp16_opt_level {level} needs a half type: add --fp16 or --bf16, or choose O0")
    level = level or ("O1" if half else "O0")
    if level == "O0":
        if loss_scale is not None:
            raise ValueError(
                f"--loss_scale {loss_scale}: float32 training (level O0) scales no loss; "
                "add --fp16 or --bf16 with --fp16_opt_level O1, O2 or O3, or leave --loss_scale out"
            )
        return Precision("O0", torch.float32, None)
    default = "dynamic" if fp16 else None
    scale = default if loss_scale is None else _parse_loss_scale(loss_scale)
    return Precision(level, torch.float16 if fp16 else torch.bfloat16, scale)


def _parse_loss_scale(text: str) -> str | float:
    if text == "dynamic":
        return text
    try:
        scale = float(text)
    except ValueError:
        scale = float("nan")
    if not 0 < scale < float("inf"):
        raise ValueError(f"--loss_scale {text}: expected 'dynamic' or a positive number such as 128 or 65536")
    return scale


def autocast(precision: Precision, device_type: str) -> contextlib.AbstractContextManager:
    """The context of a forward pass: torch.autocast at O1, on every device; nothing at the other levels.

    accelerate enables autocast on accelerators alone, so that fp16 on a CPU trains in float32 without a word.
    """
    if precision.level != "O1":
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=precision.dtype)


def cast_model(model: nn.Module, precision: Precision) -> dict[nn.Parameter, nn.Parameter]:
    """Casts the parameters of `model` in place, as O2 or O3 has it, and returns {half parameter: float32 master}.

    O2 keeps the parameters of normalisation layers in float32 and gives every other trainable parameter a master. O3
    casts all of them and has no masters. A buffer follows if half holds its values exactly: GPT's causal mask does, and
    in float32 it would draw all that it meets along; rotary frequencies do not. Tied parameters stay tied.
    """
    assert precision.casts_model, precision
    masters: dict[nn.Parameter, nn.Parameter] = {}
    kept = set()
    if precision.level == "O2":
        for module in filter(is_normalisation, model.modules()):
            kept.update(module.parameters(recurse=False))
            _compute_in_float32(module, precision.dtype)
    for parameter in model.parameters():
        if parameter in kept or not parameter.is_floating_point():
            continue
        if precision.has_master_weights and parameter.requires_grad:
            masters[parameter] = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
        parameter.data = parameter.data.to(precision.dtype)
    for module in model.modules():
        if is_normalisation(module):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            half = buffer.to(precision.dtype)
            if buffer.is_floating_point() and torch.equal(half.to(buffer.dtype), buffer):
                setattr(module, name, half)
    return masters


def is_normalisation(module: nn.Module) -> bool:
    """Whether `module` is a normalisation layer: torch's own, or one of transformers' (LlamaRMSNorm, T5LayerNorm)."""
    return type(module).__name__.endswith(("Norm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"))


def _compute_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    # Kernels disagree on half input with float32 weights: CUDA's layer_norm refuses it. Casting at both ends works
    # everywhere, and the mean and variance are then taken in float32.
    module.float()
    module.register_forward_pre_hook(lambda _, inputs: tuple(_cast(value, torch.float32) for value in inputs))
    module.register_forward_hook(lambda _, inputs, output: _cast(output, dtype))


def _cast(value, dtype: torch.dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class LossScaler(torch.amp.GradScaler):
    """torch's GradScaler with a fixed scale as a choice, and half gradients allowed (O3 has no float32 masters).

    A dynamic scale starts at 2**16, halves when a gradient overflows and doubles after `growth_interval` steps without
    overflow. A fixed scale never moves, but an overflowed step is skipped just the same: apex did not check there.
    """

    def __init__(self, device_type: str, loss_scale: str | float, growth_interval: int = 2000):
        self.fixed_scale = None if loss_scale == "dynamic" else float(loss_scale)
        self.skipped_steps = 0  # counted by whoever sees them; kept here so that checkpoints carry it
        super().__init__(device_type, init_scale=self.fixed_scale or 2.0**16, growth_interval=growth_interval)

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        super().update(self.fixed_scale if new_scale is None else new_scale)

    def forget_step(self) -> None:
        """Makes ready for a new step where one was broken off between unscaling and `update()`."""
        self._per_optimizer_states.clear()

    def state_dict(self) -> dict:
        return {**super().state_dict(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.skipped_steps = state_dict.get("skipped_steps", 0)

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


def read_overflow_on_the_host(optimizer: torch.optim.Optimizer) -> None:
    """Makes GradScaler skip `optimizer.step()` itself when a gradient overflowed.

    torch marks its fused optimizers `_step_supports_amp_scaling`: GradScaler then calls `step()` always and the kernel
    skips the update, which nobody outside can see. accelerate would count the step as done and move the learning rate.
    """
    optimizer._step_supports_amp_scaling = False
