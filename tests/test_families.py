"""Each of the seven families as a user trains it: from scratch, saved, fine-tuned from there, at O2 with combined gradients.

On the sample corpus, with the tokenizer that the script trains. A model that has learnt only how often each token occurs
reaches the unigram entropy of the text; these reach well below it.
"""

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import losses, results, run_script

from utils import sample_corpus

NO_DROPOUT = "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
BERT = f"hidden_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=128,{NO_DROPOUT}"
GPT = "n_embd=64,n_layer=2,n_head=2,n_positions=32,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0"


class Family(NamedTuple):
    script: str
    overrides: str
    length: list
    steps: int


SEQUENCES = ["--max_seq_length", 32]
BLOCKS = ["--block_size", 32]
FAMILIES = {
    "gpt2": Family("run_clm.py", GPT, BLOCKS, 200),
    "openai-gpt": Family("run_clm.py", GPT, BLOCKS, 200),
    "bert": Family("run_mlm.py", f"{BERT},max_position_embeddings=36", SEQUENCES, 600),
    "roberta": Family("run_mlm.py", f"{BERT},max_position_embeddings=36", SEQUENCES, 700),
    "albert": Family("run_mlm.py", f"{BERT},embedding_size=64,max_position_embeddings=36", SEQUENCES, 1200),
    "distilbert": Family(
        "run_mlm.py",
        "dim=64,n_layers=2,n_heads=2,hidden_dim=128,max_position_embeddings=36,dropout=0.0,attention_dropout=0.0",
        SEQUENCES,
        800,
    ),
    "xlnet": Family("run_plm.py", "d_model=64,n_layer=2,n_head=2,d_inner=128,dropout=0.0", SEQUENCES, 700),
}


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """train.txt, some 240,000 tokens, and validation.txt."""
    folder = tmp_path_factory.mktemp("texts")
    sample_corpus.write(folder / "train.txt", documents=1500, seed=1)
    sample_corpus.write(folder / "validation.txt", documents=60, seed=2)
    return folder


def unigram_entropy(tokenizer_folder: Path, text: Path) -> float:
    """Nats a token of the text under its own tokens' frequencies: what a model reaches without context."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = tokenizer(text.read_text().splitlines(), add_special_tokens=False, verbose=False)["input_ids"]
    counts = Counter(token for document in ids for token in document)
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_from_scratch_saved_and_fine_tuned(texts, tmp_path, name):
    family = FAMILIES[name]
    common = ["--train_file", texts / "train.txt", "--validation_file", texts / "validation.txt", *family.length]
    common += ["--per_device_train_batch_size", 32, "--do_train", "--do_eval", "--save_strategy", "no"]
    common += ["--max_eval_samples", 96]
    scratch, plain, half = (tmp_path / folder for folder in ("scratch", "plain", "half"))
    run_script(
        family.script, *common, "--model_type", name, "--config_overrides", family.overrides, "--vocab_size", 600,
        "--max_steps", family.steps, "--learning_rate", 4e-3, "--warmup_steps", 50, "--logging_steps", 100,
        "--use_combine_grad", "--output_dir", scratch,
    )  # fmt: skip
    trained = results(scratch)["eval_loss"]
    assert trained < unigram_entropy(scratch, texts / "validation.txt") - 0.3

    # From the saved model on, in float32 and at O2 with combined gradients: the same losses, and it goes on learning.
    tune = ["--model_name_or_path", scratch, "--max_steps", 10, "--learning_rate", 5e-4, "--logging_steps", 1]
    run_script(family.script, *common, *tune, "--output_dir", plain)
    run_script(
        family.script, *common, *tune, "--bf16", "--fp16_opt_level", "O2", "--use_combine_grad", "--output_dir", half
    )
    assert losses(half) == pytest.approx(losses(plain), rel=1e-2)
    assert results(half)["eval_loss"] == pytest.approx(results(plain)["eval_loss"], rel=5e-3)
    assert results(plain)["eval_loss"] < trained + 0.02
    assert results(half)["gradient_buffers"] and "gradient_buffers" not in results(plain)
