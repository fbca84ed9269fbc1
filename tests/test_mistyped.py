"""A mistyped flag or value is answered with what was meant."""

import dataclasses
import re

import pytest

from utils import arguments, mistyped
from utils.data_arguments import CausalDataArguments, MaskedDataArguments, PermutedDataArguments
from utils.errors import UsageError

PARSER = arguments.Parser((arguments.ModelArguments, CausalDataArguments, arguments.LanguageModelingArguments))
KNOWN = arguments.known_flags(PARSER)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--learnig_rate", "learning_rate"),
        ("--do_trian", "do_train"),
        ("--lr", "learning_rate"),
        ("--epochs", "num_train_epochs"),
        ("--batch-size", "per_device_train_batch_size"),
        ("--opt_level", "fp16_opt_level"),
        ("--combine_grads", "use_combine_grad"),
        ("--block", "block_size"),
        ("--Do_Train", "do_train"),
        ("--train_data=x.txt", "train_file"),
        ("--percentage", "validation_split_percentage"),
    ],
)
def test_the_nearest_flag_is_named(word, meant) -> None:
    assert mistyped.unknown_flag(word, KNOWN).endswith(f"did you mean --{meant}?")


@pytest.mark.parametrize(
    ("data", "own", "words"),
    [
        (CausalDataArguments, "block_size", ["--max_seq_length", "--max-length=128", "--seq_len"]),
        (MaskedDataArguments, "max_seq_length", ["--block_size", "--max-length=128", "--seq_len"]),
        (PermutedDataArguments, "max_seq_length", ["--block_size", "--max-length=128", "--seq_len"]),
    ],
)
def test_the_length_of_a_sample_has_one_name_in_each_script(data, own, words) -> None:
    known = arguments.known_flags(
        arguments.Parser((arguments.ModelArguments, data, arguments.LanguageModelingArguments))
    )
    for word in words:
        assert mistyped.unknown_flag(word, known).endswith(f"did you mean --{own}?")


@pytest.mark.parametrize("word, meant", [("--lr", "learning_rate"), ("--dataset", "dataset_name")])
def test_the_beginning_of_several_flags_may_be_another_programs_word(word, meant) -> None:
    with pytest.raises(UsageError, match=f"^unknown flag {word}; did you mean --{meant}\\?"):
        PARSER.parse_args([word, "x"])


def test_a_flag_of_another_script_names_it() -> None:
    assert mistyped.unknown_flag("--mlm-probability=0.2", KNOWN).endswith("it is a flag of run_mlm.py")
    for data, names in ((MaskedDataArguments, ["run_mlm.py"]), (PermutedDataArguments, ["run_plm.py"])):
        own = {field.name for field in dataclasses.fields(data)} - {
            f.name for f in dataclasses.fields(CausalDataArguments)
        }
        assert own - {"max_seq_length"} == {flag for flag, of in mistyped.OF_SCRIPTS.items() if names[0] in of}


def test_what_is_like_no_flag_gets_no_guess() -> None:
    assert mistyped.unknown_flag("--zzqqxx", KNOWN) == "unknown flag --zzqqxx; --help lists all flags"


def test_wrong_dashes() -> None:
    assert "flags start with two hyphens: --do_train" in mistyped.unknown_flag("-do_train", KNOWN)
    assert "type --do_train" in mistyped.unknown_flag("\u2014do_train", KNOWN)
    assert "flags start with --" in mistyped.unknown_flag("do_train", KNOWN)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fp16_opt_level", "o2"], "--fp16_opt_level o2: did you mean O2? Else choose one of O0, O1, O2, O3"),
        (
            ["--eval_strategy", "epochs"],
            "--eval_strategy epochs: did you mean epoch? Else choose one of no, steps, epoch",
        ),
        (["--learning_rate", "fast"], "--learning_rate fast: give a number"),
        (["--max_steps", "1.5"], "--max_steps 1.5: give a whole number"),
        (["--max_steps"], "--max_steps: expected one argument"),
        (["--seed=x"], "--seed x: give a whole number"),
    ],
)
def test_wrong_values(words, message) -> None:
    with pytest.raises(UsageError) as caught:
        PARSER.parse_args(words)
    assert str(caught.value) == f"{message}; --help lists all flags"


def test_of_many_choices_the_nearest_and_a_few_are_named() -> None:
    with pytest.raises(UsageError) as caught:
        PARSER.parse_args(["--optim", "adamw"])
    assert str(caught.value).startswith(
        "--optim adamw: did you mean adamw_torch? Else choose one of adamw_torch, adam"
    )
    assert re.search(r" and \d\d more; --help lists all flags$", str(caught.value)) and len(str(caught.value)) < 400


def test_a_prefix_of_several_flags() -> None:
    with pytest.raises(UsageError) as caught:
        PARSER.parse_args(["--per_device", "8"])
    assert str(caught.value).startswith(
        "unknown flag --per_device; did you mean --per_device_eval_batch_size or --per_device_train_batch_size?"
    )
