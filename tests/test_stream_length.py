"""utils/stream_length.py: the steps of an epoch are counted once, and are those of the text."""

import math
from types import SimpleNamespace

import pytest
import stream_text
from commands import TINY_GPT2, log_history, one_error_line, run_script
from stream_text import Numbered, load, write

from utils import corpus as corpus_module
from utils import stream_length
from utils.data_arguments import DataArguments
from utils.stream_windows import Cutter


def flags(**options) -> SimpleNamespace:
    defaults = {"num_train_epochs": 3.0, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    return SimpleNamespace(**{**defaults, "process_index": 0, "world_size": 1, **options})


class Described(Numbered):
    """What the key of a count is made of."""

    tokenizer = SimpleNamespace()
    max_length = None


@pytest.mark.parametrize("limit", [None, 10, 10_000])
@pytest.mark.parametrize("kind", ["blocks", "lines"])
def test_steps_are_those_of_the_text(kind, limit, tmp_path):
    text = load(write(tmp_path, 300, 200), validation_file=write(tmp_path, 5, first=9000))["train"]
    data = SimpleNamespace(max_train_samples=limit)
    samples = 500 if kind == "lines" else len(stream_text.tokens(500)) / 16
    samples = min(samples, limit or samples)
    for epochs in (1, 2.5):
        encode = Described()
        count = stream_length.steps(
            text, encode, Cutter(kind, 16), data, flags(num_train_epochs=epochs), tmp_path / "c"
        )
        assert count == math.ceil(epochs * samples / 4)
        assert encode.documents == (500 if epochs == 1 else 0)  # found the second time
    changed = load(write(tmp_path, 300, 100), validation_file=write(tmp_path, 5, first=9000))["train"]
    encode = Described()
    stream_length.steps(changed, encode, Cutter(kind, 16), data, flags(), tmp_path / "c")
    assert encode.documents == 400


def test_what_may_change_unseen_is_counted_again(tmp_path):
    (tmp_path / "data").mkdir()
    for documents in (300, 200):
        write(tmp_path / "data", documents)
        text = corpus_module.load_text(DataArguments(dataset_name=str(tmp_path / "data"), streaming=True), ["train"])
        encode = Described()
        data = SimpleNamespace(max_train_samples=None)
        count = stream_length.steps(text["train"], encode, Cutter("lines", 16), data, flags(), tmp_path / "c")
        assert encode.documents == documents * 0.95 and count == math.ceil(3 * documents * 0.95 / 4)


def test_epochs_of_a_stream_end_where_its_text_does(corpus, tmp_path):
    run_script(
        "run_clm.py", *TINY_GPT2, "--train_file", corpus / "train.txt", "--validation_file", corpus / "validation.txt",
        "--streaming", "--block_size", 64, "--num_train_epochs", 2, "--eval_strategy", "epoch", "--max_eval_samples", 4,
        "--save_strategy", "epoch", "--do_train", "--output_dir", tmp_path,
    )  # fmt: skip
    evaluated = [(entry["epoch"], entry["step"]) for entry in log_history(tmp_path) if "eval_loss" in entry]
    (first, half), (last, steps) = evaluated[:2]  # and once more at the end
    assert first == pytest.approx(1, abs=0.05) and last == 2 and abs(2 * half - steps) <= 2
    assert {f.name for f in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{half}", f"checkpoint-{steps}"}
    assert (tmp_path / "results.md").read_text().endswith("| 2 |\n")


def test_a_stream_by_steps_claims_no_epochs(corpus, tmp_path):
    run_script(
        "run_clm.py", *TINY_GPT2, "--train_file", corpus / "train.txt", "--streaming", "--block_size", 64,
        "--max_steps", 2, "--do_train", "--output_dir", tmp_path,
    )  # fmt: skip
    assert (tmp_path / "results.md").read_text().endswith("| - |\n")


@pytest.mark.parametrize("flag", [["--packing", "documents"], ["--data_mix", "{}=1"]])
def test_what_cannot_be_counted_asks_for_steps(flag, corpus, tmp_path):
    flag = [str(word).replace("{}", str(corpus / "train.txt")) for word in flag]
    source = [] if "--data_mix" in flag else ["--train_file", corpus / "train.txt"]
    done = run_script(
        "run_clm.py", *TINY_GPT2, *source, *flag, "--streaming", "--do_train", "--output_dir", tmp_path, expect=2
    )
    assert f"--streaming with {flag[0]}" in one_error_line(done) and "--max_steps" in one_error_line(done)
