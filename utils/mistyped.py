"""What somebody may have meant: the answer to a flag or a value that is none."""

import difflib
import re
from collections.abc import Collection

# What other programs call our flags.
ELSEWHERE = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "steps": "max_steps",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "model_path": "model_name_or_path",
    "tokenizer": "tokenizer_name",
    "dataset": "dataset_name",
    "data_path": "train_file",
    "train_data_file": "train_file",
    "eval_data_file": "validation_file",
    "eval_file": "validation_file",
    "output": "output_dir",
    "opt_level": "fp16_opt_level",
    "amp_level": "fp16_opt_level",
    "combine_grad": "use_combine_grad",
    "device": "device_id",
    "grad_accumulation": "gradient_accumulation_steps",
    "warmup": "warmup_steps",
}
# The length of a sample has a name for text in blocks and one for sequences: a script has one of them.
LENGTHS = ("block_size", "max_seq_length")
LENGTHS_ELSEWHERE = {
    *LENGTHS,
    "max_length",
    "max_len",
    "max_seq_len",
    "seq_length",
    "seq_len",
    "sequence_length",
    "context_length",
}
# Flags that not all three scripts have.
OF_SCRIPTS = {
    "line_by_line": "run_mlm.py and run_plm.py",
    "pad_to_max_length": "run_mlm.py and run_plm.py",
    "mlm_probability": "run_mlm.py",
    "whole_word_mask": "run_mlm.py",
    "plm_probability": "run_plm.py",
    "max_span_length": "run_plm.py",
}
SHOWN = 12  # of a flag's choices
LONG_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"


def unknown_flag(word: str, known: Collection[str]) -> str:
    """The message for a word of the command line that is no flag. known: the flags, without dashes, with underscores."""
    if word[:1] in tuple(LONG_DASHES):
        name = word.lstrip(LONG_DASHES + "-")
        return f"{word}: begins with another sign than two hyphens, as text that was copied may; type --{name}"
    if not word.startswith("-"):
        return (
            f"unexpected argument {word!r}: flags start with --, and a config file comes first; --help lists all flags"
        )
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    if name in known:
        return f"unknown flag {word}: flags start with two hyphens: --{name}"
    if name in OF_SCRIPTS:
        return f"unknown flag --{name}: it is a flag of {OF_SCRIPTS[name]}"
    meant = meant_flag(name, known)
    remedy = f"did you mean --{meant}?" if meant else "--help lists all flags"
    return f"unknown flag --{name}; {remedy}"


def meant_flag(name: str, known: Collection[str]) -> str | None:
    """The known flag that a name is likest to: by other programs' words, by letters, or by a part of it."""
    name = name.lower()
    for elsewhere in (name, name.removeprefix("no_")):
        if ELSEWHERE.get(elsewhere) in known:
            return ELSEWHERE[elsewhere]
    if name in LENGTHS_ELSEWHERE and (own := [flag for flag in LENGTHS if flag in known]):
        return own[0]
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
    if close:
        return close[0]
    holding = [flag for flag in known if f"_{name}_" in f"_{flag}_" or flag.startswith(name) and len(name) > 2]
    if holding:
        return min(holding, key=lambda flag: (len(flag), flag))
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)


def wrong_value(message: str) -> str:
    """argparse's message about a flag's value, said as all our errors are: flag, value, remedy."""
    if found := re.match(r"ambiguous option: (\S+) could match (.*)", message):
        flag = found[1].split("=")[0]
        flags = sorted({flag.strip().replace("-", "_").replace("__", "--", 1) for flag in found[2].split(",")})
        if elsewhere := ELSEWHERE.get(flag.lstrip("-").replace("-", "_")):
            flags = [f"--{elsewhere}"]
        return f"unknown flag {flag}; did you mean {_one_of(flags)}?"
    found = re.match(r"argument (--[\w-]+)(?:/\S+)?: (.*)", message, re.DOTALL)
    if not found:
        return message
    flag, said = found[1], found[2]
    if choice := re.match(r"invalid choice: (.+?) \(choose from (.*)\)$", said):
        value, choices = choice[1].strip("'\""), [word.strip(" '\"") for word in choice[2].split(",")]
        begun = [choice for choice in choices if value and choice.lower().startswith(value.lower())]
        close = begun or difflib.get_close_matches(value.lower(), choices, n=1)
        meant = f"did you mean {close[0]}? Else " if close else ""
        more = f" and {len(choices) - SHOWN} more" if len(choices) > SHOWN else ""
        return f"{flag} {value}: {meant}choose one of {', '.join(choices[:SHOWN])}{more}"
    if number := re.match(r"invalid (?:int|float|\w+) value: '?(.*?)'?$", said):
        kind = (
            "a whole number"
            if "int" in said.split(" value")[0]
            else "a number"
            if "float" in said
            else "another value"
        )
        return f"{flag} {number[1]}: give {kind}"
    if said.startswith("expected"):
        return f"{flag}: {said}"
    return f"{flag}: {said}"


def _one_of(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
