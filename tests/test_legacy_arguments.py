"""Every word of transformers 4.20 to 4.57 that the installed release lacks is translated or refused by name."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from utils.legacy_arguments import VALUES, WORDS, Modernized, modernize

ROOT = Path(__file__).resolve().parent.parent
LEGACY = json.loads((ROOT / "tests" / "data" / "legacy_fields.json").read_text(encoding="utf-8"))

# One use of each old word of TrainingArguments that asks for something, and what it comes to: a parsed field with its
# value, {"environment variable": value}, None where nothing is left to ask for, or REFUSED.
REFUSED = "refused"
USES: dict[str, tuple[str, object]] = {
    "adafactor": ("true", {"optim": "adafactor"}),
    "dispatch_batches": ("true", {"accelerator_config": {"dispatch_batches": True}}),
    "evaluation_strategy": ("epoch", {"eval_strategy": "epoch"}),
    "fp16_backend": ("apex", {"half_precision_backend": "apex"}),
    "fp16_opt_level": ("O2", {"fp16_opt_level": "O2"}),
    "fsdp_min_num_params": (
        "1000",
        {"fsdp_config": {"min_num_params": 1000, "auto_wrap_policy": "SIZE_BASED_WRAP"}},
    ),
    "fsdp_transformer_layer_cls_to_wrap": (
        "GPT2Block",
        {"fsdp_config": {"transformer_layer_cls_to_wrap": ["GPT2Block"]}},
    ),
    "group_by_length": ("true", {"train_sampling_strategy": "group_by_length"}),
    "half_precision_backend": ("apex", {"half_precision_backend": "apex"}),
    "include_inputs_for_metrics": ("true", {"include_for_metrics": ["inputs"]}),
    "include_tokens_per_second": ("true", {"include_num_input_tokens_seen": "all"}),
    "jit_mode_eval": ("true", REFUSED),
    "logging_dir": ("~/runs", {"TENSORBOARD_LOGGING_DIR": "~/runs"}),
    "mp_parameters": ("pipeline=1", REFUSED),
    "no_cuda": ("true", {"use_cpu": True}),
    "overwrite_output_dir": ("true", {"overwrite_output_dir": True}),
    "past_index": ("0", REFUSED),
    "per_gpu_eval_batch_size": ("3", {"per_device_eval_batch_size": 3}),
    "per_gpu_train_batch_size": ("5", {"per_device_train_batch_size": 5}),
    "push_to_hub_model_id": ("gpt", {"hub_model_id": "gpt"}),
    "push_to_hub_organization": ("lab", {"hub_model_id": "lab/out"}),
    "push_to_hub_token": ("hf_x", {"hub_token": "hf_x"}),
    "ray_scope": ("all", {"RAY_SCOPE": "all"}),
    "save_safetensors": ("false", REFUSED),
    "sharded_ddp": ("zero_dp_2", REFUSED),
    "split_batches": ("true", {"accelerator_config": {"split_batches": True}}),
    "torchdynamo": ("eager", {"torch_compile_backend": "eager", "torch_compile": True}),
    "tp_size": ("2", REFUSED),
    "tpu_metrics_debug": ("true", {"debug": ["tpu_metrics_debug"]}),
    "tpu_num_cores": ("8", REFUSED),
    "use_ipex": ("true", REFUSED),
    "use_legacy_prediction_loop": ("true", None),
    "use_mps_device": ("true", None),
    "warmup_ratio": ("0.1", {"warmup_steps": 0.1}),
    "xpu_backend": ("gloo", {"ddp_backend": "gloo"}),
    # the example scripts' own
    "low_cpu_mem_usage": ("true", None),
    "torch_dtype": ("bfloat16", {"dtype": "bfloat16"}),
    "use_auth_token": ("hf_x", {"token": "hf_x"}),
}
OWN = ("fp16_opt_level", "half_precision_backend", "overwrite_output_dir")  # the project's parser has these


@dataclass
class ScriptArguments:
    """The flags that the example scripts and the project have beside TrainingArguments."""

    model_name_or_path: str | None = None
    config_overrides: str | None = None
    use_fast_tokenizer: bool = True
    token: str | None = None
    dtype: str | None = field(default=None, metadata={"choices": ["auto", "bfloat16", "float16", "float32"]})
    train_file: str | None = None
    block_size: int | None = None
    keep_linebreaks: bool = True
    fp16_opt_level: str | None = None
    loss_scale: str | None = None
    use_combine_grad: bool = False
    half_precision_backend: str = "auto"
    overwrite_output_dir: bool = False
    device_id: int | None = None


@pytest.fixture(scope="module")
def parser():
    from transformers import HfArgumentParser, TrainingArguments

    return HfArgumentParser((TrainingArguments, ScriptArguments))


@pytest.fixture(scope="module")
def known(parser) -> set[str]:
    return {option.lstrip("-").replace("-", "_") for action in parser._actions for option in action.option_strings}


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    """TrainingArguments writes into the environment, and --local_rank reads from it."""
    before = dict(os.environ)
    for name in ("LOCAL_RANK", "WORLD_SIZE", "RANK"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def parse(parser, known, tmp_path):
    """A command line through modernize and today's parser: all fields in one dict, and what modernize gave."""

    def run(*argv: str) -> tuple[dict[str, object], Modernized]:
        modern = modernize(["--output_dir", str(tmp_path / "out"), *argv], known)
        arguments = [*modern.argv] if "--use_cpu" in modern.argv else [*modern.argv, "--use_cpu"]
        if "--ddp_backend" in arguments:  # accelerate starts no process group for it, and then asks for one
            return vars(parser.parse_args(arguments)), modern
        training, script = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        return {**vars(training), **vars(script)}, modern

    return run


