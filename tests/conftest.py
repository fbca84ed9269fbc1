"""Fixtures that several test files use, and the marks of all tests."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Iterator
from inspect import unwrap
from pathlib import Path
from types import CodeType, FunctionType

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network; the stand-in hub's clients set their own
TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
sys.path.insert(0, str(TESTS))


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """npu and faults by folder, npu by a file's name as well; slow are those that start a process."""
    known: dict[FunctionType, bool] = {}
    for item in items:
        for mark in ("npu", "faults"):
            if item.path.parent.name == mark or item.path.stem.endswith(f"_{mark}"):
                item.add_marker(mark)
        fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
        if any(starts_a_process(unwrap(function), known) for function in (item.function, *fixtures)):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """What the tests have imported is not looked through for garbage, which Trainer asks for often: half of their time."""
    gc.freeze()


def starts_a_process(function: FunctionType, known: dict[FunctionType, bool]) -> bool:
    """Whether it, or a function of tests/ that it names, uses subprocess. known: the answers so far."""
    if function not in known:
        known[function] = False  # if it names itself
        names = set(names_in(function.__code__)) if isinstance(function, FunctionType) else set()
        named = [unwrap(value) for value in map(getattr(function, "__globals__", {}).get, names) if callable(value)]
        known[function] = bool(names & {"subprocess", "Popen", "WarmPython"}) or any(
            starts_a_process(value, known)
            for value in named
            if isinstance(value, FunctionType) and value.__code__.co_filename.startswith(str(TESTS))
        )
    return known[function]


def names_in(code: CodeType) -> Iterator[str]:
    """The names that a function uses, those in functions within it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with train.txt (about 40 kB) and validation.txt of the sample corpus."""
    from utils import sample_corpus

    folder = tmp_path_factory.mktemp("corpus")
    sample_corpus.write(folder / "train.txt", documents=150, seed=1)
    sample_corpus.write(folder / "validation.txt", documents=30, seed=2)
    return folder


@pytest.fixture(scope="session")
def files(corpus) -> list:
    """The corpus as flags of the scripts."""
    return ["--train_file", corpus / "train.txt", "--validation_file", corpus / "validation.txt"]


@pytest.fixture(scope="session")
def tokenizers(corpus, tmp_path_factory):
    """family -> the folder of a tokenizer of its own kind, trained once, so that runs can be compared."""
    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            from datasets import Dataset

            from utils import tokenizer_training

            folders[family] = tmp_path_factory.mktemp(family)
            text = Dataset.from_dict({"text": (corpus / "train.txt").read_text().splitlines()})
            tokenizer_training.train(text, family, 600).save_pretrained(folders[family])
        return folders[family]

    return folder_of


@pytest.fixture(scope="session")
def tokenizer_without_mask(tokenizers) -> Path:
    return tokenizers("gpt2")


@pytest.fixture(scope="module")
def sides_that_start_quickly() -> Iterator[None]:
    """Sides are forks of a process that has imported what takes seconds: still one process each."""
    from benchmarks import turns

    multiprocessing.set_forkserver_preload(["torch", "transformers", "datasets", "benchmarks.compare"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "START_METHOD", "forkserver")
        yield
