"""A config file that a command line writes gives the same arguments when it is read."""

import yaml
from commands import run_script

from utils import arguments, config_file
from utils.data_arguments import CausalDataArguments

TYPES = (arguments.ModelArguments, CausalDataArguments, arguments.LanguageModelingArguments)


def namespace(words: list[str]):
    parser = arguments.Parser(TYPES)
    return parser.parse_args(config_file.expand(words, parser)), parser


def test_what_is_written_reads_the_same(tmp_path) -> None:
    words = ["--model_type", "gpt2", "--config_overrides", "n_embd=32", "--train_file", "a b.txt"]
    words += [
        "--learning_rate",
        "1e-4",
        "--loss_scale",
        "128",
        "--fp16",
        "--fp16_opt_level",
        "O2",
        "--keep_linebreaks",
        "no",
    ]
    words += [
        "--lr_scheduler_kwargs",
        '{"num_cycles": 2}',
        "--save_strategy",
        "no",
        "--run_name",
        "true",
        "--optim",
        "sgd",
    ]
    words += [
        "--warmup_steps",
        "0.1",
        "--report_to",
        "tensorboard",
        "--output_dir",
        "out: 1",
        "--validation_file",
        "1",
        "no",
    ]
    before, parser = namespace(words)
    text = config_file.text(before, parser, {"TENSORBOARD_LOGGING_DIR": "runs"})
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    after, _ = namespace([str(tmp_path / "run.yaml")])
    assert vars(after) == vars(before)
    assert text.startswith("# with the variable TENSORBOARD_LOGGING_DIR=runs\n")
    assert set(yaml.safe_load(text)) == {word[2:] for word in words if word.startswith("--")}


def test_secrets_and_questions_are_not_written() -> None:
    given, parser = namespace(["--token", "hf_a", "--hub_token", "hf_b", "--dry_run", "--print_config", "--do_train"])
    assert config_file.text(given, parser, {}) == "do_train: true\n"


def test_print_config_prints_it_and_ends(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("words\n")
    words = ["--model_type", "gpt2", "--train_file", tmp_path / "a.txt", "--do_train", "--use_cpu"]
    words += ["--evaluation_strategy", "steps", "--output_dir", tmp_path / "out"]
    done = run_script("run_clm.py", *words, "--print_config")
    assert yaml.safe_load(done.stdout) == {
        "model_type": "gpt2",
        "train_file": [str(tmp_path / "a.txt")],
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "do_train": True,
        "eval_strategy": "steps",
    }
    assert not (tmp_path / "out").exists()
