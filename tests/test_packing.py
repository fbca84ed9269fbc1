"""Blocks hold every token in order; only the last remainder is dropped."""

import contextlib
import tempfile
from types import SimpleNamespace

import families
import numpy as np
import pytest
import tiny
import torch
from commands import TINY_GPT2, results, run_script
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, HfArgumentParser, OpenAIGPTConfig, PreTrainedTokenizerFast, XLNetConfig

from utils.data_arguments import SequenceDataArguments
from utils.errors import UsageError
from utils.objectives import causal, dynamic_masking, masked
from utils.objectives.predicted_rows import token_sums
from utils.packing import choose_block_size, figures, lines, make_samples, pack, remainder
from utils.token_cache import Tokens

DOCUMENTS = st.lists(st.lists(st.integers(0, 50_000), max_size=9), max_size=30)


def tokenized(documents: list[list[int]], dtype=np.uint16) -> Tokens:
    ids = [token for document in documents for token in document]
    return Tokens(np.array(ids, dtype=dtype), np.cumsum([len(document) for document in documents], dtype=np.int64))


def expected(documents: list[list[int]], block_size: int) -> list[list[int]]:
    ids = [token for document in documents for token in document]
    return [ids[i : i + block_size] for i in range(0, len(ids) - block_size + 1, block_size)]


def rows(blocks) -> list[list[int]]:
    return [block["input_ids"].tolist() for block in blocks]


@settings(max_examples=60, deadline=None)
@given(documents=DOCUMENTS, block_size=st.integers(2, 12))
@example(documents=[[1, 2], [], [3]], block_size=3)
def test_blocks_are_the_tokens_end_to_end(documents, block_size):
    blocks = expected(documents, block_size)
    if blocks:
        packed = pack(tokenized(documents), block_size, "train")
        assert rows(packed[i] for i in range(len(packed))) == blocks
        return
    with pytest.raises(UsageError, match="token"):
        pack(tokenized(documents), block_size, "train")


def test_one_remainder_is_dropped_of_thousands_of_documents():
    documents = [[i, i + 1, i + 2] for i in range(3501)]
    blocks = pack(tokenized(documents), 8, "train")
    assert len(blocks) == 3501 * 3 // 8
    assert blocks[0]["input_ids"].dtype == np.int64
    assert rows(blocks[i] for i in range(len(blocks))) == expected(documents, 8)


def test_ids_beyond_the_sign_bit_of_their_type_stay_what_they_are():
    blocks = pack(tokenized([[65_535, 40_000]]), 2, "train")
    batch = causal.collate([blocks[0]])
    assert batch["input_ids"].tolist() == [[65_535, 40_000]] and batch["input_ids"].dtype == torch.int64
    short = lines(tokenized([[65_535], [], [1, 2]]), "train")
    assert [short[i]["input_ids"].tolist() for i in range(3)] == [[65_535], [], [1, 2]]


def test_figures_count_every_token():
    found = figures(Tokens(np.zeros(10, np.uint8), np.array([10]), seconds=1.5), 4)
    assert found == {"data_seconds": 1.5, "data_tokens": 10, "data_dropped_tokens": 2}
    found = figures(Tokens(np.zeros(10, np.uint8), np.array([4, 10]), seconds=1.5, cut_off=3))
    assert found == {"data_seconds": 1.5, "data_tokens": 13, "data_dropped_tokens": 3}
    assert figures(None) == {}


def test_a_limit_takes_the_first_blocks():
    tokens = tokenized([list(range(12))])
    assert rows(pack(tokens, 3, "train", 2)[i] for i in range(2)) == [[0, 1, 2], [3, 4, 5]]
    assert [len(pack(tokens, 3, "train", limit)) for limit in (None, 1, 4, 9)] == [4, 1, 4, 4]


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([[], []], ["train text holds no token"]),
        ([[1]], ["--block_size 4", "1 tokens only", "give more text"]),
        ([[1, 2], [3]], ["--block_size 4", "3 tokens only", "give 3 or less"]),
    ],
)
def test_too_little_text_names_flag_and_remedy(documents, words):
    with pytest.raises(UsageError) as caught:
        pack(tokenized(documents), 4, "train")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


