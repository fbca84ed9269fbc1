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
def tokenizer_without_mask(corpus, tmp_path_factory) -> Path:
    """The folder of a GPT-2 tokenizer."""
    from datasets import Dataset

    from utils import tokenizer_training

    folder = tmp_path_factory.mktemp("gpt2_tokenizer")
    text = Dataset.from_dict({"text": (corpus / "train.txt").read_text().splitlines()})
    tokenizer_training.train(text, "gpt2", 600).save_pretrained(folder)
    return folder
