"""Command lines written for transformers 4.20 to 4.57, put into the words of transformers 5.

Transformers 5 dropped 35 fields of TrainingArguments, and the example scripts dropped flags of their own.
`modernize` rewrites a command line that uses them: each old word does what it meant and leaves one note with its new
spelling, or is refused with its successor. The meanings are those of TrainingArguments.__post_init__ in transformers
4.20.1 to 4.57.6; tests/data/legacy_fields.json says in which releases each word lived. Only the standard library is
imported, so that a wrong command line is refused before torch is loaded.
"""

import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# What HfArgumentParser reads as a boolean (transformers/hf_argparser.py, string_to_bool).
TRUE = ("true", "t", "yes", "y", "1")
FALSE = ("false", "f", "no", "n", "0")


@dataclass(frozen=True)
class Modernized:
    """A command line in today's words.

    argv: the arguments for today's parser.
    notes: one line for each old word that was used.
    environment: variables to set before TrainingArguments is made. They stand for flags and win over what is set.
    """

    argv: list[str]
    notes: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Word:
    """One old flag and what became of it.

    how: "rename": the successor takes the values. "switch": when true, `--successor value` stands in its place.
        "collect": when true, `value` joins the list of the successor. "json": its truth goes under its own name into
        the JSON of the successor. "variable": the successor is an environment variable. "drop": nothing is left to
        ask for. "refuse": it cannot be done.
    successor, value: see `how`; "" for none.
    idle: values by which the word asks for nothing, so that it is dropped whatever `how` says.
    why: the reason, the remedy, or what else to know.
    """

    how: Literal["rename", "switch", "collect", "json", "variable", "drop", "refuse"]
    successor: str = ""
    value: str = ""
    idle: tuple[str, ...] = ()
    why: str = ""


ZERO_2 = """and with --fsdp_config '{"reshard_after_forward": false}' its simple and zero_dp_2"""
NO_BIN = "checkpoints are safetensors files; for a .bin file, torch.save the finished model's state_dict()"

