"""run_plm.py as a user runs it, in subprocesses. tests/test_families.py trains XLNet for longer."""

import json

import pytest
from commands import SHARED, losses, one_error_line, results, run_distributed, run_script

TINY_XLNET = "d_model=64,n_layer=2,n_head=2,d_inner=128,dropout=0.0"
SHORT = ["--max_seq_length", 64, "--per_device_train_batch_size", 8, "--logging_steps", 1, "--learning_rate", 3e-3]


@pytest.fixture(scope="session")
def tokenizer(tokenizers):
    """An XLNet tokenizer, for runs that are compared with each other."""
    return tokenizers("xlnet")


def fixed(tokenizer, files) -> list:
    overrides = f"{TINY_XLNET},vocab_size=600"
    return ["--model_type", "xlnet", "--config_overrides", overrides, "--tokenizer_name", tokenizer, *files, *SHORT]


def test_a_saved_model_evaluates_as_before(files, tmp_path):
    command = ["--model_type", "xlnet", "--config_overrides", TINY_XLNET, "--vocab_size", 600, *files, *SHORT]
    command += ["--max_steps", 30, "--warmup_steps", 3, "--do_train", "--do_eval", "--use_combine_grad"]
    run_script("run_plm.py", *command, "--output_dir", tmp_path / "a")
    found = results(tmp_path / "a")
    assert losses(tmp_path / "a")[-1] < losses(tmp_path / "a")[0] - 0.3
    assert 0 < found["eval_accuracy"] < 1 and found["perplexity"] > 1
    run_script(
        "run_plm.py", "--model_name_or_path", tmp_path / "a", *files, "--max_seq_length", 64,
        "--do_eval", "--output_dir", tmp_path / "b",
    )  # fmt: skip
    assert results(tmp_path / "b")["eval_loss"] == pytest.approx(found["eval_loss"], abs=1e-6)


def test_all_rows_have_the_same_losses(files, tokenizer, tmp_path):
    command = [*fixed(tokenizer, files), "--max_steps", 10, "--do_train", "--do_eval"]
    run_script("run_plm.py", *command, "--output_dir", tmp_path / "rows")
    run_script("run_plm.py", *command, "--full_head", "--output_dir", tmp_path / "full")
    assert losses(tmp_path / "rows") == pytest.approx(losses(tmp_path / "full"), rel=1e-4)
    assert results(tmp_path / "rows")["eval_loss"] == pytest.approx(results(tmp_path / "full")["eval_loss"], rel=1e-4)


def test_two_processes_at_o2_see_the_spans_of_one(files, tokenizer, tmp_path):
    command = [*fixed(tokenizer, files), "--max_steps", 8, "--do_train", "--do_eval", "--use_combine_grad"]
    half = ["--bf16", "--fp16_opt_level", "O2"]
    run_script("run_plm.py", *command, "--output_dir", tmp_path / "one")
    run_distributed(
        "run_plm.py", *command, *half, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "two"
    )  # fmt: skip
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-2)
    assert losses(tmp_path / "two")[-1] < losses(tmp_path / "two")[0] - 0.2
    assert "| O2 |" in (tmp_path / "two" / "results.md").read_text()


@pytest.mark.parametrize(
    "length",
    [
        ["--max_seq_length", 33],
        ["--line_by_line"],
        ["--line_by_line", "--pad_to_max_length", "--full_head"],
        ["--streaming", "--max_eval_samples", 9],
    ],
)
def test_odd_lengths_lines_and_streams(files, tokenizer, tmp_path, length):
    run_script(
        "run_plm.py", *fixed(tokenizer, files), "--max_steps", 3, *length, "--do_train", "--do_eval",
        "--output_dir", tmp_path,
    )  # fmt: skip
    assert results(tmp_path)["eval_loss"] > 0 and len(losses(tmp_path)) == 3
    if "--streaming" in length:
        assert results(tmp_path)["eval_samples"] == 9


def test_overrides_save_a_config_that_loads(files, tmp_path):
    """d_head derives from d_model and n_head: a config that kept the old one could not be loaded again."""
    run_script(
        "run_plm.py", "--model_type", "xlnet", "--config_overrides", "n_head=4,d_model=32,n_layer=1,d_inner=32",
        "--vocab_size", 300, *files, *SHORT, "--max_steps", 1, "--do_train", "--output_dir", tmp_path / "a",
    )  # fmt: skip
    assert json.loads((tmp_path / "a" / "config.json").read_text())["d_head"] == 8
    run_script(
        "run_plm.py", "--model_name_or_path", tmp_path / "a", *files, *SHORT, "--max_steps", 1, "--do_train",
        "--output_dir", tmp_path / "b",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--model_type", "xlnet", "--config_overrides", "d_model=30,n_head=4"],
            "--config_overrides d_model=30,n_head=4: ",
        ),
        (["--model_type", "bert"], "bert: a model of this kind is trained by run_mlm.py, not by run_plm.py"),
        (
            ["--model_type", "xlnet", "--plm_probability", 0],
            "--plm_probability 0.0: give a number above 0 and below 1",
        ),
        (["--model_type", "xlnet", "--tokenizer_name", "{gpt2}"], "--tokenizer_name: the tokenizer has no mask token"),
        (
            ["--model_type", "xlnet", "--line_by_line", "--max_seq_length", 2, "--plm_probability", 0.6],
            "--max_seq_length 2: the special tokens alone are 2; give 3 or more",
        ),
        (["--model_type", "xlnet", "--plm_probability", 0.01, "--max_seq_length", 50], "less than one of 50 tokens"),
    ],
)
def test_bad_input_is_one_line(corpus, tokenizer_without_mask, tmp_path, flags, words):
    flags = [str(flag).replace("{gpt2}", str(tokenizer_without_mask)) for flag in flags]
    done = run_script(
        "run_plm.py", *flags, "--vocab_size", 600, "--train_file", corpus / "train.txt", "--do_train",
        "--output_dir", tmp_path, expect=2,
    )  # fmt: skip
    assert words in one_error_line(done)
    if "is trained by" in words:
        assert "trained one of" not in done.stdout  # no tokenizer for a model of another script


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the texts in ../shared/data")
def test_real_text_with_xlnets_own_tokenizer(tmp_path):
    data = SHARED / "data"
    run_script(
        "run_plm.py", "--model_type", "xlnet", "--config_overrides", TINY_XLNET,
        "--tokenizer_name", data / "tokenizers" / "xlnet-base-cased",
        "--train_file", data / "wikitext-2-raw-v1" / "wiki.valid.raw",
        "--validation_file", data / "wikitext-2-raw-v1" / "wiki.test.raw",
        *SHORT, "--max_steps", 30, "--warmup_steps", 3, "--max_eval_samples", 64, "--do_train", "--do_eval",
        "--output_dir", tmp_path,
    )  # fmt: skip
    assert results(tmp_path)["eval_loss"] < 9.5 < losses(tmp_path)[0]
