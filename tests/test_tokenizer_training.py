"""utils/tokenizer_training.py: each family's own kind of tokenizer."""

import json

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from utils import tokenizer_training
from utils.errors import UsageError

SPECIAL = {
    "gpt2": {"bos_token": 0, "eos_token": 0},
    "roberta": {"bos_token": 0, "pad_token": 1, "eos_token": 2, "unk_token": 3, "mask_token": 4},
    "bert": {"pad_token": 0, "unk_token": 1, "cls_token": 2, "sep_token": 3, "mask_token": 4},
    "distilbert": {"pad_token": 0, "unk_token": 1, "cls_token": 2, "sep_token": 3, "mask_token": 4},
    "albert": {"pad_token": 0, "unk_token": 1, "cls_token": 2, "sep_token": 3, "mask_token": 4},
    "xlnet": {"unk_token": 0, "bos_token": 1, "eos_token": 2, "cls_token": 3, "sep_token": 4, "pad_token": 5, "mask_token": 6},
}  # fmt: skip
SENTENCE = 'Nils (the carpenter) said: "No." Then he went home, in Fernlow.'


@pytest.fixture(scope="module")
def text(corpus) -> Dataset:
    return Dataset.from_dict({"text": [*(corpus / "train.txt").read_text().splitlines(), SENTENCE * 3]})


@pytest.fixture(scope="module")
def trained(text) -> dict:
    return {family: tokenizer_training.train(text, family, 500) for family in SPECIAL}


@pytest.mark.parametrize("family", SPECIAL)
def test_special_tokens_stand_at_their_familys_positions(trained, family):
    tokenizer = trained[family]
    assert {name: getattr(tokenizer, f"{name}_id") for name in SPECIAL[family]} == SPECIAL[family]
    assert len(tokenizer) <= 500


@pytest.mark.parametrize("family", SPECIAL)
def test_ordinary_characters_are_ordinary(trained, family):
    """transformers 5.23 makes special tokens of . ( ) and " when it converts SentencePiece files."""
    tokenizer = trained[family]
    ids = tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(tokenizer.all_special_ids)
    decoded = tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "").lower()
    assert decoded == SENTENCE.replace(" ", "").lower()


@pytest.mark.parametrize(
    ("family", "start", "end"),
    [("bert", [2], [3]), ("distilbert", [2], [3]), ("albert", [2], [3]), ("roberta", [0], [2]), ("xlnet", [], [4, 3])],
)
def test_a_sequence_has_its_familys_form(trained, family, start, end):
    tokenizer = trained[family]
    plain = tokenizer("the old horse", add_special_tokens=False)["input_ids"]
    assert tokenizer("the old horse")["input_ids"] == start + plain + end
    assert tokenizer.num_special_tokens_to_add() == len(start + end)


@pytest.mark.parametrize("family", SPECIAL)
def test_saved_and_loaded_beside_a_config_it_gives_the_same_ids(trained, family, tmp_path):
    trained[family].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(SENTENCE)["input_ids"] == trained[family](SENTENCE)["input_ids"]
    assert loaded.all_special_ids == trained[family].all_special_ids


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_training_is_deterministic(text, trained, family):
    assert tokenizer_training.train(text, family, 500).get_vocab() == trained[family].get_vocab()


@pytest.mark.parametrize("family", SPECIAL)
def test_no_text_is_too_strange(trained, family):
    @given(st.text(max_size=50))
    @settings(max_examples=50, deadline=None)
    def encode(strange):
        ids = trained[family](strange)["input_ids"]
        assert all(0 <= index < len(trained[family]) for index in ids)

    encode()


def test_a_vocabulary_smaller_than_the_alphabet_is_refused(text):
    with pytest.raises(UsageError, match="--vocab_size 20: the characters of this text alone"):
        tokenizer_training.train(text, "gpt2", 20)


def test_a_stream_is_read_in_part(text, monkeypatch):
    monkeypatch.setattr(tokenizer_training, "STREAMED_DOCUMENTS", 3)

    def rows():
        for number, row in enumerate(text):
            assert number < 1500, "read on and on"
            yield row

    assert len(tokenizer_training.train(IterableDataset.from_generator(rows), "gpt2", 300)) <= 300