def lasting(value: object) -> object:
    """A parsed value without transformers' wrappings: enums as their values, accelerate's config as a dict."""
    if isinstance(value, list):
        return [lasting(item) for item in value]
    return getattr(value, "value", None) or (vars(value) if hasattr(value, "split_batches") else value)


def test_every_field_is_listed() -> None:
    assert set(USES) == set(LEGACY["fields"]) | set(LEGACY["script_flags"])


def test_each_old_word_is_known_or_has_a_row(known) -> None:
    special = {"warmup_ratio", "push_to_hub_model_id", "push_to_hub_organization"}
    special |= {"fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"}
    assert set(LEGACY["fields"]) | set(LEGACY["script_flags"]) <= known | set(WORDS) | special


@pytest.mark.parametrize("form", ["--{name}={value}", "--{name} {value}", "--{dashed} {value}"])
@pytest.mark.parametrize("name", sorted(USES))
def test_each_word_does_what_it_meant(name: str, form: str, known, parse) -> None:
    value, meaning = USES[name]
    argv = form.format(name=name, dashed=name.replace("_", "-"), value=value).split(" ")
    if meaning == REFUSED:
        with pytest.raises(ValueError, match=f"^--{name} .*: .+$") as caught:
            modernize(argv, known)
        assert "\n" not in str(caught.value)
        return
    fields, modern = parse(*argv)
    assert len(modern.notes) == (0 if name in OWN else 1)
    assert all(note.startswith(f"--{name} is ") for note in modern.notes)
    for key, expected in (meaning or {}).items():
        if key.isupper():
            assert modern.environment == {key: expected}
        elif isinstance(expected, dict):
            assert expected.items() <= lasting(fields[key]).items()
        else:
            assert lasting(fields[key]) == expected
    if meaning is None:
        assert modern.argv == modernize(["--output_dir", modern.argv[1]], known).argv


SWITCHES = sorted(name for name, (value, _) in USES.items() if value in ("true", "false") and name not in OWN)


@pytest.mark.parametrize("name", SWITCHES)
def test_bare_switch_is_true(name: str, known) -> None:
    if USES[name][1] == REFUSED and name != "save_safetensors":
        with pytest.raises(ValueError, match=f"^--{name} "):
            modernize([f"--{name}"], known)
        return
    bare, spelled = modernize([f"--{name}", "--seed", "1"], known), modernize([f"--{name}=True", "--seed", "1"], known)
    assert bare == spelled


@pytest.mark.parametrize("name", sorted({*SWITCHES} - {"save_safetensors", "dispatch_batches", "split_batches"}))
@pytest.mark.parametrize("form", [["--{}", "False"], ["--{}=no"], ["--{}=0"]])
def test_switch_off_asks_for_nothing(name: str, form: list[str], known) -> None:
    modern = modernize([part.format(name) for part in form], known)
    assert modern.argv == []
    assert len(modern.notes) == 1


@pytest.mark.parametrize(
    "argv", [["--sharded_ddp", ""], ["--mp_parameters="], ["--past_index", "-1"], ["--tp_size=0"]]
)
def test_refused_word_that_asks_for_nothing(argv: list[str], known) -> None:
    assert modernize(argv, known).argv == []


