"""Gradient clipping and AdamW over GPT-2 124M in float32: combined gradients beside torch's fused and foreach AdamW.

    python -m benchmarks.optimizer_phase [--device cpu] [--rounds 24] [--length 64] [--output result.json]

The sides take turns step by step, each in a process of its own, on equal weights and the same batch. Reported are the medians of two times: the
phase alone (clip, step, zero_grad) and the whole step (forward, backward with its gathering, and the phase), the ratios
to ours, and each side's losses, so that nobody is faster by being wrong.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.turns import take_turns
from utils import device
from utils.combine_grad import CombinedOptimizer

MAX_GRAD_NORM = 1.0


def make_model(on: torch.device) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)).to(on)
    model.config.use_cache = False
    return model.train()


def adamw(model: nn.Module, **kind: bool) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=5e-5, **kind)


def make_side(name: str, on: str, length: int) -> Callable[[], tuple[float, float, float]]:
    """A function that takes a step as Trainer does and returns seconds of the phase, of the whole step, and the loss."""
    ids = torch.randint(0, 50257, (1, length), generator=torch.Generator().manual_seed(0)).to(on)
    model = make_model(ids.device)
    if name == "combined":
        optimizer = CombinedOptimizer(
            adamw(model, fused=True), fold_clip=device.fused_adamw_obeys_grad_scale(ids.device)
        )
    else:
        optimizer = adamw(model, **{name: True})

    def phase() -> None:
        if name == "combined":
            optimizer.clip_grad_norm_(MAX_GRAD_NORM)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        model.zero_grad()

    return lambda: timed_step(model, ids, phase)


def timed_step(model: nn.Module, ids: torch.Tensor, phase: Callable[[], None]) -> tuple[float, float, float]:
    device.synchronize(ids.device)
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    device.synchronize(ids.device)
    between = time.perf_counter()
    phase()
    device.synchronize(ids.device)
    end = time.perf_counter()
    return end - between, end - start, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=device.accelerator() or "cpu")
    parser.add_argument("--rounds", type=int, default=24, help="steps of each side that count")
    parser.add_argument("--length", type=int, default=64, help="tokens in the batch: few, so that the phase weighs")
    parser.add_argument("--output", help="write the result here, as JSON")
    options = parser.parse_args()
    sides = {name: (name, options.device, options.length) for name in ("combined", "fused", "foreach")}
    measured = take_turns(make_side, sides, options.rounds)
    result: dict = {"device": options.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(f"{'':10}{'phase':>12}{'ratio':>8}{'whole step':>14}{'ratio':>8}{'last loss':>12}")
    for name, outcomes in measured.items():
        phases, wholes, losses = zip(*outcomes, strict=True)
        own_phases, own_wholes, _ = zip(*measured["combined"], strict=True)
        result[name] = {
            "phase_seconds": statistics.median(phases),
            "phase_ratio": statistics.median(phases) / statistics.median(own_phases),
            "step_seconds": statistics.median(wholes),
            "step_ratio": statistics.median(wholes) / statistics.median(own_wholes),
            "losses": losses,
        }
        side = result[name]
        print(
            f"{name:10}{side['phase_seconds'] * 1e3:>9.1f} ms{side['phase_ratio']:>8.2f}"
            f"{side['step_seconds'] * 1e3:>11.1f} ms{side['step_ratio']:>8.2f}{losses[-1]:>12.5f}"
        )
    print(f"times: medians of {options.rounds} rounds in turns; ratio: how many times longer than combined")
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
