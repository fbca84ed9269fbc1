"""Token ids are the plain tokenizer's; a tokenizer that was trained here comes back from its folder unchanged."""

import pytest
import tokenizers
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedTokenizerFast

from utils import sample_corpus
from utils.errors import UsageError
from utils.tokenization import tokenize
from utils.tokenizer_training import train_byte_level_bpe

ODD_TEXT = " two  spaces\n\ttab\r\nGrüße 你好 😀 e\u0301 \u200d \x00 \ufeff<|endoftext|> don't 12345 "


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Dataset:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    sample_corpus.write(file, documents=40, seed=3)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return Dataset.from_dict({"text": [*lines, None, "", "Grüße 你好 😀\n"]})


@pytest.fixture(scope="module")
def tokenizer(text):
    return train_byte_level_bpe(text, 400)


def as_stream(text: Dataset) -> IterableDataset:
    return text.to_iterable_dataset()


# ---- text to ids ----
@pytest.mark.parametrize("processes", [None, 2])
def test_ids_are_the_plain_tokenizers(processes, text, tokenizer):
    tokens = tokenize(text, tokenizer, processes)
    assert tokens.column_names == ["input_ids"]
    assert tokens.features["input_ids"].feature.dtype == "int32"
    assert list(tokens["input_ids"]) == [tokenizer(row or "")["input_ids"] for row in text["text"]]


def test_a_stream_has_the_same_ids(text, tokenizer):
    stream = list(tokenize(as_stream(text), tokenizer))
    assert stream == list(tokenize(text, tokenizer))


def test_special_tokens_are_as_the_tokenizer_adds_them(tokenizer):
    vocabulary = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "a": 3}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    tokens = tokenize(Dataset.from_dict({"text": ["a b", ""]}), PreTrainedTokenizerFast(tokenizer_object=words))
    assert list(tokens["input_ids"]) == [[0, 3, 2, 1], [0, 1]]


def test_missing_text_is_no_token(tokenizer):
    rows = Dataset.from_dict({"text": [None, "a", ""]})
    for text in (rows, as_stream(rows)):
        assert [row["input_ids"] for row in tokenize(text, tokenizer)] == [[], tokenizer("a")["input_ids"], []]


def test_a_stream_of_something_else_than_text(tokenizer):
    stream = IterableDataset.from_generator(lambda: ({"text": row} for row in ["a", 5]))
    for use in (lambda: list(tokenize(stream, tokenizer)), lambda: train_byte_level_bpe(stream, 300)):
        with pytest.raises(UsageError, match="--text_column: a document is '5', not text"):
            use()


def test_long_documents_are_neither_cut_nor_warned_of(text, tokenizer, caplog):
    long = "".join(row or "" for row in text["text"])
    short = train_byte_level_bpe(text, 400)
    short.model_max_length = 16
    [ids] = tokenize(Dataset.from_dict({"text": [long]}), short)["input_ids"]
    assert tokenizer.decode(ids) == long
    assert "longer than" not in caplog.text


# ---- training ----
def test_training_is_deterministic_and_a_stream_gives_the_same(text, tokenizer):
    expected = tokenizer.backend_tokenizer.to_str()
    assert train_byte_level_bpe(text, 400).backend_tokenizer.to_str() == expected
    assert train_byte_level_bpe(as_stream(text), 400).backend_tokenizer.to_str() == expected


@settings(max_examples=150, deadline=None)
@given(document=st.text())
def test_any_text_comes_back(tokenizer, document):
    assert tokenizer.decode(tokenizer(document)["input_ids"]) == document


@pytest.mark.parametrize("model_type", [None, "gpt2", "openai-gpt", "bert", "roberta", "xlnet", "distilbert"])
@pytest.mark.parametrize("fast", [True, False])
def test_it_comes_back_from_a_folder_with_any_models_configuration(model_type, fast, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    if model_type is not None:
        CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, use_fast=fast)
    assert len(loaded) == len(tokenizer)
    assert loaded(ODD_TEXT)["input_ids"] == tokenizer(ODD_TEXT)["input_ids"]
    assert loaded.decode(loaded(ODD_TEXT)["input_ids"]) == ODD_TEXT
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<|endoftext|>",) * 3


def test_the_limit_on_length_comes_back(text, tmp_path):
    tokenizer = train_byte_level_bpe(text, 300)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 64


def test_the_end_of_text_is_one_token(tokenizer):
    assert tokenizer("<|endoftext|>")["input_ids"] == [tokenizer.eos_token_id] == [tokenizer.bos_token_id]
    assert 0 <= tokenizer.eos_token_id < len(tokenizer)


@pytest.mark.parametrize("asked", [1, 257, 258, 300, 400])
def test_the_vocabulary_is_as_large_as_asked(asked, text):
    assert len(train_byte_level_bpe(text, asked)) == max(asked, 257)  # 256 bytes and the end of text


@pytest.mark.parametrize("documents", [["ab"], [""], [None], []])
def test_a_corpus_without_repeated_pairs_has_bytes_only(documents):
    assert len(train_byte_level_bpe(Dataset.from_dict({"text": documents}), 1000)) == 257
