"""A training step and an evaluation step of RoBERTa-base and XLNet-base: predicted rows only, beside all rows.

    python -m benchmarks.predicted_rows [--family roberta|xlnet] [--batch 2] [--length 512] [--rounds 6] [--device cpu]

"stock" is transformers' model and loss on all rows; "ours" is the same model with predicted rows only. Both have torch's
fused AdamW: what combined gradients add is benchmarks.optimizer_phase's to tell. With --bf16 each side has all of its own
recipe: stock autocasts, as transformers' --bf16 does, and ours trains at O2 with combined gradients. They take turns, each
in a process of its own, with equal weights and equal masks.
Reported are medians, the ratio, peak memory of the process (resident; on CUDA the allocator's) and the losses of both.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import RobertaConfig, RobertaForMaskedLM, XLNetConfig, XLNetLMHeadModel

from benchmarks.turns import take_turns
from utils import device
from utils.amp import autocast, cast_model, choose_precision
from utils.combine_grad import CombinedOptimizer
from utils.objectives import drawing, masked, permutation, relative_attention, rows
from utils.packing import Blocks

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def roberta(full: bool, samples: Blocks) -> tuple:
    """(model, samples with hidden tokens, their collator)."""
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **NO_DROPOUT)
    model = RobertaForMaskedLM(config)
    law = masked.MaskingLaw(0.15, 50264, 50265, np.arange(50265) < 5)
    if not full:
        masked.predict_only_masked(model)
    return model, drawing.draw(samples, law, 0), masked.MaskedCollator(law, 1, full_head=full)


def xlnet(full: bool, samples: Blocks) -> tuple:
    """As roberta()."""
    config = XLNetConfig(vocab_size=32000, n_layer=12, d_model=768, n_head=12, d_inner=3072, dropout=0.0)
    model = XLNetLMHeadModel(config)
    law = permutation.PermutationLaw(1 / 6, 5, 6, np.arange(32000) < 9, full)
    if not full:
        relative_attention.predict_only_targets(model)
    relative_attention.follow_half_weights(model)
    return model, drawing.draw(samples, law, 0), permutation.PermutationCollator(5, full_head=full)


def make_side(name: str, family: str, batch: int, length: int, on: str, bf16: bool) -> Callable[[], tuple]:
    """A function that takes one step and returns (training seconds, evaluation seconds, loss, peak bytes)."""
    torch.manual_seed(0)
    full = name == "stock"
    ids = np.random.default_rng(0).integers(10, 30000, (batch * 64, length)).astype(np.int32)
    model, samples, collate = {"roberta": roberta, "xlnet": xlnet}[family](full, Blocks(ids))
    model = model.to(on).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    precision = choose_precision(fp16=False, bf16=bf16, level=("O1" if full else "O2") if bf16 else "O0")
    combined = None
    if precision.casts_model:
        masters = cast_model(model, precision)
        folds = device.fused_adamw_obeys_grad_scale(torch.device(on))
        optimizer = combined = CombinedOptimizer(optimizer, masters, fold_clip=folds)
    taken = 0

    def loss_of(inputs: dict) -> torch.Tensor:
        with autocast(precision, torch.device(on).type):
            if full:
                return model(**inputs).loss
            labels = inputs.pop("labels")
            return rows.loss_sum(model(**inputs).logits, labels) / (labels != rows.IGNORED).sum()

    def step() -> tuple:
        nonlocal taken
        numbers = [(taken * batch + i) % len(samples) for i in range(batch)]
        inputs = {key: value.to(on) for key, value in collate([samples[i] for i in numbers]).items()}
        taken += 1
        with torch.no_grad():
            model.eval()
            start = time.perf_counter()
            loss_of(dict(inputs)).item()
            evaluated = time.perf_counter() - start
        model.train()
        start = time.perf_counter()
        loss = loss_of(inputs)
        loss.backward()
        if combined is not None:
            combined.clip_grad_norm_(1.0)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        value = loss.item()
        device.synchronize(torch.device(on))
        return time.perf_counter() - start, evaluated, value, device.memory(torch.device(on))["peak"]

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["roberta", "xlnet"], default="roberta")
    parser.add_argument("--batch", type=int, help="samples in a batch; default 2 for roberta, 1 for xlnet")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", default=device.accelerator() or "cpu")
    parser.add_argument("--bf16", action="store_true", help="both sides in bfloat16, each in its own way")
    parser.add_argument("--output", help="write the result here, as JSON")
    options = parser.parse_args()
    batch = options.batch or {"roberta": 2, "xlnet": 1}[options.family]
    sides = {
        name: (name, options.family, batch, options.length, options.device, options.bf16) for name in ("ours", "stock")
    }
    measured = take_turns(make_side, sides, options.rounds, warm_up=1)
    medians = {
        name: [statistics.median(values) for values in list(zip(*outcomes, strict=True))[:2]]
        for name, outcomes in measured.items()
    }
    print(f"{options.family} {batch}x{options.length} on {options.device}{' in bfloat16' * options.bf16}")
    print(f"{'':8}{'training':>12}{'ratio':>8}{'evaluation':>14}{'ratio':>8}{'peak memory':>14}{'last loss':>12}")
    result = {}
    for name, (training, evaluation) in medians.items():
        peak, loss = measured[name][-1][3], measured[name][-1][2]
        ratios = [training / medians["ours"][0], evaluation / medians["ours"][1]]
        result[name] = {
            "training_seconds": training,
            "training_ratio": ratios[0],
            "evaluation_seconds": evaluation,
            "evaluation_ratio": ratios[1],
            "peak_bytes": peak,
            "losses": [outcome[2] for outcome in measured[name]],
        }
        print(
            f"{name:8}{training:>10.3f} s{ratios[0]:>8.2f}{evaluation:>12.3f} s{ratios[1]:>8.2f}"
            f"{peak / 2**30:>10.2f} GiB{loss:>12.5f}"
        )
    print(f"times: medians of {options.rounds} rounds in turns; ratio: how many times longer than ours")
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
