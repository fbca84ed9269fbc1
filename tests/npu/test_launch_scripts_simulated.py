"""scripts/train_full_8p.sh and scripts/verify_npu.sh on simulated NPUs. No NPU is involved."""

import json
import re
import subprocess
import sys
from pathlib import Path

from commands import ROOT, TINY_GPT2, results, run
from small_runs import simulated


def launch(script: str, *words: str | Path, expect: int = 0) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts" / script), *map(str, words)]
    done = run(command, PYTHON=sys.executable, **simulated(2))
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def test_a_full_run_on_two_simulated_npus(corpus, tmp_path) -> None:
    words = [
        "clm",
        "--data_path",
        corpus,
        *TINY_GPT2,
        "--block_size",
        "32",
        "--max_steps",
        "6",
        "--logging_steps",
        "1",
    ]
    words += ["--output_dir", tmp_path / "output", "--env_npu", "yes"]
    done = launch("train_full_8p.sh", *words, "--nproc", "2")
    assert re.search(r"^\| 2p-NPU \| [\d.]+ \| [\d.]+ \| O2 \| [\d.]+ \|\n$", done.stdout, re.MULTILINE)
    # Combined gradients at O2: float32 masters, so one buffer of them.
    assert list(results(tmp_path / "output")["gradient_buffers"]) == ["float32"]
    history = json.loads((tmp_path / "output" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "loss" in entry]) == 6
    assert "rank 1:" in (tmp_path / "output" / "train_1.log").read_text()


def test_more_ranks_than_simulated_npus_are_refused(corpus, tmp_path) -> None:
    words = ["clm", "--data_path", corpus, *TINY_GPT2, "--output_dir", tmp_path / "output"]
    done = launch("train_full_8p.sh", *words, expect=2)
    assert "--nproc 8: 2 NPU visible here; give --nproc 2 or less" in done.stderr
    assert not (tmp_path / "output").exists()


def test_verify_npu_compares_a_simulated_npu_with_the_cpu(tmp_path) -> None:
    words = ["--checks", "parity,profile", "--objectives", "clm", "--small", "--output_dir", tmp_path / "report"]
    launch("verify_npu.sh", *words)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["device"] == "npu" and report["verdict"] == "passed"
    assert [part[0] for part in report["checks"]["parity"]["parts"]] == ["passed", "passed"]