def test_no_save_safetensors_is_refused(known) -> None:
    with pytest.raises(ValueError, match="--no_save_safetensors cannot .*torch.save"):
        modernize(["--no-save-safetensors"], known)


@pytest.mark.parametrize("ratio", ["0", "0.0", "1e-3", "0.06", "0.1", "0.3333", "0.5", "0.999", "1", "1.0"])
def test_warmup_ratio_counts_the_steps_of_transformers_4(ratio: str, parse, parser) -> None:
    fields, modern = parse("--warmup_ratio", ratio)
    training = parser.parse_args_into_dataclasses([*modern.argv, "--use_cpu"], look_for_args_file=False)[0]
    for steps in (1, 3, 7, 10, 99, 1000, 12345, 10**7):
        # TrainingArguments.get_warmup_steps, transformers 4.57.6
        assert training.get_warmup_steps(steps) == math.ceil(steps * float(ratio))


def test_warmup_steps_win_over_the_ratio(parse) -> None:
    assert parse("--warmup_ratio", "0.1", "--warmup_steps", "20")[0]["warmup_steps"] == 20
    assert parse("--warmup_steps", "0", "--warmup_ratio", "0.1")[0]["warmup_steps"] == 0.1


@pytest.mark.parametrize("ratio", ["-0.1", "1.5", "nan", "some"])
def test_warmup_ratio_out_of_range(ratio: str, known) -> None:
    with pytest.raises(ValueError, match=f"--warmup_ratio .*{ratio}"):
        modernize([f"--warmup_ratio={ratio}"], known)


def test_old_words_win_over_new_ones_as_in_transformers_4(parse) -> None:
    fields, _ = parse("--no_cuda", "--per_gpu_train_batch_size", "2", "--per_device_train_batch_size", "16")
    assert fields["per_device_train_batch_size"] == 2
    assert lasting(parse("--adafactor", "--optim", "adamw_hf")[0]["optim"]) == "adafactor"


def test_the_last_of_repeated_words_counts_and_is_noted_once(parse) -> None:
    fields, modern = parse("--evaluation_strategy", "no", "--evaluation-strategy=steps", "--eval_steps", "5")
    assert lasting(fields["eval_strategy"]) == "steps"
    assert modern.notes == ["--evaluation_strategy is now --eval_strategy"]


def test_report_to(parse, known) -> None:
    assert "--report_to" not in parse("--seed", "1")[1].argv
    modern = modernize(["--logging_dir", "x"], known)
    assert modern.argv == ["--report_to", "all"]  # transformers 4 reported to all by default
    assert modernize(["--logging_dir", "x", "--report_to", "none"], known).argv == ["--report_to", "none"]
    with pytest.raises(ValueError, match="--report_to tensorboard wandb .*one name, or all"):
        modernize(["--report_to", "tensorboard", "wandb"], known)


@pytest.mark.parametrize("name", [*LEGACY["optimizers"], "adamw_apex_fused_npu"])
def test_dropped_optimizers(name: str, parse) -> None:
    fields, modern = parse("--optim", name)
    assert lasting(fields["optim"]) == ("adamw_torch" if name == "adamw_hf" else "adamw_torch_fused")
    assert len(modern.notes) == 1
    assert ("--use_combine_grad" in modern.notes[0]) == ("apex" in name)


@pytest.mark.parametrize("flag", ["fp16_backend", "half_precision_backend"])
@pytest.mark.parametrize("value", ["cuda_amp", "cpu_amp"])
def test_pytorchs_own_mixed_precision_is_native(flag: str, value: str, parse) -> None:
    fields, modern = parse(f"--{flag}", value)
    assert fields["half_precision_backend"] == "native"
    assert modern.notes[-1].startswith(f"--half_precision_backend {value} is now --half_precision_backend native (")


@pytest.mark.parametrize(
    ("flag", "value"), [(flag, value) for flag, values in LEGACY["choices"].items() for value in values]
)
def test_dropped_choices(flag: str, value: str, parse, known) -> None:
    field_name = WORDS[flag].successor if flag in WORDS else flag
    if not VALUES[field_name, value][0]:
        with pytest.raises(ValueError, match=f"^--{field_name} {value} .*--torch_compile_backend inductor"):
            modernize([f"--{flag}", value], known)
        return
    fields, modern = parse(f"--{flag}", value)
    assert fields[field_name] == VALUES[field_name, value][0]
    assert f"{field_name} {value} is now" in modern.notes[-1]


