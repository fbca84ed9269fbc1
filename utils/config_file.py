"""Config files: a run's flags in YAML or JSON, read and written."""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping

from utils.errors import UsageError, one_line

# What is not written: secrets, and flags that ask for words instead of a run.
LEFT_OUT = ("token", "hub_token", "dry_run", "print_config")


def text(namespace: Namespace, parser: ArgumentParser, environment: Mapping[str, str]) -> str:
    """The command line as a config file in YAML, which `expand` reads back: what differs from the defaults.

    namespace: of `parser`. environment: variables that old flags stand for; they are told in comments.
    """
    import yaml

    defaults = vars(parser.parse_known_args([])[0])  # as flags would have them: a default may be a word that is parsed
    given = {
        name: _plain(value)
        for name, value in vars(namespace).items()
        if value != defaults[name] and name not in LEFT_OUT
    }
    variables = "".join(f"# with the variable {name}={value}\n" for name, value in environment.items())
    return variables + yaml.safe_dump(given, sort_keys=False, allow_unicode=True, default_flow_style=False)


def _plain(value):
    """Without the classes that argparse may make of words."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    value = getattr(value, "value", value)
    return value if isinstance(value, str | int | float | dict) else str(value)


def expand(words: list[str], parser: ArgumentParser) -> list[str]:
    """Replaces a leading config file by the flags that it stands for. Raises UsageError, naming file and line."""
    if not words or words[0].startswith("-") or not words[0].endswith((".json", ".yaml", ".yml")):
        return words
    path = words[0]
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    content = _read_mapping(path, text)
    known = {option[2:].replace("-", "_") for option in parser._option_string_actions if option.startswith("--")}
    takes_list = {action.dest for action in parser._actions if action.nargs == "+"}
    flags: list[str] = []
    for name, value in content.items():
        if isinstance(value, list) and name in takes_list:
            flags += [f"--{name}", *map(str, value)] if value else []
        elif isinstance(value, list) and name in known:
            raise UsageError(f"{path}: {name} takes one value, found a list of {len(value)}")
        elif value is not None:
            # In one word, so that a value that starts with dashes is no flag.
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict | list) else value}")
    return flags + words[1:]


def _read_mapping(path: str, text: str) -> dict:
    import yaml

    try:
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1} " if mark is not None else ""
        raise UsageError(f"{path}: {line}is not YAML: {getattr(error, 'problem', None) or one_line(error)}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a mapping of flags to values, found {type(content).__name__}")
    return content