WORDS: dict[str, Word] = {
    # TrainingArguments, renamed
    "evaluation_strategy": Word("rename", "eval_strategy"),
    "fp16_backend": Word("rename", "half_precision_backend"),
    "per_gpu_train_batch_size": Word("rename", "per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Word("rename", "per_device_eval_batch_size"),
    "push_to_hub_token": Word("rename", "hub_token"),
    "torchdynamo": Word("rename", "torch_compile_backend"),  # naming a backend turns torch_compile on
    "xpu_backend": Word("rename", "ddp_backend"),
    # transformers 5.23 renamed these; whichever the running version knows is the right one
    "gradient_checkpointing": Word("rename", "activation_checkpointing"),
    "gradient_checkpointing_kwargs": Word("rename", "activation_checkpointing_kwargs"),
    "activation_checkpointing": Word("rename", "gradient_checkpointing"),
    "activation_checkpointing_kwargs": Word("rename", "gradient_checkpointing_kwargs"),
    # TrainingArguments, folded into another field
    "no_cuda": Word("switch", "use_cpu"),
    "adafactor": Word("switch", "optim", "adafactor"),
    "group_by_length": Word("switch", "train_sampling_strategy", "group_by_length"),
    "include_tokens_per_second": Word("switch", "include_num_input_tokens_seen", "True"),
    "include_inputs_for_metrics": Word("collect", "include_for_metrics", "inputs"),
    "tpu_metrics_debug": Word("collect", "debug", "tpu_metrics_debug"),
    "dispatch_batches": Word("json", "accelerator_config"),
    "split_batches": Word("json", "accelerator_config"),
    "ray_scope": Word("variable", "RAY_SCOPE"),
    "logging_dir": Word("variable", "TENSORBOARD_LOGGING_DIR", why="beside it --report_to is all unless given"),
    # TrainingArguments, without an effect of their own any more
    "use_mps_device": Word("drop", why="the mps device is used wherever there is one"),
    "use_legacy_prediction_loop": Word("drop", why="there is one evaluation loop, with the same metrics"),
    # TrainingArguments, gone
    "save_safetensors": Word("refuse", idle=TRUE, why=NO_BIN),
    "no_save_safetensors": Word("refuse", why=NO_BIN),
    "sharded_ddp": Word("refuse", idle=("",), why="FairScale's sharding is gone; --fsdp is its zero_dp_3, " + ZERO_2),
    "use_ipex": Word("refuse", idle=FALSE, why="its work is in PyTorch now; leave it out, or use --torch_compile"),
    "jit_mode_eval": Word("refuse", idle=FALSE, why="no model is traced; leave it out, or use --torch_compile"),
    "tpu_num_cores": Word("refuse", why="the launcher counts the cores: accelerate launch --tpu --num_processes N"),
    "mp_parameters": Word("refuse", idle=("",), why="it is SageMaker's; --fsdp or --deepspeed shard a model"),
    "tp_size": Word("refuse", idle=("0", "1"), why="the scripts split no layers; --fsdp or --deepspeed shard a model"),
    "past_index": Word("refuse", idle=("-1",), why="the Trainer carries no past states between steps; leave it out"),
    # the example scripts' own
    "torch_dtype": Word("rename", "dtype"),
    "use_auth_token": Word("rename", "token", idle=TRUE + FALSE, why="the saved token is used by itself"),
    "low_cpu_mem_usage": Word("drop", why="models load this way by themselves now"),
}

# Flags that stayed and lost a value: (flag, old value) -> its successor ("" for none) and what to know about it.
FUSED = ("adamw_torch_fused", "with --use_combine_grad it is one fused kernel over flat buffers")
NATIVE = ("native", "PyTorch's own mixed precision, on every device")
GONE = ("", "PyTorch trains without it; use --torch_compile_backend inductor")
VALUES: dict[tuple[str, str], tuple[str, str]] = {
    ("optim", "adamw_hf"): ("adamw_torch", "PyTorch's AdamW decays the weights before the step, not after it"),
    ("optim", "adamw_apex_fused"): FUSED,
    ("optim", "adamw_apex_fused_npu"): FUSED,  # Ascend's name for it
    ("half_precision_backend", "cuda_amp"): NATIVE,
    ("half_precision_backend", "cpu_amp"): NATIVE,
    ("ddp_backend", "ccl"): ("xccl", "PyTorch's own for Intel GPUs; with --use_cpu it is gloo"),
    ("torch_compile_backend", "aot_cudagraphs"): ("cudagraphs", "the same backend"),
    ("torch_compile_backend", "nvfuser"): ("inductor", "nvFuser left PyTorch"),
    ("torch_compile_backend", "aot_nvfuser"): ("inductor", "nvFuser left PyTorch"),
    ("torch_compile_backend", "ofi"): GONE,
    ("torch_compile_backend", "fx2trt"): GONE,
    ("torch_compile_backend", "fx2trt-fp16"): GONE,
    ("torch_compile_backend", "ipex"): GONE,
}

# FSDP's strategies: reshard_after_forward in FSDP2, None for those that FSDP1 alone has
# (transformers/training_args.py, _apply_legacy_fsdp_to_config).
STRATEGIES: dict[str, bool | None] = {"full_shard": True, "shard_grad_op": False}
STRATEGIES |= dict.fromkeys(("no_shard", "hybrid_shard", "hybrid_shard_zero2"))


@dataclass
class Argument:
    """A flag (without dashes, with underscores), the tokens it was typed in, and its values."""

    name: str
    tokens: list[str]
    values: list[str]

    def truth(self) -> bool:
        """Whether the boolean flag is on; ValueError for a value that is no boolean."""
        value = self.values[0].lower() if self.values else "true"
        if value not in TRUE + FALSE:
            raise ValueError(f"--{self.name} takes true or false, not {value}")
        return value in TRUE

    def number(self) -> float:
        """The flag's number; ValueError for a value that is none."""
        try:
            return float(self.values[0])
        except (IndexError, ValueError):
            raise ValueError(f"--{self.name} takes a number, not {' '.join(self.values) or 'nothing'}") from None


@dataclass
class Line:
    """A command line while it is rewritten."""

    arguments: list[Argument]
    known: frozenset[str]
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def last(self, name: str) -> Argument | None:
        """The flag as argparse takes it: where it is given more than once, the last one counts."""
        return next((argument for argument in reversed(self.arguments) if argument.name == name), None)

    def old(self, name: str) -> Argument | None:
        """The flag, if it is given and today's parser does not know it."""
        return None if name in self.known else self.last(name)

    def remove(self, *names: str) -> None:
        self.arguments = [argument for argument in self.arguments if argument.name not in names]

    def put(self, name: str, values: list[str]) -> None:
        """Set the flag. It replaces the one given under today's name: transformers 4 let its old words win."""
        self.remove(name)
        # argparse takes a separate value that begins with a dash for a flag
        joined = len(values) == 1 and values[0].startswith("-")
        self.arguments.append(Argument(name, [f"--{name}={values[0]}"] if joined else [f"--{name}", *values], values))

    def json(self, name: str) -> dict[str, Any]:
        """The flag's JSON object, given itself or as a file; {} without the flag; ValueError if it cannot be read."""
        argument = self.last(name)
        if argument is None or not argument.values:
            return {}
        text = argument.values[0]
        try:
            return dict(json.loads(text if text.startswith("{") else Path(text).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(f"--{name} {text} cannot be read as JSON: {error}") from error


def split(argv: list[str]) -> tuple[list[Argument], list[str]]:
    """The arguments, and what stands from a bare `--` on, as argparse divides them."""
    end = argv.index("--") if "--" in argv else len(argv)
    arguments: list[Argument] = []
    for token in argv[:end]:
        if token.startswith("--") or token == "-h":
            name, equals, value = token[2:].partition("=")
            arguments.append(Argument(name.replace("-", "_"), [token], [value] if equals else []))
        elif arguments:
            arguments[-1].tokens.append(token)
            arguments[-1].values.append(token)
        else:
            arguments.append(Argument("", [token], []))  # a configuration file, before any flag
    return arguments, argv[end:]


def translate_warmup(line: Line) -> None:
    """--warmup_ratio: warmup_steps below 1 is the ratio now; a positive --warmup_steps won then and wins still."""
    argument = line.old("warmup_ratio")
    if argument is None:
        return
    steps, ratio = line.last("warmup_steps"), argument.number()
    if not 0 <= ratio <= 1:
        raise ValueError(f"--warmup_ratio {argument.values[0]} does not lie between 0 and 1; see --warmup_steps")
    line.remove("warmup_ratio")
    if steps is not None and steps.number() > 0:
        line.notes.append("--warmup_ratio is dropped (--warmup_steps is given and wins)")
        return
    # 1 would be read as one step; the float before it covers all of them, for the steps are rounded up
    line.put("warmup_steps", [argument.values[0] if ratio < 1 else repr(math.nextafter(1.0, 0.0))])
    line.notes.append("--warmup_ratio is now --warmup_steps with a value below 1")


def translate_hub_name(line: Line) -> None:
    """--push_to_hub_model_id and --push_to_hub_organization: the two halves of hub_model_id."""
    model, organization = line.old("push_to_hub_model_id"), line.old("push_to_hub_organization")
    if model is None and organization is None:
        return
    output = line.last("output_dir")
    folder = Path(output.values[0] if output and output.values else "trainer_output").name
    owner = organization.values[:1] if organization else []
    line.remove("push_to_hub_model_id", "push_to_hub_organization")
    line.put("hub_model_id", ["/".join(owner + (model.values[:1] if model else [folder]))])
    for argument in (model, organization):
        if argument is not None:
            line.notes.append(f"--{argument.name} is now --hub_model_id [organization/]name")


def translate_local_rank(line: Line) -> None:
    """--local_rank: transformers 5 parses it and reads LOCAL_RANK instead.

    A launcher that passes the flag beside WORLD_SIZE, without the variable, would start processes that do not know of
    each other; so here the flag sets the variable, which wins where it is there, as in transformers 4.
    """
    argument = line.last("local_rank")
    if argument is None:
        return
    rank = argument.values[0] if argument.values else "-1"
    line.remove("local_rank")
    if rank.isdigit() and "WORLD_SIZE" in os.environ and "LOCAL_RANK" not in os.environ:
        line.environment["LOCAL_RANK"] = rank
    line.notes.append("--local_rank is now the environment variable LOCAL_RANK, which torchrun sets")


def translate_fsdp(line: Line) -> None:
    """--fsdp "full_shard auto_wrap" and its two satellites: a switch and its --fsdp_config now."""
    flag = line.last("fsdp")
    minimum, layers = line.old("fsdp_min_num_params"), line.old("fsdp_transformer_layer_cls_to_wrap")
    options = " ".join(flag.values).split() if flag else []
    if flag and flag.values and (not options or options[0].lower() in TRUE + FALSE):
        line.remove("fsdp")
        if options and options[0].lower() in TRUE:
            line.put("fsdp", [])
        line.notes.append("--fsdp is a switch now: give it alone, or leave it out")
        options = []
    if not options and minimum is None and layers is None:
        return
    config = {key.removeprefix("fsdp_"): value for key, value in line.json("fsdp_config").items()}
    for option in options:
        if option in STRATEGIES:
            if STRATEGIES[option] is None:
                config.setdefault("version", 1)
            first = str(config.get("version", 2)) == "1"
            config.setdefault("reshard_after_forward", option if first else STRATEGIES[option])
        elif option == "offload":
            config.setdefault("cpu_offload", True)
        elif option != "auto_wrap":  # wrapping is the default
            raise ValueError(f"--fsdp {option}: not an option of FSDP; see --fsdp_config")
    if minimum is not None:
        config["min_num_params"] = max(int(config.get("min_num_params", 0)), int(minimum.number()))
    if config.get("min_num_params") and ("auto_wrap" in options or not options):
        config.setdefault("auto_wrap_policy", "SIZE_BASED_WRAP")  # transformers 4 went by the number
    if layers is not None:
        given = config.get("transformer_layer_cls_to_wrap", [])
        names = [name.strip() for value in layers.values for name in value.split(",")]
        config["transformer_layer_cls_to_wrap"] = ([given] if isinstance(given, str) else list(given)) + names
    line.remove("fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap")
    line.put("fsdp_config", [json.dumps(config)])
    if options:
        line.put("fsdp", [])
        line.notes.append(f'--fsdp "{" ".join(options)}" is now --fsdp with --fsdp_config')
    for argument in (minimum, layers):
        if argument is not None:
            line.notes.append(f"--{argument.name} is now {argument.name.removeprefix('fsdp_')} in --fsdp_config")


def translate_word(line: Line, argument: Argument, word: Word) -> None:
    """One word of the table; ValueError if it is refused."""
    name, successor = argument.name, word.successor
    value = argument.values[0] if argument.values else "true"
    note = f"is now --{successor} {word.value}".rstrip()
    if word.how == "drop" or value.lower() in word.idle:
        note = "is dropped"
    elif word.how == "refuse":
        raise ValueError(f"--{' '.join([name, *argument.values])} cannot be done with transformers 5: {word.why}")
    elif word.how == "rename":
        line.put(successor, argument.values)
    elif word.how == "variable":
        line.environment[successor] = value
        note = f"is now the environment variable {successor}"
    elif word.how == "json":
        line.put(successor, [json.dumps(line.json(successor) | {name: argument.truth()})])
        note = f"is now {name} in --{successor}"
    elif argument.truth():
        present = line.last(successor) if word.how == "collect" else None
        values = [*(present.values if present else []), *word.value.split()]
        line.put(successor, list(dict.fromkeys(values)))
    line.remove(name)
    line.notes.append(f"--{name} {note}" + (f" ({word.why})" if word.why else ""))


def translate_values(line: Line) -> None:
    """Flags that stayed while their values or their form changed; ValueError where a value has no successor."""
    for (name, old), (new, why) in VALUES.items():
        argument = line.last(name)
        if argument is None or argument.values != [old]:
            continue
        if not new:
            raise ValueError(f"--{name} {old} cannot be done with transformers 5: {why}")
        cpu = line.last("use_cpu")
        if name == "ddp_backend" and cpu is not None and cpu.truth():
            new = "gloo"
        line.put(name, [new])
        line.notes.append(f"--{name} {old} is now --{name} {new} ({why})")
    debug = line.last("debug")
    if debug is not None and debug.values != (options := " ".join(debug.values).split()):
        line.remove("debug")
        if options:
            line.put("debug", options)
        line.notes.append("--debug takes its options as separate words now, and none by being left out")
    private = line.last("hub_private_repo")
    if private is not None and not private.values:
        line.put("hub_private_repo", ["True"])
        line.notes.append("--hub_private_repo takes a value now: --hub_private_repo True")
    report = line.last("report_to")
    if report is not None and len(report.values) > 1:
        names = " ".join(report.values)
        raise ValueError(f"--report_to {names} cannot be done with transformers 5: it takes one name, or all")


def modernize(argv: list[str], known: Collection[str]) -> Modernized:
    """Rewrites a command line of transformers 4.20 to 4.57, or of Ascend's ModelZoo, in today's words.

    known: the flags of today's parser, without dashes and with underscores. A known flag passes untouched, except
        where its meaning, values or form changed: --local_rank, --optim, --half_precision_backend, --ddp_backend,
        --torch_compile_backend, --fsdp, --debug, --hub_private_repo, --report_to. A flag that is neither known nor in
        the table is left to the parser, and so is an old one whose successor the parser does not know. Abbreviations
        are not expanded.

    Raises ValueError, in one line, for a flag that cannot be done: which, why, and what to use instead.
    """
    arguments, tail = split(argv)
    line = Line(arguments, frozenset(known))
    for name in dict.fromkeys(argument.name for argument in arguments):
        word, argument = WORDS.get(name), line.old(name)
        if word is None or argument is None:
            continue
        if word.successor in line.known or word.how in ("variable", "drop", "refuse"):
            translate_word(line, argument, word)
    translate_warmup(line)
    translate_hub_name(line)
    translate_local_rank(line)
    translate_fsdp(line)
    translate_values(line)
    if "TENSORBOARD_LOGGING_DIR" in line.environment and line.last("report_to") is None:
        line.put("report_to", ["all"])  # transformers 5 reports to none by default
    tokens = [token for argument in line.arguments for token in argument.tokens]
    return Modernized(tokens + tail, line.notes, line.environment)
