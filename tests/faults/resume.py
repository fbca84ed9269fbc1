"""Trains tiny models, goes on from one of their checkpoints in a fresh trainer, and tells what is not the same.

Run under torchrun with names of CASES it does so on several ranks, and rank 0 prints one JSON line {case: differences}.
"""

import json
import math
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tiny
import tiny_xlnet
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, set_seed

from utils import elastic
from utils.objectives import causal, dynamic_masking, masked, permutation, predicted_rows, relative_attention
from utils.packing import Blocks
from utils.trainer import LanguageModelingTrainer
from utils.training_arguments import LanguageModelingArguments

BLOCKS = 27  # on 1 rank 7 batches of 4, the last one short: with 3 batches an update the last of an epoch has one
O2 = {"fp16": True, "fp16_opt_level": "O2"}
# Options, and the steps to go on from.
CASES = {
    "O0": {},
    "O0, accumulating, workers": {"gradient_accumulation_steps": 3, "dataloader_num_workers": 2},
    "O0, combined, accumulating": {"use_combine_grad": True, "gradient_accumulation_steps": 3},
    "O0, combined, workers": {"use_combine_grad": True, "dataloader_num_workers": 2},
    "O1": {"bf16": True, "fp16_opt_level": "O1"},
    "O2": O2,
    "O2, combined": {**O2, "use_combine_grad": True},
    "O2, combined, accumulating, workers": {
        **O2, "use_combine_grad": True, "gradient_accumulation_steps": 3, "dataloader_num_workers": 2,
    },
    "masked": {"objective": "masked", "use_combine_grad": True},
    "masked, accumulating, workers": {
        "objective": "masked", "gradient_accumulation_steps": 3, "dataloader_num_workers": 2,
    },
    "permuted": {"objective": "permuted", "use_combine_grad": True},
    "permuted, O2, accumulating, workers": {
        **O2, "objective": "permuted", "gradient_accumulation_steps": 3, "dataloader_num_workers": 2,
    },
    "by length": {"train_sampling_strategy": "group_by_length"},
    # So fast that the best is not the last.
    "best model": {
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_steps": 1, "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
    },
}  # fmt: skip
# What says how long something took, where it is, or how often it is saved.
TIMES = (
    "save_steps",
    "runtime",
    "per_second",
    "fps",
    "mfu",
    "data_wait",
    "optimizer_share",
    "peak_",
    "best_model_checkpoint",
)


def bert(dropout: float) -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForMaskedLM(BertConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=32, **sizes, **drop))