def test_oneccl_on_the_cpu_is_gloo(parse) -> None:
    assert parse("--no_cuda", "--xpu_backend", "ccl")[0]["ddp_backend"] == "gloo"


@pytest.mark.parametrize(
    ("argv", "config"),
    [
        (["full_shard"], {"reshard_after_forward": True}),
        (["full_shard auto_wrap"], {"reshard_after_forward": True}),
        (["shard_grad_op", "offload"], {"reshard_after_forward": False, "cpu_offload": True}),
        (["hybrid_shard"], {"version": 1, "reshard_after_forward": "hybrid_shard"}),
        (
            ["full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "GPT2Block"],
            {"reshard_after_forward": True, "transformer_layer_cls_to_wrap": ["GPT2Block"]},
        ),
        (
            ["full_shard auto_wrap", "--fsdp_min_num_params", "2000", "--fsdp_config", '{"fsdp_xla": false}'],
            {"min_num_params": 2000, "auto_wrap_policy": "SIZE_BASED_WRAP", "xla": False},
        ),
    ],
)
def test_fsdp_options(argv: list[str], config: dict[str, object], parse) -> None:
    fields, modern = parse("--fsdp", *argv)
    assert fields["fsdp"] is True
    assert config.items() <= fields["fsdp_config"].items()
    old = {"--fsdp", *argv} & {"--fsdp", "--fsdp_transformer_layer_cls_to_wrap", "--fsdp_min_num_params"}
    assert sorted(note.split()[0] for note in modern.notes) == sorted(old)


def test_fsdp_options_join_a_configuration_file(parse, tmp_path) -> None:
    path = tmp_path / "fsdp.json"
    path.write_text('{"fsdp_activation_checkpointing": true, "transformer_layer_cls_to_wrap": "A"}')
    fields, _ = parse("--fsdp_config", str(path), "--fsdp", "full_shard", "--fsdp_transformer_layer_cls_to_wrap=B, C")
    assert fields["fsdp_config"]["activation_checkpointing"] is True
    assert fields["fsdp_config"]["transformer_layer_cls_to_wrap"] == ["A", "B", "C"]


def test_fsdp_as_a_switch(parse, known) -> None:
    assert parse("--fsdp", "True")[0]["fsdp"] is True
    assert modernize(["--fsdp"], known) == Modernized(["--fsdp"], [], {})
    assert modernize(["--fsdp", ""], known).argv == []
    with pytest.raises(ValueError, match="--fsdp simple: "):
        modernize(["--fsdp", "simple"], known)


def test_batch_flags_join_the_accelerator_config(parse, tmp_path) -> None:
    path = tmp_path / "accelerator.json"
    path.write_text('{"even_batches": false}')
    fields, modern = parse("--dispatch_batches", "--split-batches=no", "--accelerator_config", str(path))
    config = fields["accelerator_config"]
    assert (config.dispatch_batches, config.split_batches, config.even_batches) == (True, False, False)
    assert len(modern.notes) == 2


def test_unreadable_configuration(known) -> None:
    with pytest.raises(ValueError, match="--accelerator_config absent.json cannot be read"):
        modernize(["--split_batches", "--accelerator_config", "absent.json"], known)


def test_lists(parse) -> None:
    assert parse("--include_for_metrics", "loss", "--include_inputs_for_metrics")[0]["include_for_metrics"] == [
        "loss",
        "inputs",
    ]
    both = ["underflow_overflow", "tpu_metrics_debug"]
    assert lasting(parse("--debug", "underflow_overflow", "--tpu_metrics_debug")[0]["debug"]) == both
    assert lasting(parse("--debug", " ".join(both))[0]["debug"]) == both
    assert parse("--debug", "")[0]["debug"] == []
    assert parse("--debug", *both)[1].notes == []


def test_hub_names(parse) -> None:
    fields, modern = parse("--push_to_hub_organization", "lab", "--push_to_hub_model_id", "gpt")
    assert fields["hub_model_id"] == "lab/gpt"
    assert len(modern.notes) == 2
    assert parse("--hub_private_repo", "--seed", "1")[0]["hub_private_repo"] is True
    assert parse("--hub_private_repo", "False")[0]["hub_private_repo"] is False


@pytest.mark.parametrize("argv", [["--use_auth_token"], ["--use_auth_token", "True"], ["--use-auth-token=False"]])
def test_the_saved_token_needs_no_flag(argv: list[str], known) -> None:
    modern = modernize(argv, known)
    assert modern.argv == []
    assert "token" in modern.notes[0]


def test_local_rank(known, monkeypatch) -> None:
    assert modernize(["--local-rank=0"], known).argv == []
    assert modernize(["--local_rank", "3"], known).environment == {}
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert modernize(["--local_rank", "3"], known).environment == {"LOCAL_RANK": "3"}
    assert modernize(["--local_rank", "-1"], known).environment == {}
    monkeypatch.setenv("LOCAL_RANK", "5")
    modern = modernize(["--local_rank", "3"], known)
    assert (modern.argv, modern.environment, len(modern.notes)) == ([], {}, 1)


@pytest.mark.parametrize("suffix", ["", "_kwargs"])
def test_checkpointing_takes_the_name_that_the_release_knows(suffix: str, known) -> None:
    old, new = f"gradient_checkpointing{suffix}", f"activation_checkpointing{suffix}"
    value = ['{"use_reentrant": false}'] if suffix else []
    for given, runs in ((old, new), (new, old)):
        assert modernize([f"--{given}", *value], known - {given} | {runs}).argv == [f"--{runs}", *value]
        assert modernize([f"--{given}", *value], known | {given}) == Modernized([f"--{given}", *value], [], {})
        assert modernize([f"--{given}", *value], known - {given, runs}).argv == [f"--{given}", *value]


def test_a_word_that_the_parser_knows_passes(known) -> None:
    for name in set(USES) - set(OWN):
        argv = [f"--{name}={USES[name][0]}"]
        assert modernize(argv, {*known, name}) == Modernized(argv, [], {})


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["arguments.json"],
        ["-h"],
        ["--train_file", "no_cuda", "--seed", "1"],
        ["--run_name=--no_cuda"],
        ["--run_name", "--no_cuda of old"],
        ["--config_overrides", "warmup_ratio=0.1,no_cuda=1"],
        ["--output_dir", "evaluation_strategy", "--unheard_of", "1", "--no_keep_linebreaks"],
        ["--do_train", "--", "--no_cuda", "--warmup_ratio", "0.1"],
        ["--use-cpu", "--fp16_opt_level", "O2", "--loss_scale=128", "--use_combine_grad", "--device_id", "0"],
        ["--optim", "adamw_torch", "--ddp_backend=nccl", "--report_to", "none", "--warmup_steps", "10"],
        ["--evaluation_strategies", "steps"],
    ],
)
def test_everything_else_is_untouched(argv: list[str], known) -> None:
    assert modernize(argv, known) == Modernized(argv, [], {})


