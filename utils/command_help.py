"""`--help`: the flags in groups, those of this project first, each in one form with its default and perhaps an example."""

import argparse
import re
import textwrap

WIDTH = 110
# {group: the flags in it, as a pattern}. A flag belongs to the first that matches; Model and Text are told by their dataclass.
GROUPS = {
    "The run": r"do_train|do_eval|output_dir|overwrite_output_dir|resume_from_checkpoint|seed|dry_run|print_config",
    "Precision and combined gradients": r"fp16|bf16|fp16_opt_level|loss_scale|use_combine_grad|half_precision_backend",
    "Device": r"device_id|use_cpu|npu_.*",
    "Interruptions": r"save_on_signal|max_train_time|max_bad_steps|on_loss_spike|elastic",
    "Training": r"per_device_.*|num_train_epochs|max_steps|gradient_accumulation_steps|learning_rate|lr_.*|warmup_.*|"
    r"weight_decay|max_grad_norm|label_smoothing_factor|optim.*|adam_.*|neftune.*|average_tokens.*|auto_find_batch_size",
    "Evaluation": r"eval_.*|prediction_loss_only|batch_eval_metrics|include_for_metrics|do_predict|.*_full_eval|label_names",
    "Saving": r"save_.*|async_save|load_best.*|metric_for_best.*|greater_is_better|enable_jit_checkpoint|restore_callback.*|"
    r"ignore_data_skip",
    "Log": r"log.*|report_to|run_name|disable_tqdm|project|trackio_.*|include_num_input.*|skip_memory_metrics|debug|mfu.*",
    "Hub": r"hub.*|push_to_hub.*",
    "Reading data": r"dataloader_.*|train_sampling_.*|length_column_name|data_seed|remove_unused_columns|group_by.*",
    "Memory and speed": r"gradient_checkpointing.*|activation_checkpointing.*|torch_.*|tf32|use_liger.*|liger.*|use_cache|"
    r"full_determinism",
    "Several processes": r"ddp_.*|fsdp.*|deepspeed|accelerator_config|parallelism_config|local_rank|.*_on_each_node",
    "Others": r".*",
}
OWN = ("The run", "Model", "Text", "Precision and combined gradients", "Device", "Interruptions")
EXAMPLES = {
    "model_name_or_path": "--model_name_or_path gpt2",
    "model_type": "--model_type gpt2 --config_overrides n_embd=256,n_layer=4,n_head=4 --vocab_size 8000",
    "tokenizer_name": "--tokenizer_name ./my_tokenizer",
    "dataset_name": "--dataset_name wikitext --dataset_config_name wikitext-2-raw-v1",
    "train_file": "--train_file 'texts/*.jsonl.gz' --text_column body",
    "data_mix": "--data_mix books.txt=3 code.jsonl.gz=1",
    "block_size": "--block_size 512",
    "max_seq_length": "--max_seq_length 256",
    "streaming": "--streaming --max_steps 10000 --max_eval_samples 500",
    "output_dir": "--output_dir output/gpt2",
    "fp16_opt_level": "--fp16 --fp16_opt_level O2 --use_combine_grad",
    "loss_scale": "--fp16 --fp16_opt_level O2 --loss_scale 128",
    "print_config": "python run_clm.py ... --print_config > run.yaml; python run_clm.py run.yaml",
    "per_device_train_batch_size": "--per_device_train_batch_size 8 --gradient_accumulation_steps 4",
    "learning_rate": "--learning_rate 1e-4 --lr_scheduler_type cosine --warmup_steps 0.1",
    "eval_strategy": "--eval_strategy steps --eval_steps 500",
    "save_strategy": "--save_strategy steps --save_steps 500 --save_total_limit 2",
    "report_to": "--report_to tensorboard",
}
KINDS: dict[object, str] = {int: "N", float: "NUMBER"}


def text(parser: argparse.ArgumentParser, own: dict[str, set[str]], description: str | None) -> str:
    """The whole help.

    own: {group: its flags} where a dataclass tells the group: "Model" and "Text".
    """
    name = parser.prog
    lines = [f"usage: {name} [CONFIG.yaml] --flag value ...", "", *_filled(description or "", 0), ""]
    lines += [
        *_filled(
            "Flags may stand in a YAML or JSON file, named first; flags after it win. Old flags of transformers 4 are "
            f"understood. To see what a command would do, add --dry_run. `{name} --help | less` shows a page at a time.",
            0,
        ),
        "",
    ]
    grouped: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        if action.option_strings and action.dest != "help" and not isinstance(action, argparse._StoreFalseAction):
            grouped.setdefault(group_of(action.dest, own), []).append(action)
    for group in [*OWN, *(group for group in GROUPS if group not in OWN)]:
        if group == "Training":
            lines += ["The flags below are those of transformers' TrainingArguments.", ""]
        if group not in grouped:
            continue
        lines += [group, "-" * len(group)]
        for action in sorted(grouped.get(group, []), key=lambda action: _place(action.dest, group)):
            lines += [_flag(action), *_filled(_told(action), 6)]
            lines += [f"      e.g. {EXAMPLES[action.dest]}"] if action.dest in EXAMPLES else []
        lines.append("")
    return "\n".join(lines)


def group_of(flag: str, own: dict[str, set[str]]) -> str:
    """The group that a flag (without dashes) stands in."""
    for group, flags in own.items():
        if flag in flags:
            return group
    return next(group for group, pattern in GROUPS.items() if re.fullmatch(pattern, flag))


def _place(flag: str, group: str) -> int:
    """In the order in which the group names its flags, those it does not name by their dataclass's order."""
    named = GROUPS.get(group, "").split("|")
    return next((place for place, pattern in enumerate(named) if re.fullmatch(pattern, flag)), 0)


def _flag(action: argparse.Action) -> str:
    name = action.option_strings[0]
    if action.choices and not _has_many(action):
        value = "{" + ",".join(map(str, action.choices)) + "}"
    elif action.choices:
        value = "NAME"
    elif action.const is True:
        return f"  {name}"
    elif re.search(r"(^|_)(file|dir|path)($|_)", action.dest):
        value = "PATH"
    else:
        value = KINDS.get(action.type, "TEXT")
    return f"  {name} {value}" + (" ..." if action.nargs == "+" else "")


def _has_many(action: argparse.Action) -> bool:
    return len(",".join(map(str, action.choices or ()))) > WIDTH // 2


def _told(action: argparse.Action) -> str:
    told = " ".join((action.help or "").split()).replace("%%", "%")
    if told and told[-1] not in ".!?":
        told += "."
    if "default:" not in told.lower() and "default is" not in told.lower() and "defaults to" not in told.lower():
        told += f" Default: {_default(action)}."
    return f"{told} One of {', '.join(map(str, action.choices))}." if action.choices and _has_many(action) else told


def _default(action: argparse.Action) -> str:
    if action.const is True:
        return f"on; --no_{action.dest} turns it off" if action.default is True else "off"
    if action.default is None or action.default == "":
        return "none"
    return str(getattr(action.default, "value", action.default))


def _filled(words: str, indent: int) -> list[str]:
    return textwrap.wrap(
        words, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
