"""Token ids are the plain tokenizer's; a tokenizer that was trained here comes back from its folder unchanged."""

import itertools
import pickle

import datasets
import numpy as np
import pytest
import tokenizers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedTokenizerFast

from utils import sample_corpus
from utils.errors import UsageError
from utils.stream_shards import shards_of
from utils.streaming import Reader, Source, Stream
from utils.token_cache import Tokens
from utils.tokenization import StreamEncoder, chunks, end_of_text, tokenize
from utils.tokenizer_training import train, train_byte_level_bpe

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


def documents(tokens: Tokens) -> list[list[int]]:
    """The ids of each document."""
    return [ids.tolist() for ids in np.split(tokens.ids, tokens.ends)[:-1]]


def as_stream(text: Dataset) -> Stream:
    return Stream([Source(shards_of(text.to_iterable_dataset(), lambda error: error))])


# ---- text to ids ----
@pytest.mark.parametrize("threads", [None, 1, 3])
def test_ids_are_the_plain_tokenizers(threads, text, tokenizer, tmp_path):
    tokens = tokenize(text, tokenizer, tmp_path, threads=threads)
    assert tokens.ids.dtype == np.uint16 and tokens.ends.dtype == np.int64
    assert documents(tokens) == [tokenizer(row or "")["input_ids"] for row in text["text"]]


@pytest.mark.parametrize("max_length", [None, 12])
def test_a_stream_has_the_same_ids(max_length, text, tokenizer, tmp_path):
    expected = tokenize(text, tokenizer, tmp_path, max_length=max_length)
    encode = StreamEncoder(tokenizer, text["text"][:3], max_length)
    for encoder in (encode, pickle.loads(pickle.dumps(encode))):
        epoch = itertools.takewhile(lambda step: step[0] is not None, Reader(as_stream(text)).read())
        found = [encoder(documents) for documents, _ in epoch]
        assert np.concatenate([part.ids for part in found]).tolist() == expected.ids.tolist()
        assert np.concatenate([part.counts for part in found]).cumsum().tolist() == expected.ends.tolist()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["gpt2", "roberta", "bert", "xlnet"])
def test_a_limit_cuts_documents_and_leaves_blank_ones_out(kind, side, text, tmp_path):
    tokenizer = train(text, kind, 400)
    tokenizer.truncation_side = side
    rows = [row for row in [*text["text"], "\u3000 \x1c\n"] if row is not None and row.strip()]
    tokens = tokenize(
        Dataset.from_dict({"text": [*text["text"], "\u3000 \x1c\n"]}), tokenizer, tmp_path, max_length=12
    )
    assert documents(tokens) == [tokenizer(row, truncation=True, max_length=12)["input_ids"] for row in rows]
    assert tokens.cut_off == sum(len(tokenizer(row)["input_ids"]) for row in rows) - len(tokens.ids) > 0


def test_chunks_are_the_documents_in_order():
    rows = ["a" * size for size in (0, 3, 50, 1, 0, 9, 11, 10, 0)] + [None, "é"]
    text = datasets.concatenate_datasets([Dataset.from_dict({"text": rows}), Dataset.from_dict({"text": rows[::-1]})])
    expected = [row or "" for row in text["text"]]
    for size in (1, 10, 11, 1000):
        arrays = [chunk.to_pylist() for chunk in chunks(text, size)]
        assert [row for array in arrays for row in array] == expected
        assert all(sum(map(len, array)) <= size + 1 or len([row for row in array if row]) == 1 for array in arrays)
    shuffled = text.select([5, 2, 2, 20])
    assert [row for chunk in chunks(shuffled, 20) for row in chunk.to_pylist()] == [expected[i] for i in (5, 2, 2, 20)]


def test_special_tokens_are_as_the_tokenizer_adds_them(tmp_path):
    vocabulary = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "a": 3}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    tokens = tokenize(
        Dataset.from_dict({"text": ["a b", ""]}), PreTrainedTokenizerFast(tokenizer_object=words), tmp_path
    )
    assert documents(tokens) == [[0, 3, 2, 1], [0, 1]]
    assert tokens.ids.dtype == np.uint8


def test_missing_text_is_no_token(tokenizer, tmp_path):
    rows = Dataset.from_dict({"text": [None, "a", ""]})
    expected = [[], tokenizer("a")["input_ids"], []]
    assert documents(tokenize(rows, tokenizer, tmp_path)) == expected


def test_a_stream_of_something_else_than_text():
    with pytest.raises(UsageError, match="--text_column: a document is '5', not text"):
        train_byte_level_bpe(as_stream(Dataset.from_dict({"text": [5, 6]})), 300)


def test_long_documents_are_neither_cut_nor_warned_of(text, tokenizer, caplog, tmp_path):
    long = "".join(row or "" for row in text["text"])
    short = train_byte_level_bpe(text, 400)
    short.model_max_length = 16
    [ids] = documents(tokenize(Dataset.from_dict({"text": [long]}), short, tmp_path))
    assert tokenizer.decode(ids) == long
    assert "longer than" not in caplog.text


# ---- the end of a document ----
@pytest.mark.parametrize("threads", [1, 3])
def test_an_end_of_text_token_ends_each_document_that_is_not_blank(threads, text, tokenizer, tmp_path):
    rows = [*text["text"], "\n", " \u3000", "a"]
    end = end_of_text(tokenizer, True)
    more = Dataset.from_dict({"text": rows})
    expected = [tokenizer(row or "")["input_ids"] + [end] * bool((row or "").strip()) for row in rows]
    assert documents(tokenize(more, tokenizer, tmp_path, threads=threads, append=end)) == expected
    # The cache tells them apart.
    assert documents(tokenize(more, tokenizer, tmp_path)) == [tokenizer(row or "")["input_ids"] for row in rows]
    assert documents(tokenize(more, tokenizer, tmp_path, append=end)) == expected


def test_an_end_of_text_token_that_cannot_be(text, tokenizer):
    for kind, shown in (("bert", "[SEP]"), ("xlnet", "<cls>"), ("roberta", "</s>")):
        with pytest.raises(
            UsageError, match="--append_eos: this tokenizer ends each document already, with"
        ) as caught:
            end_of_text(with_eos(train(text, kind, 400)), True)
        assert shown in str(caught.value)
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UsageError, match="--append_eos: the tokenizer has no end-of-text token"):
        end_of_text(without, True)
    assert end_of_text(without, False) is None and end_of_text(tokenizer, True) == tokenizer.eos_token_id


def with_eos(tokenizer):
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    return tokenizer


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
