"""What can be said on the command line and in files, and the one line that answers what cannot."""

import dataclasses
import json
import os

import pytest
import yaml
from transformers import TrainingArguments

from utils import arguments
from utils.data_arguments import CausalDataArguments
from utils.errors import UsageError

TYPES = (arguments.ModelArguments, CausalDataArguments, arguments.LanguageModelingArguments)
BASE = {"model_type": "gpt2", "train_file": "a.txt", "do_train": True, "output_dir": "out"}
WORDS = ["--model_type", "gpt2", "--train_file", "a.txt", "--do_train", "--output_dir", "out"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Old words and --device_id set variables."""
    before = dict(os.environ)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    os.environ.clear()
    os.environ.update(before)


def parse(*words, base: list = WORDS) -> dict:
    """{flag: value} of a command line that is all right."""
    instances, _ = arguments.parse(TYPES, [*base, *map(str, words)])
    arguments.check_run(*instances[1:])
    return arguments.snapshot(instances)


def refusal(*words, base: list = WORDS) -> str:
    with pytest.raises(UsageError) as caught:
        parse(*words, base=base)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(folder, content: dict | str | bytes, name: str = "c.json") -> str:
    if isinstance(content, dict):
        content = json.dumps(BASE | content) if name.endswith(".json") else yaml.safe_dump(BASE | content)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


# ---- the command line ----
def test_flags_and_defaults():
    values = parse("--block_size", "64", "--learning-rate", "1e-3", "--no_keep_linebreaks")
    assert (values["block_size"], values["learning_rate"], values["keep_linebreaks"]) == (64, 1e-3, False)
    assert (values["validation_split_percentage"], values["fp16_opt_level"], values["do_eval"]) == (5, None, False)
    assert values["train_file"] == ["a.txt"]
    assert parse("--validation_file", "b.txt", "c.txt")["validation_file"] == ["b.txt", "c.txt"]
    assert parse("--max_steps", "3", "--max_steps=4")["max_steps"] == 4


def test_two_parses_are_equal_and_hold_no_secret():
    values = parse("--token", "hf_1", "--hub_token", "hf_2")
    assert values == parse() and "token" not in values and "hf_" not in json.dumps(values)
    assert values == json.loads(json.dumps(values))


FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}


def test_every_flag_of_training_arguments_is_known():
    assert set(FIELDS) <= arguments.known_flags(arguments.Parser(TYPES))


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if isinstance(f.default, str | int | float)])
def test_every_flag_of_training_arguments_takes_its_default(name):
    default = getattr(FIELDS[name].default, "value", FIELDS[name].default)
    if name not in ("output_dir", "do_train", "local_rank", "torch_compile"):  # which is left to the run
        assert parse(f"--{name}", default) == parse()


# Those whose default is None, and some with values that need more than one word. (words, what is parsed)
VALUES = {
    "warmup_steps": (["0.1"], 0.1),
    "eval_steps": (["2"], 2),
    "eval_accumulation_steps": (["2"], 2),
    "save_total_limit": (["2"], 2),
    "data_seed": (["3"], 3),
    "neftune_noise_alpha": (["0.5"], 0.5),
    "lr_scheduler_kwargs": (['{"num_cycles": 2}'], {"num_cycles": 2}),
    "include_for_metrics": (["loss", "inputs"], ["loss", "inputs"]),
    "label_names": (["a", "b"], ["a", "b"]),
    "debug": (["underflow_overflow"], ["underflow_overflow"]),
    "ddp_find_unused_parameters": (["false"], False),
    "disable_tqdm": (["true"], True),
    "run_name": (["name"], "name"),
    "hub_model_id": (["me/it"], "me/it"),
    "optim_args": (["a=1"], "a=1"),
    "report_to": (["none"], []),
    "torch_compile_backend": (["eager"], "eager"),
    "torch_compile": ([], True),
    "tf32": (["false"], False),
    "dataloader_num_workers": (["2"], 2),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_flag_takes_its_value(name):
    words, value = VALUES[name]
    assert parse(f"--{name}", *words)[name] == value


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
@pytest.mark.parametrize("scale", [None, "dynamic", "128"])
def test_levels(level, scale):
    scale = [] if scale is None or level == "O0" else ["--loss_scale", scale]
    assert parse("--bf16", "--fp16_opt_level", level, *scale)["fp16_opt_level"] == level


# ---- files ----
@pytest.mark.parametrize("name", ["c.json", "c.yaml", "c.yml"])
def test_a_file_says_what_flags_say(name, tmp_path):
    content = {
        "train_file": ["a.txt", "b.txt"],
        "learning_rate": 1e-5,
        "use_cpu": True,
        "keep_linebreaks": False,
        "max_steps": -1,
        "run_name": None,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "text_column": "my text",
    }
    values = parse(base=[write(tmp_path, content, name)])
    flags = ["--train_file", "a.txt", "b.txt", "--learning_rate", "1e-5", "--use_cpu", "--no_keep_linebreaks"]
    flags += ["--max_steps", "-1", "--lr_scheduler_kwargs", '{"num_cycles": 2}', "--text_column", "my text"]
    assert values == parse(*flags)
    assert values["train_file"] == ["a.txt", "b.txt"] and values["keep_linebreaks"] is False


def test_yamls_own_words(tmp_path):
    text = "model_type: gpt2\ntrain_file: [a.txt]\ndo_train: yes\nbf16: off\nlearning_rate: 5e-5  # a string\noutput_dir: out\n"
    assert parse(base=[write(tmp_path, text, "c.yaml")]) == parse()


def test_flags_after_a_file_win(tmp_path):
    file = write(tmp_path, {"max_steps": 5, "use_cpu": True, "seed": 7})
    values = parse("--max_steps", "9", "--use_cpu", "false", base=[file])
    assert (values["max_steps"], values["seed"]) == (9, 7)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"evaluation_strategy": "steps", "do_eval": True}, {"eval_strategy": "steps"}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"per_gpu_train_batch_size": 3}, {"per_device_train_batch_size": 3}),
        ({"no_cuda": True}, {"use_cpu": True}),
        ({"torch_dtype": "float32"}, {"dtype": "float32"}),
        ({"optim": "adamw_hf"}, {"optim": "adamw_torch"}),
        ({"debug": ""}, {"debug": []}),
    ],
)
def test_old_words_work_in_files_and_leave_a_note(old, new, tmp_path):
    instances, notes = arguments.parse(TYPES, [write(tmp_path, old)])
    values = arguments.snapshot(instances)
    assert {name: values[name] for name in new} == new
    [note] = notes
    assert note.startswith("--")


def test_an_old_word_without_a_successor_is_refused_in_files_too(tmp_path):
    assert "--sharded_ddp simple" in refusal(base=[write(tmp_path, {"sharded_ddp": "simple"})])


# ---- one line for every mistake ----
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--max_stepz", "3"], "unknown flag --max_stepz; did you mean --max_steps?"),
        (["--qqqqqqq"], "unknown flag --qqqqqqq; --help lists all flags"),
        (["stray"], "unexpected argument 'stray'"),
        (["--max_steps", "x"], "--max_steps"),
        (["--max_steps"], "--max_steps"),
        (["--do_train", "maybe"], "--do_train"),
        (["--optim", "nosuch"], "--optim nosuch: choose one of"),
        (["--eval_strategy", "weekly"], "--eval_strategy weekly: choose one of"),
        (["--fp16", "--bf16"], "--fp16 and --bf16 contradict each other"),
        (["--fp16_opt_level", "O2"], "--fp16_opt_level O2 needs a half type: add --fp16 or --bf16"),
        (["--bf16", "--fp16_opt_level", "O7"], "--fp16_opt_level O7: choose one of"),
        (["--loss_scale", "dynamic"], "--loss_scale dynamic"),
        (["--bf16", "--loss_scale", "abc"], "--loss_scale abc: expected 'dynamic' or a positive number"),
        (["--bf16", "--loss_scale", "0"], "--loss_scale 0: expected 'dynamic' or a positive number"),
        (["--bf16", "--loss_scale=-2"], "--loss_scale -2: expected 'dynamic' or a positive number"),
        (["--bf16", "--loss_scale", "nan"], "--loss_scale nan: expected 'dynamic' or a positive number"),
        (["--use_combine_grad", "--optim", "adafactor"], "--optim adafactor cannot run with --use_combine_grad"),
        (["--bf16", "--fp16_opt_level", "O2", "--optim", "galore_adamw"], "--optim galore_adamw cannot run at O2"),
        (["--fsdp"], "--fsdp: one process has nobody to share weights with"),
        (["--ddp_comm_hook", "bf16", "--fsdp"], "--ddp_comm_hook bf16: --fsdp sends gradients itself"),
        (["--ddp_comm_hook", "int8"], "--ddp_comm_hook int8: choose one of"),
        (["--model_name_or_path", "gpt2", "--config_overrides", "n_embd=8"], "remove --model_name_or_path"),
        (["--config_name", "gpt2", "--config_overrides", "n_embd=8"], "remove --config_name"),
        (["--dataset_name", "wikitext"], "--dataset_name wikitext and --train_file/--validation_file a.txt"),
        (["--streaming", "--packing", "documents"], "a stream makes depends on its order; add --max_steps N"),
        (["--block_size", "1"], "--block_size 1"),
        (["--vocab_size", "0"], "--vocab_size 0"),
        (["--validation_split_percentage", "0"], "--validation_split_percentage 0"),
        (["--validation_split_percentage", "100"], "--validation_split_percentage 100"),
        (["--max_train_samples", "0"], "--max_train_samples 0"),
        (["--max_eval_samples", "-1"], "--max_eval_samples -1"),
        (["--preprocessing_num_workers", "0"], "--preprocessing_num_workers 0"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0"),
        (["--device_id", "-1"], "--device_id -1"),
        (["--output_dir", __file__], f"--output_dir {__file__}: is a file"),
        (["--save_strategy", "epoch", "--load_best_model_at_end"], "--load_best_model_at_end"),
        (["--deepspeed", '{"zero_optimization": {"stage": 1}}'], "pip install deepspeed"),
        (["--lr_scheduler_kwargs", "{oops"], "--lr_scheduler_kwargs"),
        (["--accelerator_config", "no.json"], "--accelerator_config"),
        (["--seed", "-1"], "--seed -1"),
        (["--learning_rate", "nan"], "--learning_rate nan"),
        (["--learning_rate", "-1"], "--learning_rate -1"),
        (["--num_train_epochs", "-1"], "--num_train_epochs -1"),
        (["--max_steps", "0"], "--max_steps 0"),
        (["--report_to", "tensorbord"], "--report_to tensorbord: choose one of none, all, "),
        (["--report_to", "clearml"], "--report_to clearml: its package is not installed"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers -1"),
        (
            ["--metric_for_best_model", "perplexity"],
            "--metric_for_best_model perplexity: an evaluation tells loss and",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(words, expected):
    assert expected in refusal(*words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no model: add --model_name_or_path"),
        (["--train_file", "a.txt"], "no model: add --model_name_or_path"),
        (["--model_type", "gpt2"], "no text: add --train_file"),
        (["--model_type", "gpt2", "--train_file", "a.txt"], "nothing to do: add --do_train"),
        (["--model_type", "gpt2", "--validation_file", "a.txt", "--do_train"], "--do_train: no training text"),
        (["no.json"], "no.json: cannot be read (No such file or directory)"),
        (["--seed", "1", "late.json"], "unexpected argument 'late.json'"),
    ],
)
def test_something_is_missing(words, expected):
    assert expected in refusal(base=words)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("c.json", '{"model_type": "gpt2",\n "max_steps": 3,\n "bf16": tru}', "line 3 is not JSON"),
        ("c.json", "", "line 1 is not JSON"),
        ("c.json", "[1]", "expected a mapping of flags to values, found list"),
        ("c.json", b'{"a": "\xe9"}', "cannot be read"),
        ("c.yaml", "model_type: gpt2\nseed: 1\n  bf16: true\n", "line 3 is not YAML"),
        ("c.yml", "a: [1,\nb: 2\n", "is not YAML"),
        ("c.yaml", "", "expected a mapping of flags to values, found NoneType"),
        ("c.yaml", "model_type gpt2", "expected a mapping of flags to values, found str"),
        ("c.json", {"max_stepz": 3}, "unknown flag --max_stepz; did you mean --max_steps?"),
        ("c.yaml", {"max_stepz": 3}, "unknown flag --max_stepz; did you mean --max_steps?"),
        ("c.json", {"max_steps": "x"}, "--max_steps"),
        ("c.json", {"fp16": True, "bf16": True}, "--fp16 and --bf16 contradict each other"),
        ("c.json", {"max_stepz": 3}, "c.json: "),
        ("c.json", {"learning_rate": [1, 2]}, "learning_rate"),
    ],
)
def test_a_mistake_in_a_file(name, content, expected, tmp_path):
    file = write(tmp_path, content, name)
    message = refusal(base=[file])
    assert expected in message
    assert isinstance(content, dict) or message.startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("content", "value"), [({"include_for_metrics": []}, []), ({"text_column": "--odd"}, "--odd")]
)
def test_values_in_files_that_are_awkward_on_a_command_line(content, value, tmp_path):
    [name] = content
    assert parse(base=[write(tmp_path, content)])[name] == value


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--log_level", "debug"], True),
        (["--log-level=debug"], True),
        (["--log_level", "info"], False),
        ([], False),
    ],
)
def test_who_wants_a_traceback(words, wanted):
    assert arguments.wants_traceback([*WORDS, *words]) is wanted


# ---- settled by the flags together ----
@pytest.mark.parametrize("level, is_kept", [("O1", True), ("O2", False), ("O3", False)])
def test_a_model_whose_weights_are_half_is_evaluated_as_it_is(level, is_kept, tmp_path):
    args = arguments.LanguageModelingArguments(str(tmp_path), bf16=True, fp16_opt_level=level, bf16_full_eval=True)
    assert args.bf16_full_eval is is_kept
    assert any("--bf16_full_eval is not needed" in note for note in args.notes) is not is_kept


def test_a_prediction_is_told_to_be_none(tmp_path):
    args = arguments.LanguageModelingArguments(str(tmp_path), do_predict=True)
    assert any("--do_predict does nothing" in note for note in args.notes)


def test_one_process_uses_one_of_several_devices(tmp_path):
    args = arguments.LanguageModelingArguments(str(tmp_path), use_cpu=True)
    before = list(args.notes)
    args._n_gpu = 4
    args._use_one_device()
    assert args.n_gpu == 1 and "torchrun --nproc_per_node=4" in args.notes[-1]
    args._use_one_device()
    assert len(args.notes) == len(before) + 1
