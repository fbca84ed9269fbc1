"""What amp does to an optimizer: float32 masters, combined gradients, and methods of its own."""

from types import MethodType

import torch

from apex.amp.call_log import note


class Stash:
    """What amp knows of an optimizer.

    pairs: (the model's parameter, the one that the optimizer updates); the same one without a master.
    waiting: {model's parameter: float32 gradient of earlier micro-batches}.
    buffer, views: the combined gradients in float32, and each pair's part of them; None until the first backward pass.
    """

    def __init__(self, master_weights: bool, combine_grad: bool):
        self.master_weights = master_weights
        self.combine_grad = combine_grad
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.buffer: torch.Tensor | None = None
        self.views: list[torch.Tensor] = []
        self.model_views: list[torch.Tensor] = []
        self.skips = False


def process_optimizer(optimizer: torch.optim.Optimizer, master_weights: bool, combine_grad: bool) -> None:
    if hasattr(optimizer, "_amp_stash"):
        raise RuntimeError("A given optimizer should only be passed through amp.initialize once.")
    optimizer._amp_stash = Stash(master_weights, combine_grad)
    optimizer.clip_optimizer_grad_norm_fused = MethodType(clip_optimizer_grad_norm_fused, optimizer)
    step, zero_grad = optimizer.step, optimizer.zero_grad

    def step_with_masters(self, closure=None):
        note("step")
        result = step()
        if master_weights:
            for parameter, master in self._amp_stash.pairs:
                parameter.data.copy_(master.data)
        clear_masters(self)
        return result

    def new_zero_grad(self):
        note("zero_grad")
        make_masters(self)
        if self._amp_stash.buffer is None:
            zero_grad()
            for parameter, _ in self._amp_stash.pairs:
                parameter.grad = None
        else:
            check_views(self)
            self._amp_stash.buffer.zero_()
            for view in self._amp_stash.model_views:
                view.zero_()

    optimizer.step = MethodType(step_with_masters, optimizer)
    optimizer.zero_grad = MethodType(new_zero_grad, optimizer)


def make_masters(optimizer: torch.optim.Optimizer) -> None:
    """Once, late: the optimizer's half parameters give way to float32 copies."""
    stash = optimizer._amp_stash
    if stash.pairs:
        return
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            master = parameter
            if stash.master_weights and parameter.dtype == torch.float16:
                master = parameter.detach().clone().float().requires_grad_()
                group["params"][place] = master
                if parameter in optimizer.state:
                    optimizer.state[master] = optimizer.state.pop(parameter)
            stash.pairs.append((parameter, master))


def combine(optimizer: torch.optim.Optimizer) -> None:
    """Once, after the first backward pass: gradients move into flat buffers. Parameters without one are left out."""
    stash = optimizer._amp_stash
    stash.pairs = [pair for pair in stash.pairs if pair[0].grad is not None]
    parameters = [parameter for parameter, _ in stash.pairs]
    for dtype in sorted({parameter.dtype for parameter in parameters}, key=str):
        members = [parameter for parameter in parameters if parameter.dtype == dtype]
        flat = torch.cat([parameter.grad.flatten() for parameter in members])
        for parameter, view in zip(members, flat.split([p.numel() for p in members]), strict=True):
            parameter.grad = view.view_as(parameter)
    stash.model_views = [parameter.grad for parameter in parameters]
    stash.buffer = torch.zeros(sum(p.numel() for p in parameters))
    sizes = [parameter.numel() for parameter in parameters]
    stash.views = [
        view.view_as(parameter) for view, parameter in zip(stash.buffer.split(sizes), parameters, strict=True)
    ]
    note("combine", elements=stash.buffer.numel())


def check_views(optimizer: torch.optim.Optimizer) -> None:
    """Raises RuntimeError if gradients are no longer in the buffers: Ascend's apex would train on without them."""
    stash = optimizer._amp_stash
    for (parameter, _), view in zip(stash.pairs, stash.model_views, strict=True):
        if parameter.grad is None or parameter.grad.data_ptr() != view.data_ptr():
            raise RuntimeError("the combined gradients were dropped: set_to_none must be False")


def prepare_backward(optimizer: torch.optim.Optimizer) -> None:
    """Model gradients start from zero; what earlier micro-batches left is in the masters' or waits beside them."""
    make_masters(optimizer)
    stash = optimizer._amp_stash
    if stash.buffer is not None:
        check_views(optimizer)
        for view in stash.model_views:
            view.zero_()
        return
    for parameter, master in stash.pairs:
        if parameter is master:
            parameter._amp_waiting = parameter.grad
        parameter.grad = None


def post_backward(optimizer: torch.optim.Optimizer, scale: float) -> bool:
    """Unscales into the float32 gradients of what the optimizer owns; returns whether one was not finite."""
    stash = optimizer._amp_stash
    if stash.combine_grad and stash.buffer is None:
        combine(optimizer)
    overflow = False
    for place, (parameter, master) in enumerate(stash.pairs):
        if parameter.grad is None:
            continue
        gradient = parameter.grad.float() / scale
        overflow |= not bool(gradient.isfinite().all())
        if stash.buffer is not None:
            stash.views[place].add_(gradient)
            master.grad = stash.views[place] if parameter is not master else parameter.grad
            if parameter is master:  # combined in place: the sum so far
                parameter.grad.copy_(stash.views[place])
        elif parameter is master:
            waiting = getattr(parameter, "_amp_waiting", None)
            parameter.grad = gradient if waiting is None else gradient + waiting
        else:
            master.grad = gradient if master.grad is None else master.grad + gradient
    return overflow


def clear_masters(optimizer: torch.optim.Optimizer) -> None:
    stash = optimizer._amp_stash
    if stash.buffer is not None:
        stash.buffer.zero_()
        return
    for parameter, master in stash.pairs:
        if parameter is not master:
            master.grad = None


def clip_optimizer_grad_norm_fused(self, max_norm, norm_type=2):
    """Clips the combined gradients in one go; returns the norm from before. RuntimeError without combine_grad."""
    stash = self._amp_stash
    if stash.buffer is None:
        raise RuntimeError("To get combined grads, please set combine_grad=True, after the backward phase.")
    check_views(self)
    norm = stash.buffer.norm(norm_type)
    note("clip_optimizer_grad_norm_fused", max_norm=max_norm, norm=norm.item())
    factor = max_norm / (norm + 1e-6)
    if factor < 1:
        stash.buffer.mul_(factor)
        for (parameter, master), view in zip(stash.pairs, stash.views, strict=True):
            if parameter is master:
                parameter.grad.copy_(view)
    return norm
