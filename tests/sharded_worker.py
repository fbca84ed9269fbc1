"""Trains a tiny GPT-2 by LanguageModelingTrainer under torchrun, its state spread by FSDP2 or DeepSpeed, or by neither.

    torchrun --nproc_per_node=2 tests/sharded_worker.py FOLDER CASE...

Each rank writes FOLDER/CASE.RANK.json: the logged losses, what evaluation gave, and the steps that were skipped. The model
lies in FOLDER/CASE. A case whose name ends in _resumed goes on from the case's first checkpoint.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import tiny
import torch
from deepspeed_script import build_no_operators
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, TrainerCallback

from utils import sharding
from utils.arguments import LanguageModelingArguments
from utils.objectives import causal
from utils.trainer import LanguageModelingTrainer

STEPS = 4
SHARDED = {"state_dict_type": "SHARDED_STATE_DICT"}
FSDP: dict = {"fsdp": True}
CASES: dict[str, dict] = {
    "plain": {},
    "fsdp": FSDP,
    "fsdp_O1": FSDP | {"bf16": True},
    "fsdp_O2": FSDP | {"bf16": True, "fp16_opt_level": "O2", "use_combine_grad": True},
    "fsdp_overflow": FSDP | {"fp16": True, "fp16_opt_level": "O2", "loss_scale": "128"},
    "fsdp_float32_overflow": FSDP,
    "fsdp_full": FSDP | {"save_steps": STEPS // 2, "save_strategy": "steps"},
    "fsdp_sharded": FSDP | {"save_steps": STEPS // 2, "save_strategy": "steps", "fsdp_config": SHARDED},
    "fsdp_fp16": FSDP
    | {
        "fp16": True,
        "fp16_opt_level": "O2",
        "save_steps": STEPS // 2,
        "save_strategy": "steps",
        "fsdp_config": SHARDED,
    },
    "fsdp_evaluated": FSDP,
}
for stage in (1, 2, 3):
    CASES[f"zero{stage}"] = {"deepspeed": {"zero_optimization": {"stage": stage}}}
    CASES[f"zero{stage}"] |= {"save_steps": STEPS // 2, "save_strategy": "steps"}
CASES |= {
    "zero2_O2": CASES["zero2"] | {"bf16": True, "use_combine_grad": True},
    "zero2_O1": CASES["zero2"] | {"bf16": True, "fp16_opt_level": "O1"},
}


BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "dropout": 0.0, "attention_dropout": 0.0}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "dropout": 0.0}
FAMILIES: dict[str, dict] = {
    "bert": BERT,
    "roberta": BERT | {"pad_token_id": 1},
    "albert": BERT | {"embedding_size": 16},
    "distilbert": DISTILBERT,
    "openai-gpt": GPT,
    "xlnet": XLNET,
}
for family in FAMILIES:
    CASES |= {f"plain:{family}": {}, f"fsdp:{family}": FSDP}
    CASES |= {f"zero3:{family}": {"deepspeed": {"zero_optimization": {"stage": 3}}}}


def make_model(family: str, args: LanguageModelingArguments) -> torch.nn.Module:
    auto_class = AutoModelForCausalLM if family in ("openai-gpt", "xlnet") else AutoModelForMaskedLM
    torch.manual_seed(0)
    with sharding.whole_at_first(args):
        return auto_class.from_config(CONFIG_MAPPING[family](vocab_size=tiny.VOCABULARY, **FAMILIES[family]))


class Blocks(torch.utils.data.Dataset):
    """Sixteen tokens each, as many blocks as `batches` batches of both ranks."""

    def __init__(self, batches: int, seed: int):
        self.ids = torch.cat(tiny.batches(batches, seed=seed)).numpy()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index]}


class Overflow(TrainerCallback):
    """Lets one number of rank 1's gradients overflow in the second step, as if its shard alone had met one."""

    def on_train_begin(self, args, state, control, model=None, **_):
        parameter = next(iter(model.parameters()))

        def spoil(shard):
            if state.global_step == 1 and args.process_index == 1:
                shard.grad.to_local().view(-1)[0] = torch.inf

        parameter.register_post_accumulate_grad_hook(spoil)


def make_trainer(
    folder: Path, options: dict, family: str = "", overflows: bool = False, **more
) -> LanguageModelingTrainer:
    """more: further arguments of training. Two micro-batches of two samples a step and rank; dropout where FSDP saves."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate leaves it there, for all that comes
    words = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = LanguageModelingArguments(**words | options | more)
    trainer = LanguageModelingTrainer(
        model=make_model(family, args)
        if family
        else tiny.gpt2(dropout=0.1 if "save_steps" in options and "fsdp" in options else 0.0),
        args=args,
        train_dataset=Blocks(8, seed=1),
        eval_dataset=Blocks(3, seed=2),
        data_collator=causal.collate,
        token_sums=causal.token_sums,
    )
    if overflows:
        trainer.add_callback(Overflow())
    return trainer


def run(folder: Path, case: str) -> dict:
    name = case.removesuffix("_resumed")
    resumed = str(folder / name / f"checkpoint-{STEPS // 2}") if case != name else None
    trainer = make_trainer(folder / case, CASES[name], name.partition(":")[2], overflows=case.endswith("overflow"))
    if case != "fsdp_evaluated":
        trainer.train(resume_from_checkpoint=resumed)
    # Evaluation leaves whole what lies outside the layers.
    shard = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in trainer.model.parameters())
    if case != "fsdp_evaluated":
        trainer.save_model()
    evaluated = trainer.evaluate()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in logged],
        "norms": [entry["grad_norm"] for entry in logged],
        "eval_loss": evaluated["eval_loss"],
        "skipped_steps": logged[-1].get("skipped_steps") if logged else None,
        "bad_steps": sum(entry.get("bad_steps", 0) for entry in logged),
        "notes": trainer.args.notes,
        "shard": shard,
    }


def main(folder: str, *cases: str) -> None:
    if any("deepspeed" in CASES.get(case, {}) for case in cases):
        build_no_operators()
    for case in cases:
        found = run(Path(folder), case)
        Path(folder, f"{case}.{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
