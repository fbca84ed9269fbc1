"""Ascend's apex behind the surface of torch's GradScaler: what `--half_precision_backend apex` trains with.

accelerate and Trainer scale the loss, step, and save through `accelerator.scaler`. ApexScaler takes that place:

    scale(loss).backward()      amp.scale_loss around backward; on its way out apex unscales and looks for overflow
    step(optimizer)             the optimizer's step, or the skip that apex has put in its place
    clip_grad_norm_()           clip_optimizer_grad_norm_fused with combined gradients, else over amp.master_params
    state_dict()                amp.state_dict() in GradScaler's words, so that a checkpoint changes backends

The calls are those of NVIDIA's documentation (https://nvidia.github.io/apex/amp.html) and what Ascend added to them
(https://gitee.com/ascend/apex): `combine_grad`, `clip_optimizer_grad_norm_fused` and apex.optimizers.NpuFusedAdamW.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
from torch import nn

from utils.errors import UsageError, one_line

logger = logging.getLogger(__name__)

NATIVE_INSTEAD = "use --half_precision_backend native"


class ApexScaler:
    """apex.amp as a GradScaler.

    level: "O1" or "O2".
    loss_scale: "dynamic" or a fixed factor. apex looks for overflow only if it is dynamic.
    combine_grad: whether apex joins the gradients. torch's AdamW then becomes apex's NpuFusedAdamW.

    Raises UsageError if apex cannot be imported.
    """

    def __init__(self, level: str, loss_scale: str | float, combine_grad: bool):
        try:
            from apex import amp, optimizers
        except Exception as error:  # a build for another torch fails in many ways
            raise UsageError(
                f"--half_precision_backend apex: apex cannot be imported ({one_line(error)}); {NATIVE_INSTEAD}"
            ) from error
        self.amp = amp
        self.fused_adamw = optimizers.NpuFusedAdamW
        self.level = level
        self.loss_scale = loss_scale
        self.combine_grad = combine_grad
        self.skipped_steps = 0  # counted by whoever sees them; kept here so that checkpoints carry it
        self.optimizer: torch.optim.Optimizer  # by initialize
        self.masters: dict[nn.Parameter, torch.Tensor] = {}
        self._skip: Callable | None = None

    def initialize(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Hands both to amp.initialize, which changes the model in place; returns the optimizer to train with.

        Raises UsageError if apex refuses them: a model that is not float32, or not on an NPU.
        """
        sources = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        float32 = [parameter.detach().clone() for parameter in sources] if self.level == "O2" else []
        if self.combine_grad and type(optimizer) is torch.optim.AdamW:
            optimizer = self._fuse(optimizer)
        try:
            initialized, self.optimizer = self.amp.initialize(
                model,
                optimizer,
                opt_level=self.level,
                loss_scale=self.loss_scale,
                combine_grad=self.combine_grad,
                verbosity=0,
            )
        except (RuntimeError, TypeError) as error:
            raise UsageError(f"--half_precision_backend apex: {one_line(error)}; {NATIVE_INSTEAD}") from error
        assert initialized is model
        # apex makes its masters late, from half weights, and casts moments to half that are loaded before. zero_grad
        # makes them now, and they start from what was float32.
        self.optimizer.zero_grad()
        owned = list(self.amp.master_params(self.optimizer))
        for master, weights in zip(owned, float32, strict=False):
            master.data.copy_(weights)
        self.masters = {source: master for source, master in zip(sources, owned, strict=True) if master is not source}
        logger.info("mixed precision %s by Ascend's apex, with %s", self.level, type(self.optimizer).__name__)
        return self.optimizer

    def _fuse(self, optimizer: torch.optim.AdamW) -> torch.optim.Optimizer:
        names = ("lr", "betas", "eps", "weight_decay", "amsgrad")
        # The groups keep what only torch's AdamW knows, so that it can load the checkpoint.
        groups = [dict(group) for group in optimizer.param_groups]
        fused = self.fused_adamw(groups, **{name: optimizer.defaults[name] for name in names})
        # It counts steps in plain numbers: as tensors, parameters would share one count and add to it in turn.
        fused.register_load_state_dict_pre_hook(_convert_steps(int))
        fused.register_state_dict_post_hook(_convert_steps(lambda step: torch.tensor(float(step))))
        return fused

    def route_zero_grad(self, model: nn.Module) -> None:
        """Makes `model.zero_grad()` the optimizer's: the model's own takes the gradients out of apex's buffers."""
        model.zero_grad = lambda set_to_none=True: self.optimizer.zero_grad()

    # ---- gradients ----
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scales the gradients so that their 2-norm is at most `max_norm`; returns the norm from before."""
        if self.combine_grad:
            return self.optimizer.clip_optimizer_grad_norm_fused(max_norm)
        return nn.utils.clip_grad_norm_(list(self.amp.master_params(self.optimizer)), max_norm)

    def grad_norm(self) -> torch.Tensor:
        """The 2-norm of all gradients, float32, on the device."""
        gradients = [p.grad for p in self.amp.master_params(self.optimizer) if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    # ---- GradScaler ----
    def scale(self, loss: torch.Tensor) -> "_ScaledLoss":
        return _ScaledLoss(self, loss)

    def backward(self, loss: torch.Tensor, **named) -> None:
        """Backward through the scaled loss. Each micro-batch is unscaled on its own: NPUs that cannot show infinity
        keep an overflow flag, which the next micro-batch would clear."""
        step = self.optimizer.step
        with self.amp.scale_loss(loss, self.optimizer) as scaled:
            scaled.backward(**named)
        if self.optimizer.step != step:
            # After an overflow apex has replaced the step. accelerate is about to replace it too, so it is kept here.
            self._skip = self.optimizer.step

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing: apex has done it after backward."""

    def step(self, optimizer: torch.optim.Optimizer, closure=None) -> None:
        assert closure is None, "apex takes no closure"
        if self._skip is None:
            optimizer.step()
            return
        skip, self._skip = self._skip, None
        skip()

    def update(self, new_scale=None) -> None:
        """Nothing: apex has done it after backward."""

    def get_scale(self) -> float:
        return float(self.amp.state_dict()["loss_scaler0"]["loss_scale"])

    def is_enabled(self) -> bool:
        return True

    def state_dict(self) -> dict:
        return {
            "scale": self.get_scale(),
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": int(self.amp.state_dict()["loss_scaler0"]["unskipped"]),
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        state = {"loss_scale": state_dict["scale"], "unskipped": state_dict["_growth_tracker"]}
        self.amp.load_state_dict({"loss_scaler0": state})
        self.skipped_steps = state_dict.get("skipped_steps", 0)

    # ---- weights ----
    @contextlib.contextmanager
    def float32_weights(self, model: nn.Module) -> Iterator[None]:
        """The model's parameters are their masters for the while: to save them, or to load some."""
        # The parameters change places, their `.data` does not: a change of type would detach DDP's hooks from them.
        places = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter in self.masters
        ]
        for module, name, parameter in places:
            module._parameters[name] = self.masters[parameter]
        try:
            yield
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter
                parameter.data.copy_(self.masters[parameter].data)


class _ScaledLoss:
    """What GradScaler.scale returns, as far as accelerate uses it."""

    def __init__(self, scaler: ApexScaler, loss: torch.Tensor):
        self.scaler = scaler
        self.loss = loss

    def backward(self, **named) -> None:
        self.scaler.backward(self.loss, **named)


def _convert_steps(convert: Callable) -> Callable[[torch.optim.Optimizer, dict], dict]:
    """A hook for an optimizer's state_dict that converts the step counts in it."""

    def hook(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
        state = {
            index: {**values, "step": convert(values["step"])} if "step" in values else values
            for index, values in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    return hook