def blocks(count: int, seed: int) -> Blocks:
    return Blocks(torch.cat(tiny.batches(-(-count // 4), seed=seed)).numpy().astype(np.int32)[:count])


def trainer_in(
    folder: Path, objective: str = "causal", callbacks=None, resumed: Path | None = None, **options
) -> LanguageModelingTrainer:
    """A trainer with a fresh tiny model, with dropout; saves at each step."""
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 3e-3, "num_train_epochs": 2,
        "logging_steps": 4, "save_steps": 1, "eval_steps": 2, "eval_strategy": "steps", "disable_tqdm": True,
        "use_cpu": True, "seed": 7, "report_to": "none",
    }  # fmt: skip
    args = LanguageModelingArguments(**{**defaults, **options})
    elastic.keep_global_batch(args, resumed)
    set_seed(args.seed)
    train, test = blocks(BLOCKS, 1), blocks(10, 2)
    named = {"data_collator": causal.collate, "token_sums": causal.token_sums}
    model = tiny.gpt2(dropout=0.1)
    if objective == "masked":
        law = masked.MaskingLaw(0.3, 4, tiny.VOCABULARY, np.arange(tiny.VOCABULARY) < 5)
        train, test = (dynamic_masking.draw(samples, law, args.seed) for samples in (train, test))
        model = bert(0.1)
        masked.predict_only_masked(model)
        named = {
            "data_collator": masked.MaskedCollator(law, 0),
            "loss_sum": predicted_rows.loss_sum,
            "token_sums": predicted_rows.token_sums,
        }
    if objective == "permuted":
        law = permutation.PermutationLaw(0.3, 4, 4, np.arange(tiny.VOCABULARY) < 5)
        train, test = (dynamic_masking.draw(samples, law, args.seed) for samples in (train, test))
        model = tiny_xlnet.xlnet(dropout=0.1)
        relative_attention.follow_half_weights(model)
        relative_attention.predict_only_targets(model)
        named = {
            "data_collator": permutation.PermutationCollator(0),
            "loss_sum": predicted_rows.loss_sum,
            "token_sums": predicted_rows.token_sums,
        }
    return LanguageModelingTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=test, callbacks=callbacks, **named
    )


class Stopped(Exception):
    """The run was stopped from outside."""


def state_of(checkpoint: Path) -> dict:
    """{name: value} of everything in a checkpoint that training reads."""
    found = {f"weights {name}": value for name, value in load_file(checkpoint / "model.safetensors").items()}
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"):
        if (checkpoint / name).exists():
            found |= _flat(torch.load(checkpoint / name, weights_only=False), name)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return found | _flat(_without_times(state), "trainer_state")


def _flat(tree, name: str) -> dict:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{name} {key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for number, value in enumerate(tree) for k, v in _flat(value, f"{name} {number}").items()}
    return {name: tree}


def _without_times(tree):
    if isinstance(tree, dict):
        return {k: _without_times(v) for k, v in tree.items() if not any(word in k for word in TIMES)}
    return [_without_times(value) for value in tree] if isinstance(tree, list) else tree


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other


def differences(whole: dict, resumed: dict) -> list[str]:
    missing = [f"{name}: only on one side" for name in sorted(whole.keys() ^ resumed.keys())]
    return missing + [name for name in whole if name in resumed and not same(whole[name], resumed[name])]


def outcome(trainer: LanguageModelingTrainer, metrics: dict) -> dict:
    """What a finished training leaves, times aside."""
    found = {f"final {name}": value.detach().clone() for name, value in trainer.model.state_dict().items()}
    found |= _flat(_without_times(metrics), "metrics") | _flat(_without_times(trainer.state.log_history), "log")
    return found | state_of(Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}")


def train(folder: Path, checkpoint: Path | None = None, **options) -> dict:
    trainer = trainer_in(folder, resumed=checkpoint, **options)
    metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    return outcome(trainer, metrics)


def steps_to_resume_from(total: int) -> list[int]:
    """Of two epochs: the first, between two logs; the end of an epoch; the first of the next; the last but one."""
    return sorted({1, total // 2, total // 2 + 1, total - 1})


def compare(folder: Path, options: dict) -> dict[int, list[str]]:
    """{step: what differs from the run that was never stopped, when it is gone on with from there}."""
    whole = train(folder / "whole", **options)
    total = max(int(entry.name.split("-")[1]) for entry in (folder / "whole").glob("checkpoint-*"))
    found = {}
    once = {} if "load_best_model_at_end" in options else {"save_steps": total}  # saving is to change nothing either
    for step in steps_to_resume_from(total):
        random.seed(step), np.random.seed(step), torch.manual_seed(step)  # a new process has other numbers
        resumed = train(folder / f"from {step}", folder / "whole" / f"checkpoint-{step}", **{**options, **once})
        found[step] = differences(whole, resumed)
    return found


def memory_folder() -> Path:
    """A folder in memory, where there is one: hundreds of small files are flushed here."""
    return Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))


def main() -> None:
    folder = [str(memory_folder())]
    torch.distributed.init_process_group("gloo")
    torch.distributed.broadcast_object_list(folder)
    found = {}
    for name in sys.argv[1:]:
        found[name] = compare(Path(folder[0], name), CASES[name])
    torch.distributed.barrier()  # before the files go
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(found))
        shutil.rmtree(folder[0])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
