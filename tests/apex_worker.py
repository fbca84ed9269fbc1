"""Trains tiny models with the stand-in apex, in a process of its own: amp patches torch for all of it.

python apex_worker.py RUNS: a JSON list of {"folder", "options", "seed", "resume", "watch"}; options are training
arguments, seed the model's, resume a checkpoint, watch whether to look at step 3. The last three may be left out. The
last line on stdout is a JSON list with what each run came to.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny
import torch
from test_trainer import Overflow, blocks, logged, trainer_for


def same(before: dict, after: dict) -> bool:
    return all(bool((before[key] == after[key]).all()) for key in ("weights", "moments")) and all(
        before[key] == after[key] for key in ("learning_rates", "last_epoch")
    )


class Watch(Overflow):
    """Notes what must not move in step 3, without an overflow of its own."""

    def on_step_begin(self, args, state, control, **named):
        super().on_step_begin(args, state, control, **named)
        if self.handle is not None:
            self.handle.remove()


def train(run: dict) -> dict:
    watch = Watch()
    trainer = trainer_for(
        run["folder"],
        tiny.gpt2(seed=run.get("seed", 0)),
        callbacks=[watch] if run.get("watch") else None,
        do_train=True,
        **{"fp16": True, "save_strategy": "no", **run["options"]},
    )
    autocast = set()
    trainer.model.transformer.h[0].register_forward_hook(lambda *_: autocast.add(torch.is_autocast_enabled("cpu")))
    trainer.train(resume_from_checkpoint=run.get("resume"))
    saved = Path(run["folder"]) / "final"
    trainer.save_model(str(saved))
    fresh = trainer_for(run["folder"], tiny.gpt2().from_pretrained(saved))
    return {
        "losses": logged(trainer, "loss"),
        "norms": logged(trainer, "grad_norm"),
        "loss_scales": logged(trainer, "loss_scale"),
        "skipped_steps": logged(trainer, "skipped_steps"),
        "learning_rates": logged(trainer, "learning_rate"),
        "last_epoch": trainer.lr_scheduler.last_epoch,
        "stood_still_in_step_3": watch.after is not None and same(watch.before, watch.after),
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "backend": trainer.args.half_precision_backend,
        "autocast": sorted(autocast),
        "weight": str(trainer.model.transformer.h[0].attn.c_proj.weight.dtype),
        "saved": str(next(fresh.model.parameters()).dtype),
        "eval_loss": trainer.evaluate(blocks(20, seed=2))["eval_loss"],
        "norm": str(trainer.model.transformer.ln_f.weight.dtype),  # after an evaluation
        "eval_loss_of_saved": fresh.evaluate(blocks(20, seed=2))["eval_loss"],
    }


if __name__ == "__main__":
    print(json.dumps([train(run) for run in json.loads(sys.argv[1])]))
