"""run_mlm.py as a user runs it, in subprocesses. tests/test_families.py trains each family for longer."""

import json
import math
import shutil
from pathlib import Path

import pytest
from commands import SHARED, losses, one_error_line, results, run_distributed, run_script

SMALL = "hidden_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=128,max_position_embeddings=68"
OVERRIDES = {
    "bert": SMALL,
    "roberta": SMALL,
    "albert": SMALL + ",embedding_size=32",
    "distilbert": "dim=64,n_layers=2,n_heads=2,hidden_dim=128,max_position_embeddings=68",
}
SHORT = ["--max_seq_length", 64, "--per_device_train_batch_size", 8, "--logging_steps", 10, "--learning_rate", 3e-3]


def from_scratch(family: str) -> list:
    return ["--model_type", family, "--config_overrides", OVERRIDES[family], "--vocab_size", 600]


@pytest.fixture(scope="session")
def tokenizer(tokenizers):
    """A WordPiece tokenizer, for runs that are compared with each other."""
    return tokenizers("bert")


@pytest.mark.parametrize("family", OVERRIDES)
def test_a_saved_model_evaluates_as_before(files, tmp_path, family):
    command = [*from_scratch(family), *files, *SHORT, "--do_train", "--do_eval", "--use_combine_grad"]
    run_script("run_mlm.py", *command, "--max_steps", 20, "--output_dir", tmp_path / "a")
    found = results(tmp_path / "a")
    assert losses(tmp_path / "a")[-1] < losses(tmp_path / "a")[0]
    assert 0 < found["eval_accuracy"] < 1 and found["perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
    run_script(
        "run_mlm.py", "--model_name_or_path", tmp_path / "a", *files, "--max_seq_length", 64,
        "--do_eval", "--output_dir", tmp_path / "b",
    )  # fmt: skip
    assert results(tmp_path / "b")["eval_loss"] == pytest.approx(found["eval_loss"], abs=1e-6)


def test_an_unfinished_run_resumes_with_the_tokenizer_it_trained(files, tmp_path):
    """WordPiece's trainer numbers its tokens anew each time: a second one would make nonsense of the weights."""
    command = [*from_scratch("bert"), *files, *SHORT, "--logging_steps", 1, "--max_steps", 6, "--save_steps", 3]
    command += ["--do_train", "--output_dir", tmp_path]
    run_script("run_mlm.py", *command)
    whole = losses(tmp_path)
    record = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(record.replace('"finished": true', '"finished": false'))
    shutil.rmtree(tmp_path / "checkpoint-6")
    done = run_script("run_mlm.py", *command)
    assert "resuming from checkpoint-3" in done.stdout
    assert losses(tmp_path) == whole


def fixed_bert(tokenizer: Path) -> list:
    overrides = OVERRIDES["bert"] + ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0,vocab_size=600"
    return ["--model_type", "bert", "--config_overrides", overrides, "--tokenizer_name", tokenizer]


def test_the_full_head_has_the_same_losses(files, tokenizer, tmp_path):
    command = fixed_bert(tokenizer)
    command += [*files, *SHORT, "--logging_steps", 1, "--max_steps", 10, "--do_train", "--do_eval"]
    run_script("run_mlm.py", *command, "--output_dir", tmp_path / "rows")
    run_script("run_mlm.py", *command, "--full_head", "--output_dir", tmp_path / "full")
    assert losses(tmp_path / "rows") == pytest.approx(losses(tmp_path / "full"), rel=1e-4)
    assert results(tmp_path / "rows")["eval_loss"] == pytest.approx(results(tmp_path / "full")["eval_loss"], rel=1e-4)


def test_two_processes_see_the_masks_of_one(files, tokenizer, tmp_path):
    command = fixed_bert(tokenizer)
    command += [*files, "--max_seq_length", 64, "--learning_rate", 3e-3, "--logging_steps", 1, "--max_steps", 8]
    command += ["--do_train", "--do_eval", "--use_combine_grad"]
    run_distributed("run_mlm.py", *command, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "two")
    run_script("run_mlm.py", *command, "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert results(tmp_path / "two")["eval_loss"] == pytest.approx(results(tmp_path / "one")["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("padding", [[], ["--pad_to_max_length"]])
def test_lines_and_whole_words(files, tmp_path, padding):
    run_script(
        "run_mlm.py", *from_scratch("distilbert"), *files, *SHORT, "--max_steps", 5, "--line_by_line", *padding,
        "--whole_word_mask", "--do_train", "--do_eval", "--bf16", "--fp16_opt_level", "O2", "--output_dir", tmp_path,
    )  # fmt: skip
    assert results(tmp_path)["eval_samples"] == 30


def test_a_stream_trains(corpus, tmp_path):
    run_script(
        "run_mlm.py", *from_scratch("bert"), "--train_file", corpus / "train.txt", "--streaming", *SHORT,
        "--max_steps", 4, "--max_eval_samples", 8, "--do_train", "--do_eval", "--output_dir", tmp_path,
    )  # fmt: skip
    assert results(tmp_path)["eval_samples"] == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model_type", "gpt2"], "gpt2: a model of this kind is trained by run_clm.py, not by run_mlm.py"),
        (["--model_type", "xlnet", "--config_overrides", "d_model=32,n_head=2,n_layer=1"], "trained by run_plm.py"),
        (["--model_type", "bert", "--config_overrides", "hidden_size=30,num_attention_heads=4"], "not a multiple of"),
        (["--model_type", "bert", "--tokenizer_name", "{gpt2}"], "--tokenizer_name: the tokenizer has no mask token"),
        (
            ["--model_type", "bert", "--mlm_probability", "1.5"],
            "--mlm_probability 1.5: give a number above 0 and below 1",
        ),
        (
            ["--model_type", "bert", "--line_by_line", "--max_seq_length", "2"],
            "--max_seq_length 2: the special tokens",
        ),
        (["--model_type", "roberta", "--max_seq_length", "513"], "--max_seq_length 513: the model has 510 positions"),
    ],
)
def test_bad_input_is_one_line(corpus, tokenizer_without_mask, tmp_path, flags, words):
    flags = [str(flag).replace("{gpt2}", str(tokenizer_without_mask)) for flag in flags]
    done = run_script(
        "run_mlm.py", *flags, "--vocab_size", 600, "--train_file", corpus / "train.txt", "--do_train",
        "--output_dir", tmp_path, expect=2,
    )  # fmt: skip
    assert words in one_error_line(done)


