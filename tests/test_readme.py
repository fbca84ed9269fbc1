"""README.md and README.zh-CN.md say the same, and what they say of commands, flags and files is true."""

import dataclasses
import importlib.util
import re
import shlex
from argparse import Namespace
from pathlib import Path

import pytest

from utils import arguments, config_file
from utils.amp import choose_precision
from utils.data_arguments import CausalDataArguments, MaskedDataArguments, PermutedDataArguments
from utils.legacy_arguments import modernize
from utils.training_arguments import ELEMENTWISE_OPTIMIZERS

ROOT = Path(__file__).resolve().parent.parent
FILES = ("README.md", "README.zh-CN.md")
# The text that each script takes.
DATA = {"run_clm.py": CausalDataArguments, "run_mlm.py": MaskedDataArguments, "run_plm.py": PermutedDataArguments}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROJECT_FILE = re.compile(
    r"(?<![\w/.-])((?:utils|scripts|tests|benchmarks|docs)/[\w./-]*\w|requirements[\w-]*\.txt|run_\w+\.py)"
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return FENCE.findall(read(name))


def prose(name: str) -> str:
    """The text without its fenced blocks."""
    return FENCE.sub("", read(name))


def code_spans(name: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(name))


def headings(name: str) -> list[tuple[int, str]]:
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.+)$", prose(name), re.MULTILINE)]


def flags(name: str) -> list[str]:
    """The scripts' flags in the text's code spans, without dashes."""
    spans = [span for span in code_spans(name) if not span.startswith("python -m ")]
    return re.findall(r"--([A-Za-z]\w*)", " ".join(spans))


def table_rows(name: str) -> list[int]:
    """The number of cells in each row of each table."""
    return [line.count("|") - 1 for line in prose(name).splitlines() if line.startswith("|")]


def commands(name: str) -> list[list[str]]:
    """The words of each command in the bash blocks, continued lines joined and comments left out."""
    lines = [
        line
        for language, content in blocks(name)
        if language == "bash"
        for line in content.replace("\\\n", " ").splitlines()
    ]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


SCRIPT_COMMANDS = [words for words in commands("README.md") if set(words) & set(DATA)]


def parser_of(script: str) -> arguments.Parser:
    return arguments.Parser((arguments.ModelArguments, DATA[script], arguments.LanguageModelingArguments))


@pytest.fixture(scope="module")
def known() -> set[str]:
    """The flags of all scripts."""
    return set().union(*(arguments.known_flags(parser_of(script)) for script in DATA))


# ---- the two languages ----
def test_code_blocks_are_the_same_byte_for_byte() -> None:
    english, chinese = (blocks(name) for name in FILES)
    assert english == chinese
    assert len(english) >= 8
    for name in FILES:
        assert read(name).count("```") == 2 * len(english), f"{name}: a fence is left open or has something behind it"


def test_headings_have_the_same_levels() -> None:
    english, chinese = ([level for level, _ in headings(name)] for name in FILES)
    assert english == chinese
    assert len(english) >= 16


def test_both_speak_of_the_same_flags_and_tables() -> None:
    english, chinese = FILES
    assert set(flags(english)) == set(flags(chinese))
    assert table_rows(english) == table_rows(chinese)


def test_each_links_to_the_other_at_the_top() -> None:
    for name, other in (FILES, FILES[::-1]):
        assert f"]({other})" in "".join(read(name).splitlines(keepends=True)[:4]), name


# ---- commands ----
def test_there_are_commands_to_check() -> None:
    assert len(SCRIPT_COMMANDS) >= 10
    assert any(words[0] == "torchrun" for words in SCRIPT_COMMANDS)
    assert {script for words in SCRIPT_COMMANDS for script in words if script in DATA} == set(DATA)


@pytest.mark.parametrize("words", SCRIPT_COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_commands_parse(words: list[str], tmp_path) -> None:
    assert words[0] in ("python", "torchrun")
    [script] = set(words) & set(DATA)
    parser = parser_of(script)
    given = words[words.index(script) + 1 :]
    given = given[: given.index(">")] if ">" in given else given
    if given[0].endswith(".yaml"):
        given[0] = str(write_config(given[0], tmp_path))
    modern = modernize(config_file.expand(given, parser), arguments.known_flags(parser))
    assert not modern.notes, "the README uses an old word"
    check(parser.parse_args(modern.argv), DATA[script])  # an unknown flag or a wrong value is a UsageError


def write_config(name: str, folder: Path) -> Path:
    """Writes the config file that the README shows under this name."""
    shown = [content for _, content in blocks("README.md") if content.startswith(f"# {name}\n")]
    assert len(shown) == 1, f"{name} is shown {len(shown)} times"
    path = folder / name
    path.write_text(shown[0], encoding="utf-8")
    return path


def check(parsed: Namespace, data: type) -> None:
    """The checks of the parsed values that need no TrainingArguments, which would touch devices."""

    def part(kind: type):
        return kind(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(kind) if f.init})

    part(arguments.ModelArguments)
    arguments.check_run(part(data), parsed)
    choose_precision(parsed.fp16, parsed.bf16, parsed.fp16_opt_level, parsed.loss_scale)
    assert parsed.optim in ELEMENTWISE_OPTIMIZERS or not parsed.use_combine_grad
    assert parsed.output_dir


def test_modules_that_are_run_exist() -> None:
    modules = [words[2] for words in commands("README.md") if words[:2] == ["python", "-m"]]
    assert modules
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


# ---- flags and files ----
@pytest.mark.parametrize("name", FILES)
def test_flags_in_the_text_are_known(name: str, known) -> None:
    assert flags(name)
    assert [flag for flag in flags(name) if flag not in known and not is_old(flag, known)] == []


def is_old(flag: str, known: set[str]) -> bool:
    """Whether utils.legacy_arguments knows what to do with the flag, be it to refuse it."""
    try:
        return bool(modernize([f"--{flag}", "1"], known).notes)
    except ValueError:
        return True


def project_files(name: str) -> set[str]:
    text = "\n".join(code_spans(name) + [content for _, content in blocks(name)])
    return set(PROJECT_FILE.findall(text)) | tree_files(name)


def tree_files(name: str) -> set[str]:
    """The files that the project's tree shows, their folder before them."""
    [tree] = [content for language, content in blocks(name) if language == "text"]
    files, folder = set(), ""
    for line in tree.splitlines():
        entry = line.split()[0]
        if not line.startswith(" "):
            folder = entry if entry.endswith("/") else ""
        files.add(folder + entry if line.startswith(" ") else entry)
    return files


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_named_exist(name: str) -> None:
    files = project_files(name)
    assert len(files) > 20
    assert sorted(file for file in files if not (ROOT / file).exists()) == []


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name: str) -> None:
    # GitHub's anchors: lower case, punctuation gone, dashes for spaces.
    anchors = {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in headings(name)}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", prose(name)) if "://" not in link]
    assert links
    assert [link for link in links if link not in anchors and not (ROOT / link).is_file()] == []
