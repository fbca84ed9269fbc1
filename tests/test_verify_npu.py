"""scripts/verify_npu.sh, which needs an NPU: here it says so, and each of its checks runs on the CPU."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from commands import ROOT, TINY_GPT2, run, run_script

from utils import device, verify_npu
from utils.verify_npu import FAILED, PASSED, UNCHECKED


def verify(*words: str | Path, expect: int) -> subprocess.CompletedProcess:
    done = run(["bash", str(ROOT / "scripts" / "verify_npu.sh"), *map(str, words)], PYTHON=sys.executable)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def verification(folder: Path, *words: str | Path) -> verify_npu.Verification:
    return verify_npu.Verification(verify_npu.parse(["--device", "cpu", "--output_dir", *map(str, [folder, *words])]))


@pytest.mark.skipif(device.accelerator() == "npu", reason="there is an NPU here")
def test_without_an_npu_it_says_what_it_could_not_check(tmp_path) -> None:
    done = verify("--output_dir", tmp_path / "report", expect=3)
    report = (tmp_path / "report" / "report.md").read_text()
    assert report.startswith("# Verification on NPU: not checked\n")
    for title in ("Losses beside the CPU's", "Results rows beside the published ones", "Profile of one step"):
        assert f"## {title}: not checked\n\n- not checked: there is no NPU here\n" in report
    assert "## Environment: passed" in report
    assert json.loads((tmp_path / "report" / "doctor.json").read_text())
    with tarfile.open(tmp_path / "report.tar.gz") as archive:
        names = archive.getnames()
    assert {"report/report.md", "report/report.json", "report/doctor.json", "report/logs/doctor.log"} <= set(names)
    assert str(tmp_path / "report.tar.gz") in done.stdout


def test_losses_and_profile_on_the_cpu(tmp_path, monkeypatch) -> None:
    monkeypatch.delitem(verify_npu.LEVELS, "O0")  # the same run twice, on a CPU
    words = ["--device", "cpu", "--checks", "parity,profile", "--objectives", "clm", "--output_dir", str(tmp_path)]
    assert verify_npu.main(words) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == PASSED
    assert [part[1].split(" on ")[0] for part in report["checks"]["parity"]["parts"]] == ["clm, O2"]
    # O2 was asked for and came about, in the run that is held against the CPU's.
    assert "| O2 |" in (tmp_path / "parity" / "clm_cpu_O2" / "results.md").read_text()
    text = (tmp_path / "report.md").read_text()
    # One step: a forward and a backward pass of two layers, and one update.
    assert "aten::_fused_adamw_" in text and "Optimizer.step" in text
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name", "").startswith("Optimizer.step#CombinedOptimizer") for event in events) == 1


def test_the_results_row_stands_beside_the_published_ones(corpus, tmp_path) -> None:
    model = tmp_path / "model"
    train = ["--train_file", corpus / "train.txt", "--block_size", 32, "--max_steps", 1, "--do_train"]
    run_script("run_clm.py", *TINY_GPT2, *train, "--output_dir", model)
    words = ["--objectives", "clm", "--gpt2", model, "--data_path", corpus, "--max_steps", "2", "--nproc", "1"]
    check = verify_npu.rows(verification(tmp_path / "report", *words))
    assert check.parts == [
        (PASSED, f"{model} on 1"),
        (UNCHECKED, "8 cards: 1 of them here, so 1 took part at most"),
        (UNCHECKED, "accuracy: it needs 3 epochs, --max_steps 2 ended them early"),
    ]
    lines = check.text.splitlines()
    assert lines[2].startswith(f"| {model} | 1p-CPU | 0.")
    assert lines[3] == "| gpt2, published | 1p-NPU(910ProB) | 42.62% | 11.392 | O2 | 3 |"
    assert (tmp_path / "report" / "rows_clm_1p" / "train_0.log").exists()


def test_eight_cards_are_eight_cards(tmp_path, monkeypatch) -> None:
    """The commands that would run on a full node, and what is made of an unreachable hub and of a failure."""
    one = verification(tmp_path / "report", "--nproc", "8")
    commands = []

    def no_run(name: str, command: list, python: bool = True) -> subprocess.CompletedProcess:
        commands.append(command)
        said = "the hub at https://huggingface.co cannot be reached" if "clm" in command else "out of memory"
        return subprocess.CompletedProcess(command, 2, "", f"x.py: error: {said}\n")

    monkeypatch.setattr(one, "run", no_run)
    check = verify_npu.rows(one)
    assert [command[1:5] for command in commands] == [
        ["scripts/train_full_1p.sh", "clm", "--nproc", "1"],
        ["scripts/train_full_8p.sh", "clm", "--nproc", "8"],
        ["scripts/train_full_1p.sh", "mlm", "--nproc", "1"],
        ["scripts/train_full_8p.sh", "mlm", "--nproc", "8"],
    ]
    assert all("--dataset_name wikitext --dataset_config_name wikitext-2-raw-v1" in " ".join(c) for c in commands)
    assert [verdict for verdict, _ in check.parts] == [UNCHECKED, UNCHECKED, FAILED, FAILED]
    assert "x.py: error: out of memory" in check.parts[2][1]


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([6.0, 5.5, 5.0], PASSED),
        ([6.0, 5.52, 5.01], PASSED),
        ([6.0, 5.75, 5.5], FAILED),  # learns half as fast
        ([6.0, 6.0, 6.0], FAILED),
        ([6.0, 5.5, float("nan")], FAILED),
        ([float("nan"), 5.5, 5.0], FAILED),
    ],
)
def test_losses_are_compared_with_what_they_fall_by(ours, verdict) -> None:
    assert verify_npu.compare(ours, [6.0, 5.5, 5.0], 0.05)[0] == verdict


def test_a_run_that_fails_is_told_and_fails_all(tmp_path, monkeypatch) -> None:
    one = verification(tmp_path / "report", "--objectives", "clm")
    monkeypatch.setitem(verify_npu.LEVELS, "O2", ("--no_such_flag 1", 0.05))
    monkeypatch.delitem(verify_npu.LEVELS, "O0")
    check = verify_npu.parity(one)
    [(verdict, what)] = check.parts
    assert verdict == FAILED and "unknown flag --no_such_flag" in what
    assert verify_npu.write_report(one, [check, verify_npu.Check("profile", [(PASSED, "")])]) == FAILED
    assert "unknown flag" in (tmp_path / "report" / "logs" / "parity_clm_cpu_O2.log").read_text()


@pytest.mark.parametrize(
    ("verdicts", "together"),
    [([PASSED, PASSED], PASSED), ([PASSED, UNCHECKED], UNCHECKED), ([UNCHECKED, FAILED, PASSED], FAILED)],
)
def test_the_worst_verdict_counts(verdicts, together) -> None:
    assert verify_npu.worst(verdicts) == together


def test_wrong_words_are_refused(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        verify_npu.parse(["--checks", "doctor,speed"])
    assert "doctor,speed: give some of doctor,parity,rows,profile" in capsys.readouterr().err
