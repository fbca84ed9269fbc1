"""What fuzz_readers.py has found, fed again: each input gives a result or one line that tells what is wrong."""

import fuzz_readers
import pytest


@pytest.mark.parametrize("words", [["--save_steps=1e400"], ["--eval_steps", "inf", "--eval_strategy", "steps"]])
def test_command_lines(words):
    fuzz_readers.parse_command(words)
