"""README and guide say the same in both languages, and what they say of commands, flags and files is true."""

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
PAIRS = (("README.md", "README.zh-CN.md"), ("docs/guide.md", "docs/guide.zh-CN.md"))
FILES = tuple(name for pair in PAIRS for name in pair)
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


def bullets(name: str) -> int:
    """How many items the text's lists have."""
    return sum(line.startswith("- ") for line in prose(name).splitlines())


def commands(name: str) -> list[list[str]]:
    """The words of each command in the bash blocks, continued lines joined and comments left out."""
    lines = [
        line
        for language, content in blocks(name)
        if language == "bash"
        for line in content.replace("\\\n", " ").splitlines()
    ]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


ENGLISH = tuple(english for english, _ in PAIRS)
SCRIPT_COMMANDS = [words for name in ENGLISH for words in commands(name) if set(words) & set(DATA)]


def parser_of(script: str) -> arguments.Parser:
    return arguments.Parser((arguments.ModelArguments, DATA[script], arguments.LanguageModelingArguments))


@pytest.fixture(scope="module")
def known() -> set[str]:
    """The flags of all scripts, and the launch scripts' options."""
    [options] = re.findall(r"^options='(.*)'$", read("scripts/launch.sh"), re.MULTILINE)
    return set(options.split()).union(*(arguments.known_flags(parser_of(script)) for script in DATA))


# ---- the two languages ----
@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_code_blocks_are_the_same_byte_for_byte(english: str, chinese: str) -> None:
    assert blocks(english) == blocks(chinese) != []
    for name in (english, chinese):
        assert read(name).count("```") == 2 * len(blocks(english)), (
            f"{name}: a fence is left open or has something behind it"
        )


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_headings_have_the_same_levels(english: str, chinese: str) -> None:
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    assert len(headings(english)) >= 8


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_speak_of_the_same_flags_and_tables(english: str, chinese: str) -> None:
    assert set(flags(english)) == set(flags(chinese))
    assert table_rows(english) == table_rows(chinese)
    assert bullets(english) == bullets(chinese) > 0


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_each_links_to_the_other_at_the_top(english: str, chinese: str) -> None:
    for name, other in ((english, chinese), (chinese, english)):
        assert f"]({Path(other).name})" in "".join(read(name).splitlines(keepends=True)[:4]), name


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
    modules = [words[2] for name in ENGLISH for words in commands(name) if words[:2] == ["python", "-m"]]
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
    return set(PROJECT_FILE.findall("\n".join(code_spans(name) + [content for _, content in blocks(name)])))


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_named_exist(name: str) -> None:
    assert sorted(file for file in project_files(name) if not (ROOT / file).exists()) == []


def test_files_are_named() -> None:
    assert len(project_files("README.md")) > 15


def anchors(name: str) -> set[str]:
    """GitHub's: lower case, punctuation gone, dashes for spaces."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in headings(name)}


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", prose(name)) if "://" not in link]
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.is_file(), link
        assert not anchor or anchor in anchors(str(path.resolve().relative_to(ROOT))), link


# ---- the list of all files ----
def tree_files() -> set[str]:
    """The files that docs/layout.md shows, their folder before them."""
    [tree] = [content for language, content in blocks("docs/layout.md") if language == "text"]
    files, folder = set(), ""
    for line in tree.splitlines():
        entry = line.split()[0]
        if not line.startswith(" "):
            folder = entry if entry.endswith("/") else ""
        files.add(folder + entry if line.startswith(" ") else entry)
    return files


def test_the_layout_lists_all_files_and_no_other() -> None:
    listed = tree_files()
    assert sorted(file for file in listed if not (ROOT / file).exists()) == []
    there = [*ROOT.glob("run_*.py"), *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/*.*"), *ROOT.glob("benchmarks/*.*")]
    names = {
        str(path.relative_to(ROOT)) for path in [*there, *ROOT.glob("utils/**/*.py")] if path.name != "__init__.py"
    }
    assert sorted(names - listed) == []
