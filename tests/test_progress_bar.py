"""utils/progress_bar.py: what the bar shows in a terminal, and that a file has log entries alone."""

import io
import sys

from test_trainer import trainer_for

from utils.progress_bar import summary


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_summary_is_short():
    logs = {"loss": 3.21456, "tokens_per_second": 12345.6, "mfu": 0.413}
    assert summary(logs) == "loss 3.215, 12.3k tokens/s, MFU 41 %"
    assert summary({"loss": 3.0, "tokens_per_second": 2_500_000.0}) == "loss 3, 2.50M tokens/s"


def test_a_terminal_has_a_bar_with_loss_and_speed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    trainer_for(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, disable_tqdm=False).train()
    shown = terminal.getvalue()
    assert "4/4" in shown and "loss 4." in shown and "tokens/s" in shown and "MFU" in shown


def test_a_file_has_log_entries_and_no_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    trainer_for(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, disable_tqdm=False).train()
    assert file.getvalue() == ""
    assert len([line for line in capsys.readouterr().out.splitlines() if "'tokens_per_second'" in line]) == 4
