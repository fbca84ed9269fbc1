"""--ddp_comm_hook: gradients in half precision on the wire, for DistributedDataParallel and for combined gradients."""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel


def bfloat16_hook(state: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """torch's bf16_compress_hook, which torch refuses, by its name, but for NCCL and XCCL: gloo and HCCL reduce it too."""
    return bf16_compress_hook(state, bucket)


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
HOOKS = {"fp16": fp16_compress_hook, "bf16": bfloat16_hook}


class CompressedGradients(DistributedDataParallelKwargs):
    """accelerate's options of DistributedDataParallel, where `comm_hook` is one of HOOKS."""

    def register_comm_hook(self, model: DistributedDataParallel) -> None:
        model.register_comm_hook(None, HOOKS[self.comm_hook])


def set_up(accelerator: Accelerator, hook: str | None) -> None:
    """Lets a model that `accelerator` wraps in DistributedDataParallel compress its gradients; None: leaves them."""
    if hook is not None:
        accelerator.ddp_handler = CompressedGradients(**accelerator.ddp_handler.to_kwargs(), comm_hook=hook)
