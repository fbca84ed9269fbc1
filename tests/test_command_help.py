"""--help: every flag once, in a group, with its default; examples that parse."""

import re
import shlex

import pytest

from utils import arguments, command_help
from utils.data_arguments import CausalDataArguments, MaskedDataArguments, PermutedDataArguments

DATA = (CausalDataArguments, MaskedDataArguments, PermutedDataArguments)


def parser_of(data: type) -> arguments.Parser:
    return arguments.Parser(
        (arguments.ModelArguments, data, arguments.LanguageModelingArguments), description="Trains.", prog="run.py"
    )


@pytest.mark.parametrize("data", DATA)
def test_every_flag_stands_in_one_group_with_its_default(data) -> None:
    parser = parser_of(data)
    shown = parser.format_help()
    flags = re.findall(r"^  --(\w+)", shown, re.MULTILINE)
    negations = {flag for flag in arguments.known_flags(parser) if flag.startswith("no_")}
    assert sorted(flags) == sorted(arguments.known_flags(parser) - negations - {"help"})
    assert len(flags) > 140
    for told in re.split(r"^  --", shown, flags=re.MULTILINE)[1:]:
        assert re.search("default", told, re.IGNORECASE), told
    assert max(map(len, shown.splitlines())) <= 140


def test_the_projects_own_flags_come_first() -> None:
    shown = parser_of(CausalDataArguments).format_help()
    own, others = shown.split("The flags below are those of transformers' TrainingArguments.")
    for flag in (
        "model_type",
        "train_file",
        "block_size",
        "use_combine_grad",
        "fp16_opt_level",
        "device_id",
        "dry_run",
    ):
        assert f"\n  --{flag}" in own
    for flag in ("learning_rate", "ddp_timeout", "hub_model_id", "save_steps"):
        assert f"\n  --{flag}" in others
    assert "\n  --fp16_opt_level {O0,O1,O2,O3}\n" in own and "\n  --train_file PATH ...\n" in own


def test_few_flags_are_in_no_group_of_a_name() -> None:
    parser = parser_of(CausalDataArguments)
    others = [f for f in arguments.known_flags(parser) if command_help.group_of(f, {}) == "Others"]
    own = {f for kind in (arguments.ModelArguments, CausalDataArguments) for f in kind.__dataclass_fields__}
    assert [f for f in others if f not in own and not f.startswith("no_") and f != "help"] == []


def test_examples_parse() -> None:
    known = set()
    for data in DATA:
        known |= arguments.known_flags(parser_of(data))
    for flag, example in command_help.EXAMPLES.items():
        assert flag in known
        for word in shlex.split(example):
            assert not word.startswith("--") or word[2:] in known, word
