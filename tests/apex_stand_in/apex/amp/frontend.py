"""amp.initialize and its neighbours."""

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import nn

from apex.amp.call_log import note
from apex.amp.casts import cast_model, patch_functions
from apex.amp.process_optimizer import process_optimizer
from apex.amp.state import STATE, LossScale


def initialize(
    models,
    optimizers=None,
    enabled=True,
    opt_level="O1",
    cast_model_type=None,
    patch_torch_functions=None,
    keep_batchnorm_fp32=None,
    master_weights=None,
    loss_scale=None,
    cast_model_outputs=None,
    num_losses=1,
    verbosity=1,
    combine_grad=None,
):
    """Changes a model and its optimizer in place, as the level has it, and returns both.

    Raises RuntimeError for an unknown level, for a model that is wrapped or not float32, and for combine_grad or a
    fused optimizer beyond O1 and O2.
    """
    model, optimizer = models, optimizers
    note(
        "initialize",
        opt_level=opt_level,
        loss_scale=loss_scale,
        combine_grad=combine_grad,
        optimizer=type(optimizer).__name__,
    )
    if opt_level not in ("O0", "O1", "O2", "O3"):
        raise RuntimeError(f"Unexpected optimization level {opt_level}. Options are 'O0', 'O1', 'O2', 'O3'.")
    if combine_grad and opt_level not in ("O1", "O2"):
        raise RuntimeError("combine_grad=True should only be set by selecting opt_level='O1' or opt_level='O2'.")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise RuntimeError("Incoming model is an instance of DistributedDataParallel; amp.initialize must come first.")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise RuntimeError(f"Found param {name} with type {parameter.type()}, expected FloatTensor.")
    if getattr(optimizer, "is_npu_fused_optimizer", False) and opt_level not in ("O1", "O2"):
        raise RuntimeError("npu fused optimizer can only be used when opt_level='O1' or opt_level='O2'")
    default_scale = {"O0": 1.0, "O1": "dynamic", "O2": "dynamic", "O3": 1.0}[opt_level]
    STATE.scale = LossScale(default_scale if loss_scale is None else loss_scale)
    STATE.backward_passes = 0
    if opt_level in ("O2", "O3"):
        cast_model(model, keep_batchnorm=opt_level == "O2")
    if opt_level == "O1":
        patch_functions()
    process_optimizer(optimizer, master_weights=opt_level == "O2", combine_grad=bool(combine_grad))
    return model, optimizer


def master_params(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """The parameters that the optimizer owns."""
    for group in optimizer.param_groups:
        yield from group["params"]


def state_dict() -> OrderedDict:
    note("state_dict")
    return OrderedDict(loss_scaler0={"loss_scale": STATE.scale.value, "unskipped": STATE.scale.unskipped})


def load_state_dict(state_dict: dict) -> None:
    """Raises RuntimeError for a key that is no loss scaler's."""
    note("load_state_dict", state=state_dict)
    if set(state_dict) != {"loss_scaler0"}:
        raise RuntimeError(f"Error(s) in loading state_dict. Unexpected key(s) in state_dict: {list(state_dict)}")
    STATE.scale.value = state_dict["loss_scaler0"]["loss_scale"]
    STATE.scale.unskipped = state_dict["loss_scaler0"]["unskipped"]
