"""Run under torchrun by test_data_parallel.py: combined gradients beside DistributedDataParallel, on the same data.

Prints one JSON line from rank 0: for each case the losses of both and the greatest difference between the weights.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import amp
from utils.combine_grad import CombinedOptimizer
from utils.data_parallel import CombinedDataParallel
from utils.gradient_compression import HOOKS


class Uneven(nn.Module):
    """Rank 0 alone uses `one_rank`, and only at times; nobody uses `never`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(dist.get_rank())  # different on purpose: both wrappers must start from rank 0's
        self.always, self.one_rank, self.never = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        x = torch.tanh(self.always(x))
        if dist.get_rank() == 0 and step % 2:
            x = self.one_rank(x)
        return x.square().mean()


class Backwards(nn.Module):
    """Uses its layers in the reverse of their order: what is expected of backward is wrong."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in reversed(self.layers):
            x = torch.tanh(layer(x))
        return x.square().mean()


def compare(build, forward, batches, accumulate: int = 1, hook=None, **reducer_options) -> dict:
    models = {"ddp": build(), "combined": build()}
    optimizers = {name: torch.optim.AdamW(tiny.groups(model), lr=1e-2) for name, model in models.items()}
    optimizers["combined"] = CombinedOptimizer(optimizers["combined"])
    wrapped = {
        "ddp": DistributedDataParallel(models["ddp"], find_unused_parameters=True),
        "combined": CombinedDataParallel(models["combined"], optimizers["combined"], **reducer_options),
    }
    if hook is not None:
        wrapped["ddp"].register_comm_hook(None, hook)
    losses: dict[str, list[float]] = {"ddp": [], "combined": []}
    for name, model in wrapped.items():
        for step, batch in enumerate(batches, start=1):
            last = step % accumulate == 0
            if last:
                loss = forward(model, batch, step)
                loss.backward()
                optimizers[name].step()
                model.zero_grad()
            else:
                with model.no_sync():
                    loss = forward(model, batch, step)
                    loss.backward()
            losses[name].append(loss.item())
    flat = [torch.cat([p.detach().flatten() for p in models[name].parameters()]) for name in wrapped]
    everywhere = [torch.empty_like(flat[1]) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, flat[1])
    return {
        "ddp": losses["ddp"],
        "combined": losses["combined"],
        "difference": (flat[0] - flat[1]).abs().max().item(),
        "ranks_agree": all(torch.equal(everywhere[0], other) for other in everywhere),
        "buckets": len(optimizers["combined"].reducer.buckets),
    }


def in_place_while_backward_runs(wire_dtype: torch.dtype | None = None) -> dict:
    """What is reduced, and when: at each gradient that arrives, how many buckets are on their way."""
    model = Backwards()
    optimizer = CombinedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    wrapped = CombinedDataParallel(model, optimizer, bucket_megabytes=0.01, wire_dtype=wire_dtype)
    reducer = optimizer.reducer
    on_their_way: list[int] = []
    for layer in model.layers:
        layer.weight.register_post_accumulate_grad_hook(
            lambda _: on_their_way.append(sum(bucket.work is not None for bucket in reducer.buckets))
        )
    for _ in range(2):
        optimizer.finish_gradients()
        wrapped(torch.ones(2, 64)).backward()
    storage = optimizer.buffers[0].gradients.untyped_storage().data_ptr()
    outcome = {
        "on_their_way": on_their_way,
        "reduced_in_place": [
            bucket.on_the_wire.untyped_storage().data_ptr() == storage
            and bucket.on_the_wire.data_ptr() == bucket.members[0].gradient.data_ptr()
            for bucket in reducer.buckets
        ],
        "wire_bytes": sum(bucket.on_the_wire.nbytes for bucket in reducer.buckets),
        "gradient_bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }
    optimizer.finish_gradients()
    outcome["read_by_optimizer"] = [
        segment.parameter.grad.untyped_storage().data_ptr() == storage for segment in optimizer.segments
    ]
    try:
        for _ in range(2):
            wrapped(torch.ones(2, 64)).backward()
    except RuntimeError as error:
        outcome["error"] = str(error)
    optimizer.finish_gradients()
    return outcome


def overflow_on_one_rank() -> dict:
    """fp16 masters; rank 1's gradients overflow in the second of three steps: both ranks must skip it."""
    model = nn.Linear(16, 16)
    masters = amp.cast_model(model, amp.choose_precision(True, False, "O2"))
    optimizer = CombinedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), masters)
    wrapped = CombinedDataParallel(model, optimizer)
    scaler = amp.LossScaler("cpu", 64.0)
    trace = []
    for step in range(3):
        factor = float("inf") if step == 1 and dist.get_rank() == 1 else 1.0
        scaler.scale(wrapped(torch.ones(2, 16, dtype=torch.float16)).mean() * factor).backward()
        optimizer.finish_gradients()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        trace.append(optimizer.members[0].target.sum().item())
    both = [None, None]
    dist.all_gather_object(both, trace)
    return {"trace": both}


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    data = [ids[rank::2] for ids in tiny.batches(6)]
    x = [torch.randn(4, 16, generator=torch.Generator().manual_seed(100 * rank + i)) for i in range(6)]

    def language(model, ids, step):
        return model(input_ids=ids, labels=ids).loss

    outcome = {
        "gpt2": compare(tiny.gpt2, language, data),
        "gpt2_small_buckets": compare(tiny.gpt2, language, data, bucket_megabytes=0.01),
        "gpt2_all_used": compare(tiny.gpt2, language, data, find_unused_parameters=False),
        "gpt2_accumulating": compare(tiny.gpt2, language, data, accumulate=3),
        "gpt2_fp16": compare(tiny.gpt2, language, data, hook=HOOKS["fp16"], wire_dtype=torch.float16),
        "gpt2_bf16": compare(tiny.gpt2, language, data, hook=HOOKS["bf16"], wire_dtype=torch.bfloat16),
        "uneven": compare(Uneven, lambda model, batch, step: model(batch, step), x),
        "in_place": in_place_while_backward_runs(),
        "on_a_half_wire": in_place_while_backward_runs(torch.bfloat16),
        "overflow": overflow_on_one_rank(),
    }
    if rank == 0:
        print(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
