"""The command line: what can be said, in flags or in a file, and every check that needs no data.

Only what parsing needs is imported here, so that `--help` and the answer to a typo come at once: Trainer, datasets and
evaluate are imported by the scripts after parsing.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from utils.training_arguments import LanguageModelingArguments  # isort: skip  (first, as it tells)
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from utils import command_help, config_file, garbage_collection, hub, mistyped, modelscope, sharding
from utils.data_arguments import DataArguments
from utils.errors import UsageError, one_line
from utils.legacy_arguments import modernize
from utils.model_arguments import ModelArguments


class Parser(HfArgumentParser):
    """HfArgumentParser whose errors are one line that names the flag, and whose help is in groups.

    A flag that is true, false or left to the run, such as --torch_compile, means true where it stands alone.
    """

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        for action in self._actions:
            if action.type is string_to_bool and action.nargs is None:
                action.nargs, action.const = "?", True

    def error(self, message: str) -> NoReturn:
        told = one_line(ValueError(mistyped.wrong_value(message)))
        raise UsageError(told if told.endswith("?") else f"{told}; --help lists all flags")

    def format_help(self) -> str:
        own = {"Model": ModelArguments, "Text": DataArguments}
        fields = {
            group: {
                f.name for kind in self.dataclass_types if issubclass(kind, base) for f in dataclasses.fields(kind)
            }
            for group, base in own.items()
        }
        return command_help.text(self, fields, self.description)


def parse(
    types: Sequence[type], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[tuple, list[str]]:
    """Instances of the dataclasses `types` from the command line, and notes on old words that were translated.

    The command line is flags, or one JSON or YAML file of {flag: value}, or such a file and flags, which win. Flags of
    transformers 4.20 to 4.57 and of Ascend's scripts mean what they meant. Raises UsageError.
    """
    parser = Parser(types, description=description)
    words = config_file.expand(list(sys.argv[1:] if argv is None else argv), parser)
    try:
        modernized = modernize(words, known_flags(parser))
    except ValueError as error:
        raise UsageError(str(error)) from error
    os.environ.update(modernized.environment)
    _check_json(modernized.argv)
    namespace, unknown = parser.parse_known_args(modernized.argv)
    if unknown:
        given = list(sys.argv[1:] if argv is None else argv)
        from_file = words is not given and unknown[0] in words and unknown[0] not in given
        place = f"{given[0]}: " if from_file else ""
        raise UsageError(place + mistyped.unknown_flag(unknown[0], known_flags(parser)))
    try:
        with garbage_collection.paused():  # transformers imports half of itself only here
            instances = parser.parse_args_into_dataclasses(modernized.argv, look_for_args_file=False)
    except UsageError:
        raise
    except ImportError as error:
        if "deepspeed" in str(error).lower():
            raise UsageError(f"--deepspeed: {one_line(error)}; pip install deepspeed") from error
        raise UsageError(one_line(error)) from error
    except (ValueError, TypeError, ArithmeticError, OSError) as error:
        raise UsageError(one_line(error)) from error
    for instance in instances:
        if isinstance(instance, LanguageModelingArguments):
            instance.config_text = config_file.text(namespace, parser, modernized.environment)
    return tuple(instances), modernized.notes


def parse_run(data: type[DataArguments], description: str) -> tuple:
    """(ModelArguments, `data`, LanguageModelingArguments, notes for the log) of a script, from its command line.

    Raises UsageError for what cannot be run, as far as flags alone tell.
    """
    (model, text, args), notes = parse((ModelArguments, data, LanguageModelingArguments), description=description)
    check_run(text, args)
    if args.print_config:
        if args.process_index == 0:
            print(args.config_text, end="")
        sys.exit()
    text.hub = model.hub
    if model.hub == "modelscope":
        if args.push_to_hub:
            raise UsageError("--push_to_hub pushes to the Hugging Face hub: leave it or --hub modelscope out")
        modelscope.check_installed()
        return model, text, args, notes + args.notes
    names = [model.model_name_or_path, model.config_name, model.tokenizer_name, text.dataset_name]
    return model, text, args, notes + args.notes + hub.use_cache_if_unreachable(names)


def _check_json(words: Sequence[str]) -> None:
    """Raises UsageError for a value that sets out to be JSON and is not, or for a JSON file that is not there."""
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, _, word = word.partition("=")
        if word.startswith("{"):
            try:
                json.loads(word)
            except json.JSONDecodeError as error:
                raise UsageError(f"{flag} {word}: is not JSON: {error.msg} at column {error.colno}") from error
        elif flag in ("--accelerator_config", "--deepspeed") and word.endswith(".json") and not os.path.isfile(word):
            raise UsageError(f"{flag} {word}: no such file")


def known_flags(parser: Parser) -> set[str]:
    """Names of all flags, without dashes, with underscores."""
    return {option[2:].replace("-", "_") for option in parser._option_string_actions if option.startswith("--")}


def check_run(data: DataArguments, args: LanguageModelingArguments) -> None:
    """Raises UsageError for a run that cannot be, as far as flags alone tell."""
    if not (args.do_train or args.do_eval):
        raise UsageError("nothing to do: add --do_train, --do_eval or both")
    sharding.check(args)
    if args.do_train and not (data.dataset_name or data.train_file or data.data_mix):
        raise UsageError("--do_train: no training text; add --train_file FILE")
    if args.do_train and data.streaming and args.max_steps <= 0:
        _check_countable(data)
    if data.streaming and args.elastic:
        raise UsageError(
            "--elastic: a stream is shared out among so many processes, each of which keeps its own place in it; drop "
            "--streaming or --elastic"
        )
    if data.streaming and args.on_loss_spike == "rollback":
        raise UsageError(
            "--on_loss_spike rollback: batches of a stream cannot be skipped; use warn, or drop --streaming"
        )


def _check_countable(data: DataArguments) -> None:
    """Raises UsageError for a stream whose steps cannot be counted beforehand."""
    reason = None
    if data.dataset_name and not os.path.exists(os.path.expanduser(data.dataset_name)):
        reason = (
            f"--dataset_name {data.dataset_name}: how much text of the hub makes an epoch is known when it is read"
        )
    elif data.data_mix:
        reason = "--data_mix: files that are drawn from by weight begin again at different times"
    elif data.packing == "documents":
        reason = "--packing documents: how many blocks a stream makes depends on its order"
    if reason is not None:
        raise UsageError(f"--streaming with {reason}; add --max_steps N")


def wants_traceback(argv: Sequence[str] | None = None) -> bool:
    """Whether `--log_level debug` stands in the command line: errors then show where they come from."""
    words = " ".join(sys.argv[1:] if argv is None else argv).replace("=", " ").replace("log-level", "log_level")
    return "--log_level debug" in words


def snapshot(instances: Sequence) -> dict:
    """{flag: value} of all arguments, as JSON knows them: what a run is compared by. Tokens are left out."""
    values: dict = {}
    for instance in instances:
        plain = instance.to_dict() if isinstance(instance, TrainingArguments) else dataclasses.asdict(instance)
        secrets = ("token", "hub_token")
        values.update(
            {f.name: plain[f.name] for f in dataclasses.fields(instance) if f.init and f.name not in secrets}
        )
    return json.loads(json.dumps(values, default=str))