# ---- the remainder ----
@pytest.mark.parametrize(("flag", "rest"), [("--block_size", 5), ("--block_size", 1), ("--max_seq_length", 1)])
def test_a_remainder_that_is_kept_is_the_last_block(flag, rest):
    tokens = tokenized([list(range(40)), list(range(40, 48 + rest))])
    blocks = pack(tokens, 16, "train", None, flag, keep_remainder=True)
    kept = rest > 1 or flag == "--max_seq_length"  # a causal model learns nothing from a lone token
    assert np.concatenate(rows(blocks[i] for i in range(len(blocks)))).tolist() == list(range(48 + rest * kept))
    assert len(blocks) == 3 + kept and remainder(tokens, 16, flag) == rest * kept
    order = list(range(len(blocks)))[::-1]
    for one, together in zip([blocks[i] for i in order], blocks.__getitems__(order), strict=True):
        assert np.array_equal(one["input_ids"], together["input_ids"])
    assert [len(pack(tokens, 16, "train", limit, flag, True)) for limit in (3, 4)] == [3, 3 + kept]
    assert len(pack(tokenized([[1, 2, 3]]), 16, "train", None, flag, keep_remainder=True)) == 1


def test_the_loss_of_a_remainder_is_its_own_alone():
    model = tiny.gpt2()
    ids = np.random.default_rng(0).integers(0, tiny.VOCABULARY, 21).astype(np.uint8)
    blocks = pack(tokenized([ids.tolist()]), 16, "train", keep_remainder=True)
    batch = causal.PaddedCollator(16)([blocks[0], blocks[1]])
    assert batch["input_ids"].shape == (2, 16) and set(batch) == {"input_ids", "labels"}
    assert batch["labels"][1].tolist() == ids[16:].tolist() + [-100] * 11
    sums = causal.token_sums(model(input_ids=batch["input_ids"]).logits, batch["labels"])
    alone = torch.tensor(ids[None, 16:].astype(np.int64))
    expected = causal.token_sums(model(input_ids=alone).logits, alone)
    assert sums[1, 1] == 4 and torch.allclose(sums[1], expected[0], rtol=1e-6)
    gradients = [torch.autograd.grad(total, list(model.parameters())) for total in (sums[1, 2], expected[0, 2])]
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", families.MASKED)
def test_a_masked_remainder_is_computed_as_if_alone(family):
    model = families.make(family)
    masked.predict_only_masked(model)
    law = masked.MaskingLaw(0.4, 4, families.VOCABULARY, np.arange(families.VOCABULARY) < 5)
    ids = np.random.default_rng(0).integers(5, families.VOCABULARY, 43).tolist()
    samples = dynamic_masking.draw(pack(tokenized([ids]), 16, "train", None, "--max_seq_length", True), law, 1)
    batch = masked.MaskedCollator(law, 1, pad_to=16)([samples[1], samples[2]])
    assert batch["attention_mask"].sum() == 27
    assert "attention_mask" not in masked.MaskedCollator(law, 1, pad_to=16)([samples[0], samples[1]])
    labels = batch.pop("labels")
    sums = token_sums(model(**batch).logits, labels)
    alone = masked.MaskedCollator(law, 1)([samples[2]])
    labels = alone.pop("labels")
    assert torch.allclose(sums[1], token_sums(model(**alone).logits, labels)[0], rtol=1e-5) and sums[1, 1] > 1


def test_figures_say_what_is_dropped():
    text = {"train": Dataset.from_dict({"text": ["a b c", "a b"]})}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words())
    for keep, dropped in ((False, 1), (True, 0)):
        data = SequenceDataArguments(train_file=["a.txt"], keep_remainder=keep)
        args = SimpleNamespace(main_process_first=lambda **_: contextlib.nullcontext(), local_process_index=0)
        with tempfile.TemporaryDirectory() as folder:
            samples, found = make_samples(text, tokenizer, 4, data, args, folder)
        assert found["data_tokens"] == 5 and found["data_dropped_tokens"] == dropped
        assert len(samples["train"]) == 1 + keep