def test_too_little_text_to_predict_anything_of_is_one_line(files, tmp_path):
    done = run_script(
        "run_mlm.py", *from_scratch("bert"), *files, *SHORT, "--max_eval_samples", 1, "--mlm_probability", 1e-6,
        "--do_eval", "--output_dir", tmp_path, expect=2,
    )  # fmt: skip
    assert "--do_eval: nothing is predicted in so little validation text" in done.stderr


def test_another_masked_model_gets_a_tokenizer_with_a_mask(files, tmp_path):
    run_script(
        "run_mlm.py", "--model_type", "electra", "--config_overrides", SMALL, "--vocab_size", 400, *files, *SHORT,
        "--max_steps", 2, "--do_train", "--output_dir", tmp_path,
    )  # fmt: skip
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["mask_token"] == "<mask>"


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the texts in ../shared/data")
@pytest.mark.parametrize(("family", "tokenizer"), [("bert", "bert-base-uncased"), ("albert", "albert-base-v2")])
def test_real_text_with_the_familys_own_tokenizer(tmp_path, family, tokenizer):
    data = SHARED / "data"
    run_script(
        "run_mlm.py", "--model_type", family, "--config_overrides", OVERRIDES[family],
        "--tokenizer_name", data / "tokenizers" / tokenizer,
        "--train_file", data / "wikitext-2-raw-v1" / "wiki.valid.raw",
        "--validation_file", data / "wikitext-2-raw-v1" / "wiki.test.raw",
        *SHORT, "--max_steps", 40, "--warmup_steps", 4, "--max_eval_samples", 64, "--do_train", "--do_eval", "--output_dir", tmp_path,
    )  # fmt: skip
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert results(tmp_path)["eval_loss"] < 9.0 < history[0]["loss"]
