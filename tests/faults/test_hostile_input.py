"""What a hostile or broken input does: it is refused in one line or handled, in memory that is bounded, and nothing is told
that must not be."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from commands import ROOT, run
from transformers import AutoTokenizer

from utils import corpus, hub, output_folder, tokenization
from utils.data_arguments import DataArguments
from utils.errors import UsageError, one_line
from utils.model import load_config
from utils.model_arguments import ModelArguments
from utils.training_arguments import LanguageModelingArguments

MEGABYTE = 1 << 20
# Reads or tokenizes a file in a process of its own; prints the outcome and the most memory it had, in MiB.
READER = """
import resource, sys, tempfile
from utils import corpus, tokenization
from utils.data_arguments import DataArguments
from utils.errors import UsageError
file, tokenizer = sys.argv[1:]
data = DataArguments(train_file=[file], validation_file=[file])
with tempfile.TemporaryDirectory() as cache:
    try:
        text = corpus.load_text(data, ["train"], cache)["train"]
        outcome = f"{len(text)} rows"
        if tokenizer:
            from transformers import AutoTokenizer
            found = tokenization.tokenize(text, AutoTokenizer.from_pretrained(tokenizer), cache)
            outcome = f"{len(found.ends)} documents, {len(found.ids)} tokens"
    except UsageError as error:
        outcome = f"refused: {error}"
