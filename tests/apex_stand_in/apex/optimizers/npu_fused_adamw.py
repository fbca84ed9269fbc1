"""NpuFusedAdamW, with the arguments and the state of Ascend's: `step` is a plain number."""

import torch


class NpuFusedAdamW(torch.optim.Optimizer):
    """AdamW. It works with amp only, at O1 and O2."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False):
        self.is_npu_fused_optimizer = True
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad))

    @torch.no_grad()
    def step(self, closure=None):
        if not hasattr(self, "_amp_stash"):
            raise RuntimeError("apex.optimizers.NpuFusedAdamW should be used with AMP.")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                if not isinstance(state["step"], int):
                    raise TypeError(f"step is {type(state['step']).__name__}: combined parameters would share it")
                state["step"] += 1
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                second = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
                rate = group["lr"] / (1 - beta1 ** state["step"])
                parameter.addcdiv_(state["exp_avg"], second.sqrt() + group["eps"], value=-rate)
