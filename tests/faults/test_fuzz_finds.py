"""What fuzz_readers.py and fuzz_checkpoints.py have found, fed again: a result, or one line that tells what is wrong."""

import json

import fuzz_checkpoints
import fuzz_readers
import pytest
import torch

from utils.errors import UsageError


@pytest.mark.parametrize("words", [["--save_steps=1e400"], ["--eval_steps", "inf", "--eval_strategy", "steps"]])
def test_command_lines(words):
    fuzz_readers.parse_command(words)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("trainer_state.json", {"train_batch_size": [1]}),
        ("trainer_state.json", {"log_history": "none"}),
        ("trainer_state.json", {"global_step": -1}),
        ("trainer_state.json", {"of another version": 1}),
        ("progress_0.json", None),
        ("progress_0.json", {"seconds": None}),
    ],
)
def test_state_files(name, changed):
    content = json.loads((fuzz_checkpoints.whole()[0] / name).read_bytes())
    content = {} if changed is None else content | changed
    with (
        fuzz_checkpoints.in_place_of(name, json.dumps(content).encode()),
        pytest.raises(UsageError, match="is damaged"),
    ):
        fuzz_checkpoints.read()


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("scaler.pt", {}),
        ("scaler.pt", {"scale": torch.ones(3), "_growth_tracker": torch.zeros(0)}),
        ("optimizer.pt", {"state": {}}),
        ("scheduler.pt", []),
        ("rng_state.pth", {"python": 1}),
    ],
)
def test_plain_data_of_another_kind(name, tree, tmp_path):
    torch.save(tree, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    with fuzz_checkpoints.in_place_of(name, content), pytest.raises(UsageError, match="is damaged"):
        fuzz_checkpoints.read()


def test_a_file_that_says_another_version_of_its_format():
    content = (fuzz_checkpoints.whole()[0] / "scaler.pt").read_bytes()
    with fuzz_checkpoints.in_place_of("scaler.pt", content.replace(b"3\n", b"P\n")):
        fuzz_readers.allow(fuzz_checkpoints.read)


def test_the_checkpoint_that_they_begin_with_is_a_good_one():
    fuzz_checkpoints.read()