print(outcome)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def read_alone(file: Path, tokenizer: Path | str = "") -> tuple[str, int]:
    """(what came of it, the process's peak memory in MiB)."""
    command = [sys.executable, "-c", READER, str(file), str(tokenizer)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *_, outcome, memory = done.stdout.splitlines()
    return outcome, int(memory)


def refusal(act, *arguments) -> str:
    with pytest.raises(UsageError) as caught:
        act(*arguments)
    return one_line(caught.value)


def load(file: Path, **options):
    data = DataArguments(train_file=[str(file)], validation_file=[str(file)], **options)
    return corpus.load_text(data, ["train"], str(file.parent / "cache"))["train"]


# ---- what expands without end ----
def write_bomb(file: Path, megabytes: int, unit: bytes) -> None:
    opened = gzip.open(file, "wb", 9) if file.suffix == ".gz" else zstandard.open(file, "wb")
    with opened as stream:
        for _ in range(megabytes):
            stream.write(unit * (MEGABYTE // len(unit)))


@pytest.mark.parametrize("name, unit", [("a.txt.gz", b"a"), ("a.jsonl.zst", b'{"text": "a"}\n  ')])
def test_a_file_that_expands_without_end_is_refused_in_bounded_memory(name, unit, tmp_path):
    write_bomb(tmp_path / name, 600, unit)
    assert (tmp_path / name).stat().st_size < 3 * MEGABYTE
    outcome, memory = read_alone(tmp_path / name)
    assert "decompress it and name that file" in outcome and str(tmp_path / name) in outcome
    assert memory < 1500


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_text_that_shrinks_well_is_read(suffix, tmp_path):
    write_bomb(tmp_path / f"a.txt.{suffix}", 20, b"the same line again and again\n\n\n")
    assert len(load(tmp_path / f"a.txt.{suffix}")) == 20 * (MEGABYTE // 32) * 3


# ---- odd text ----
def test_a_line_of_100_megabytes_is_tokenized_in_bounded_memory(corpus, tokenizers, tmp_path):
    words = (corpus / "train.txt").read_text().replace("\n", " ")
    (tmp_path / "a.txt").write_text((words * (100_000_000 // len(words) + 1))[:100_000_000])
    outcome, memory = read_alone(tmp_path / "a.txt", tokenizers("gpt2"))
    assert outcome.startswith("1 documents, ") and int(outcome.split()[2]) > 10_000_000
    assert memory < 4000


def test_zero_bytes_behind_the_start_of_a_file_are_text(tokenizers, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a line\n" * 20_000 + b"x\0y\n")
    tokenizer = AutoTokenizer.from_pretrained(tokenizers("gpt2"))
    found = tokenization.tokenize(load(tmp_path / "a.txt"), tokenizer, str(tmp_path / "cache"))
    expected = tokenizer("x\0y\n")["input_ids"]
    assert np.array_equal(found.ids[-len(expected) :], expected)


@pytest.mark.parametrize(
    "name, content, place",
    [
        ("a.jsonl", '{"text": "fine"}\n{"text": "a \\ud800 b"}\n', "line 2"),
        ("a.json", '[{"text": "fine"}, {"text": "a \\udc00\\ud800 b"}]', "item 2 of its array"),
    ],
)
def test_half_a_surrogate_pair_is_refused_with_its_place(name, content, place, tmp_path):
    (tmp_path / name).write_text(content)
    message = refusal(load, tmp_path / name)
    assert f"{name}: {place} holds \\ud" in message
    (tmp_path / name).write_text(content.replace("\\udc00", "").replace("\\ud800", "\\ud83d\\ude00"))
    assert load(tmp_path / name)[1]["text"] == "a \U0001f600 b"


# ---- names and links ----
def test_a_link_that_leads_back_is_not_followed_for_ever(tmp_path):
    (tmp_path / "texts" / "inner").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("text\n")
    pattern = str(tmp_path / "texts" / "**" / "*.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("text\n")
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "elsewhere")
    assert len(corpus.find_files("--train_file", [pattern])) == 2
    for name in ("one", "two"):
        (tmp_path / "texts" / "inner" / name).symlink_to(tmp_path / "texts")
    message = refusal(corpus.find_files, "--train_file", [pattern])
    assert "inner/one is a link to a folder that it lies in" in message or "inner/two is a link" in message


def test_a_link_to_itself_is_no_file_and_no_output_folder(tmp_path):
    (tmp_path / "self").symlink_to("self")
    assert "no such file" in refusal(corpus.find_files, "--train_file", [str(tmp_path / "self")])
    for folder in ("self", "self/inner"):
        assert "is a link to no folder" in refusal(
            output_folder.claim, str(tmp_path / folder), "run_clm.py", {}, False, None
        )
    assert "name another folder" in refusal(output_folder.claim, "x" * 300, "run_clm.py", {}, False, None)


def test_a_name_cannot_speak_to_the_terminal():
    name = "\x1b[31mred\x1b]0;title\x07\u202etxt.exe\x9b"
    message = refusal(corpus.find_files, "--train_file", [name])
    assert message == r"--train_file \x1b[31mred\x1b]0;title\x07\u202etxt.exe\x9b: matches no file"


# ---- secrets ----
def test_no_log_shows_a_token(tmp_path):
    words = ["--token", "hf_one", "--hub_token=hf_two", "--push_to_hub_token", "hf three", "--tokenizer_name", "shown"]
    done = run(["bash", "scripts/run_rank.sh", str(tmp_path), str(tmp_path), "no", "true", *words])
    assert done.returncode == 0
    log = (tmp_path / "train_0.log").read_text()
    assert "hf" not in log and "--token *** --hub_token=*** --push_to_hub_token *** --tokenizer_name shown" in log


def test_saved_arguments_hold_no_token(tmp_path):
    args = LanguageModelingArguments(output_dir=str(tmp_path / "out"), hub_token="hf_secret", use_cpu=True)
    torch.save(args, tmp_path / "training_args.bin")
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    assert args.hub_token == "hf_secret"


def test_the_password_of_a_mirror_is_not_told(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://user:secret@mirror.example/hf")
    error = hub.explain(ConnectionError("couldn't connect"), "--model_name_or_path", "gpt2")
    assert "https://***@mirror.example/hf" in str(error) and "secret" not in str(error)


def test_a_saved_dataset_that_names_files_elsewhere_is_refused(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret\n")
    state = {"_data_files": [{"filename": "../secret.txt"}], "_fingerprint": "a", "_split": None}
    (folder / "state.json").write_text(
        json.dumps(
            {
                **state,
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
            }
        )
    )
    (folder / "dataset_info.json").write_text(
        json.dumps({"features": {"text": {"dtype": "string", "_type": "Value"}}})
    )
    data = DataArguments(dataset_name=str(folder))
    message = refusal(corpus.load_text, data, ["train"])
    assert "secret\n" not in message and f"--dataset_name {folder}" in message


@pytest.mark.parametrize("trusted", [False, True])
def test_code_that_comes_with_a_model_does_not_run(trusted, tmp_path):
    folder, trace = tmp_path / "model", tmp_path / "it ran"
    folder.mkdir()
    config = {"model_type": "hidden", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import PretrainedConfig\n\n\nclass Config(PretrainedConfig):\n    model_type = 'hidden'\n"
    )
    wanted = ModelArguments(model_name_or_path=str(folder), trust_remote_code=trusted)
    if trusted:
        assert load_config(wanted).model_type == "hidden"
    else:
        assert "trust_remote_code" in refusal(load_config, wanted)
    assert trace.exists() == trusted  # the code is such that would be seen