def test_a_flag_is_no_value_of_the_flag_before_it(known) -> None:
    # As argparse has it: --run_name lacks its value here, and --no_cuda is a flag.
    assert modernize(["--run_name", "--no_cuda"], known).argv == ["--run_name", "--use_cpu"]


def test_help_is_no_value(known) -> None:
    assert modernize(["--no_cuda", "-h"], known).argv == ["-h", "--use_cpu"]


def test_a_value_may_begin_with_a_dash(parse) -> None:
    assert parse("--push_to_hub_token=-secret")[0]["hub_token"] == "-secret"


def test_no_boolean(known) -> None:
    with pytest.raises(ValueError, match="--no_cuda takes true or false, not maybe"):
        modernize(["--no_cuda", "maybe"], known)


MODEL_ZOO = """--model_name_or_path gpt2 --train_file a.txt --do_train --evaluation_strategy steps --eval_steps 5
    --fp16 --fp16_opt_level O2 --half_precision_backend apex --loss_scale 128 --use_combine_grad --no_cuda
    --optim adamw_apex_fused_npu --warmup_ratio 0.1 --device_id 0 --local_rank -1"""


def test_a_command_line_of_the_model_zoo(parse) -> None:
    fields, modern = parse(*MODEL_ZOO.split())
    assert (fields["fp16_opt_level"], fields["use_combine_grad"], fields["loss_scale"]) == ("O2", True, "128")
    assert (lasting(fields["optim"]), lasting(fields["eval_strategy"])) == ("adamw_torch_fused", "steps")
    assert (fields["use_cpu"], fields["warmup_steps"], fields["do_train"]) == (True, 0.1, True)
    assert fields["half_precision_backend"] == "apex"
    assert len(modern.notes) == len(set(modern.notes)) == 5


def test_neither_torch_nor_transformers_is_imported() -> None:
    program = "import sys, utils.legacy_arguments; print(*({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