def words() -> Tokenizer:
    model = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return model


# ---- block_size ----
UNKNOWN = int(1e30)  # what transformers says for a tokenizer that knows no limit
NO_POSITIONS = SimpleNamespace()


@pytest.mark.parametrize(
    ("asked", "tokenizer_says", "config", "size"),
    [
        (None, 1024, GPT2Config(), 1024),
        (None, UNKNOWN, GPT2Config(), 1024),
        (None, UNKNOWN, GPT2Config(n_positions=64), 64),
        (None, UNKNOWN, GPT2Config(n_positions=4096), 1024),
        (None, 512, GPT2Config(n_positions=64), 64),
        (None, 32, GPT2Config(n_positions=64), 32),
        (None, 2048, GPT2Config(n_positions=2048), 2048),
        (None, UNKNOWN, OpenAIGPTConfig(), 512),
        (None, UNKNOWN, XLNetConfig(), 1024),  # relative positions: it says -1
        (None, UNKNOWN, NO_POSITIONS, 1024),
        (None, 128, NO_POSITIONS, 128),
        (64, UNKNOWN, GPT2Config(n_positions=64), 64),
        (63, UNKNOWN, GPT2Config(n_positions=64), 63),
        (48, 32, GPT2Config(n_positions=64), 32),
        (5000, UNKNOWN, NO_POSITIONS, 5000),
        (5000, UNKNOWN, XLNetConfig(), 5000),
    ],
)
def test_the_block_size(asked, tokenizer_says, config, size):
    chosen = choose_block_size(asked, SimpleNamespace(model_max_length=tokenizer_says), config)
    assert chosen == size and isinstance(chosen, int)


@pytest.mark.parametrize("tokenizer_says", [UNKNOWN, 32, 64])
def test_a_block_longer_than_the_model_is_refused(tokenizer_says):
    with pytest.raises(UsageError, match="--block_size 65: the model has 64 positions; give 64 or less"):
        choose_block_size(65, SimpleNamespace(model_max_length=tokenizer_says), GPT2Config(n_positions=64))


# ---- in the scripts ----
SMALL = {
    "run_clm.py": [*TINY_GPT2, "--vocab_size", 300, "--block_size", 64, "--append_eos", "--keep_remainder"],
    "run_mlm.py": [
        "--model_type", "bert", "--max_seq_length", 64, "--vocab_size", 500, "--line_by_line", "--group_by_length", "--config_overrides",
        "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,max_position_embeddings=64",
    ],
    "run_plm.py": [
        "--model_type", "xlnet", "--max_seq_length", 64, "--vocab_size", 500, "--keep_remainder",
        "--config_overrides", "d_model=32,n_layer=2,n_head=2,d_inner=64",
    ],
}  # fmt: skip


@pytest.mark.parametrize("script", SMALL)
def test_the_scripts_train_and_evaluate_on_every_token(script, files, tmp_path):
    done = run_script(
        script, *SMALL[script], *files, "--do_train", "--do_eval", "--per_device_train_batch_size", 8,
        "--num_train_epochs", 1, "--output_dir", tmp_path,
    )  # fmt: skip
    found = results(tmp_path)
    assert found["data_tokens"] > 0 and found["data_seconds"] > 0 and np.isfinite(found["eval_loss"])
    assert found["data_dropped_tokens"] == 0 or script == "run_mlm.py"  # which cuts lines
    assert script == "run_mlm.py" or " and one of " in done.stdout


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--keep_remainder", "--packing", "documents"], "--keep_remainder"),
        (["--keep_remainder", "--line_by_line"], "--keep_remainder"),
        (["--keep_remainder", "--streaming"], "--keep_remainder"),
        (["--append_eos", "--streaming"], "--append_eos"),
    ],
)
def test_flags_that_exclude_each_other_are_one_line(flags, word):
    with pytest.raises(UsageError, match=f"^{word}") as caught:
        HfArgumentParser(SequenceDataArguments).parse_args_into_dataclasses(["--train_file", "a.txt", *flags])
    assert "\n" not in str(caught.value)
