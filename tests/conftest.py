"""Fixtures that several test files use."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network; the stand-in hub's clients set their own
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))


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
