"""Trains and evaluates by LanguageModelingTrainer in one process or, run under torchrun, in several, on the same samples.

    torchrun --nproc_per_node=2 tests/data_parallel_training.py FOLDER CASE...

Rank 0 writes FOLDER/CASE.pt: each step's gradients as they reach the optimizer, the logged losses, what evaluation gave,
and the names of all collectives of the last step.
"""

import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import families
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from utils.arguments import LanguageModelingArguments
from utils.objectives import masked, predicted_rows
from utils.trainer import LanguageModelingTrainer

ACCUMULATE, STEPS = 3, 3
CASES = {
    "plain": {},
    "combined": {"use_combine_grad": True},
    "combined_small_buckets": {"use_combine_grad": True, "ddp_bucket_cap_mb": 0.01},
    "plain_bf16": {"ddp_comm_hook": "bf16"},
    "combined_bf16": {"use_combine_grad": True, "ddp_comm_hook": "bf16"},
    "combined_fp16": {"use_combine_grad": True, "ddp_comm_hook": "fp16"},
}
LAW = masked.MaskingLaw(0.15, 4, families.VOCABULARY, np.arange(families.VOCABULARY) < 5)


class UnequalLines:
    """Lines of 4 to 28 tokens; of every four samples, which is one batch of both ranks, two have one target at most."""

    def __init__(self, count: int):
        draw = np.random.default_rng(0)
        self.lines = []
        for number in range(count):
            few = number % 4 in (2, 3)
            ids = draw.integers(5, families.VOCABULARY, 4 if few else 28)
            labels = np.where(draw.random(len(ids)) < (0.0 if few else 0.6), ids, predicted_rows.IGNORED)
            if number % 4 == 2:
                labels[1] = ids[1]
            self.lines.append({"input_ids": np.where(labels == predicted_rows.IGNORED, ids, 4), "labels": labels})

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.lines[index]


class Watch(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use, and profiles the last step."""

    def __init__(self):
        self.gradients: list[torch.Tensor] = []
        self.trainer: LanguageModelingTrainer
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == STEPS - 1:
            self.profiler.start()

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        combined = self.trainer.combined
        gradients = [m.gradient for m in sorted(combined.members, key=lambda m: m.index)] if combined else []
        if not combined:
            gradients = [p.grad for group in self.trainer.optimizer.param_groups for p in group["params"]]
        self.gradients.append(torch.cat([gradient.flatten() for gradient in gradients]).clone())

    def on_step_end(self, args, state, control, **_):
        if state.global_step == STEPS:
            self.profiler.stop()

    def collectives(self) -> list[str]:
        return [event.name for event in self.profiler.events() if event.name.startswith("gloo:")]


def train(options: dict, batch: int) -> dict:
    """batch: samples of a process's micro-batch."""
    args = LanguageModelingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=ACCUMULATE,
        max_steps=STEPS,
        max_grad_norm=0.0,
        learning_rate=1e-2,
        logging_steps=1,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        optim="sgd",
        **options,
    )
    model = families.make("bert")
    masked.predict_only_masked(model)
    watch = Watch()
    trainer = LanguageModelingTrainer(
        model=model,
        args=args,
        train_dataset=UnequalLines(4 * ACCUMULATE * STEPS),
        eval_dataset=UnequalLines(13),  # by two ranks and two samples a batch: three of the last four are made up
        data_collator=masked.MaskedCollator(LAW, 0),
        loss_sum=predicted_rows.loss_sum,
        token_sums=predicted_rows.token_sums,
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.train()
    evaluated = trainer.evaluate()
    return {
        "gradients": torch.stack(watch.gradients),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "evaluated": [evaluated["eval_loss"], evaluated["eval_accuracy"], trainer.evaluated_samples],
        "collectives": watch.collectives(),
        "buckets": len(trainer.combined.reducer.buckets) if trainer.combined and trainer.combined.reducer else 0,
    }


def main(folder: str, *cases: str) -> None:
    for case in cases:
        found = train(CASES[case], batch=2)
        if os.environ["RANK"] == "0":
            torch.save(found, os.path.join(folder, f"{case}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
