"""Trainings that are stopped, killed and frozen by real signals, as a user runs them."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, TINY_GPT2, log_history, losses, one_error_line, run, run_script, torchrun, warm_python
from test_launch_scripts import finish, processes_of, stand_in_python, start, wait_for

from utils import checkpoint, output_folder

WORKER = Path(__file__).with_name("faulty_script.py")
TRAIN = [
    *TINY_GPT2,
    "--do_train",
    "--block_size",
    "32",
    "--per_device_train_batch_size",
    "4",
    "--use_cpu",
    "--max_steps",
    "12",
]
TRAIN += ["--logging_steps", "1", "--disable_tqdm", "true", "--report_to", "none"]
EVALUATE = ["--do_eval", "--eval_strategy", "steps", "--eval_steps", "6", "--max_eval_samples", "64"]


def faulty(
    folder: Path, fault: str, *words: str | Path, expect: int = 0, script: str = "run_clm.py"
) -> subprocess.CompletedProcess:
    """The script with a fault, in a process group of its own."""
    command = [str(WORKER), script, *map(str, words)]
    told = {"FAULT": fault, "FAULT_DONE": str(folder / "done")}
    done = warm_python().run(command, timeout=120, new_session=True, variables=told)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert (folder / "done").exists(), "the fault did not come"
    return done


def faulty_launch(folder: Path, fault: str, *words: str | Path, expect: int = 0) -> subprocess.CompletedProcess:
    """launch.sh with two ranks, one of which has a fault."""
    return finish(begin_launch(folder, fault, *words), expect)


def begin_launch(folder: Path, fault: str, *words: str | Path) -> subprocess.Popen:
    python = stand_in_python(folder, f'exec "{sys.executable}" "{WORKER}" "$@"')
    words = ["full", "2", "clm", "--nproc", "2", *words, "--output_dir", folder / "output"]
    return start(folder, "launch.sh", *words, PYTHON=python, FAULT=fault, FAULT_DONE=str(folder / "done"))


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints, each of which is complete."""
    found = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    for step in found:
        assert json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["global_step"] == step
    return found


def starts(output: Path, rank: int) -> int:
    return (output / f"train_{rank}.log").read_text().count(f" rank {rank}: ")


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory) -> Path:
    """The output folder of two ranks whom nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    faulty_launch(folder, "forward 999 0 SIGTERM process", *TRAIN, *map(str, files), "--do_eval", "false")
    return folder / "output"


# ---- stops ----
def test_sigterm_in_forward_with_workers(files, tmp_path) -> None:
    """To the whole process group, as schedulers do: the loaders must not go before the training has saved."""
    words = [*TRAIN, *files, "--output_dir", tmp_path / "output", "--dataloader_num_workers", "2"]
    done = faulty(tmp_path, "forward 5 0 SIGTERM group", *words, expect=143)
    told = "stopped by SIGTERM at step 5; checkpoint-5 is complete; the same command goes on from there"
    assert done.stdout.count(told) == 1 and "DataLoader worker" not in done.stdout + done.stderr
    assert steps(tmp_path / "output") == [5]  # from which test_killed_scripts.py goes on


def test_sigterm_to_one_rank_in_evaluation(files, tmp_path) -> None:
    """Rank 1 alone is told; both leave the evaluation, and torchrun starts neither again."""
    words = [*TRAIN, *EVALUATE, *files, "--max_restarts", "2"]
    done = faulty_launch(tmp_path, "evaluation 3 1 SIGTERM process", *words, expect=143)
    log = (tmp_path / "output" / "train_0.log").read_text()
    assert "stopped by SIGTERM at step 6; checkpoint-6 is complete" in log
    assert "ended by SIGTERM; the same command goes on from its newest checkpoint" in done.stderr
    assert "eval_loss" not in log and "Traceback" not in log
    assert steps(tmp_path / "output") == [6]
    assert [starts(tmp_path / "output", rank) for rank in (0, 1)] == [1, 1]


def test_sigint_in_a_save(files, tmp_path) -> None:
    words = [*TRAIN, *files, "--output_dir", tmp_path / "output", "--save_steps", "4"]
    done = faulty(tmp_path, "save 1 0 SIGINT process", *words, expect=130)
    assert "stopped by SIGINT at step 5; checkpoint-5 is complete" in done.stdout
    assert steps(tmp_path / "output") == [4, 5]


def test_a_second_signal_ends_a_save_at_once(files, tmp_path) -> None:
    words = [*TRAIN, *files, "--output_dir", tmp_path / "output", "--save_steps", "4"]
    done = faulty(tmp_path, "save 2 0 SIGTERM process 1.5 60", *words, expect=143)
    assert "stopped at once by a second SIGTERM" in done.stdout
    assert not (tmp_path / "output" / "checkpoint-8" / "trainer_state.json").exists()
    output = tmp_path / "output"
    assert checkpoint.newest(output, output_folder.run_id(output)) == output / "checkpoint-4"


def test_a_signal_before_training_is_one_line(files, tmp_path) -> None:
    words = [*TRAIN, *files, "--output_dir", tmp_path / "output"]
    done = faulty(tmp_path, "data 1 0 SIGINT process", *words, expect=130)
    assert "stopped by SIGINT\n" in done.stdout + done.stderr
    assert not (tmp_path / "output").exists()


def test_the_launch_script_hands_a_signal_on(files, tmp_path) -> None:
    words = [*TRAIN, *map(str, files), "--max_steps", "100000", "--max_restarts", "1"]
    process = begin_launch(tmp_path, "forward 999999 0 SIGTERM process", *words)
    log = tmp_path / "output" / "train_0.log"
    try:
        wait_for(lambda: log.exists() and "'loss'" in log.read_text(), "no training")
    finally:
        process.terminate()
    done = finish(process, expect=143)
    assert "is complete; the same command goes on from there" in log.read_text()
    assert "Traceback" not in log.read_text() + done.stdout + done.stderr
    assert len(steps(tmp_path / "output")) == 1 and processes_of(tmp_path / "output") == []


def test_a_run_that_ended_for_good_is_not_started_again_by_torchrun(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from utils import errors, signals\n"
        "def main():\n"
        "    print('started', flush=True)\n"
        "    raise ENDING\n"
        "errors.run(main, lambda: False)\n"
    )
    for ending in ("signals.Stopped(143, None, together=True)", "errors.UsageError('no such file')"):
        script.with_name("run.py").write_text(script.read_text().replace("ENDING", ending))
        done = run([*torchrun(1), "--max-restarts=2", str(script.with_name("run.py"))])
        assert done.returncode != 0 and done.stdout.count("started") == 1, done.stdout
    assert "no such file" in one_error_line(subprocess.CompletedProcess([], 2, "", done.stderr.split("Traceback")[0]))


# ---- numbers that go wrong ----
@pytest.mark.parametrize("combine", ["true", "false"])
def test_inf_on_one_of_two_ranks_makes_both_skip(files, tmp_path, combine) -> None:
    """In float32, without a loss scale: the verdict stays on the device."""
    words = [*TRAIN, *map(str, files), "--do_eval", "false", "--use_combine_grad", combine]
    faulty_launch(tmp_path, "gradient 5 1 inf", *words)
    output = tmp_path / "output"
    logs = [(output / f"train_{rank}.log").read_text() for rank in (0, 1)]
    assert "step 5: the gradients are not finite, so the weights stay as they are" in logs[0]
    norms = [entry["grad_norm"] for entry in log_history(output) if "grad_norm" in entry]
    assert [math.isfinite(norm) for norm in norms] == [step != 5 for step in range(1, 13)]
    assert all(map(math.isfinite, losses(output)))
    ends = [re.findall(r"^weights (\S+)$", log, re.MULTILINE) for log in logs]
    assert len(ends[0]) == 1 and ends[0] == ends[1] and math.isfinite(float(ends[0][0]))


# ---- ranks that die or hang ----
def test_sigkill_in_the_all_reduce_and_a_restart_that_ends_alike(files, tmp_path, undisturbed) -> None:
    words = [*TRAIN, *map(str, files), "--do_eval", "false", "--save_steps", "4", "--max_restarts", "1"]
    faulty_launch(tmp_path, "all_reduce 20 1 SIGKILL process", *words)
    log = (tmp_path / "output" / "train_0.log").read_text()
    assert "resuming from checkpoint-" in log
    assert [starts(tmp_path / "output", rank) for rank in (0, 1)] == [2, 2]
    assert losses(tmp_path / "output") == losses(undisturbed)


def test_another_number_of_ranks_is_refused(files, tmp_path, undisturbed) -> None:
    words = [*TRAIN, *files, "--output_dir", tmp_path / "output"]
    resume = ["--resume_from_checkpoint", undisturbed / "checkpoint-12"]
    done = run_script("run_clm.py", *words, *resume, expect=2)
    assert "checkpoint-12: was written by 2 processes, this run has 1" in one_error_line(done)
    assert not (tmp_path / "output").exists()


def test_a_frozen_rank_is_named_and_ends_the_job(files, tmp_path) -> None:
    words = [*TRAIN, *map(str, files), "--do_eval", "false", "--ddp_timeout", "10"]
    process = begin_launch(tmp_path, "forward 5 1 SIGSTOP process", *words)
    try:
        _, said = process.communicate(timeout=120)
    finally:
        process.terminate()
    log = (tmp_path / "output" / "train_0.log").read_text()
    assert "no sign of life for 8 s: rank 1 on " in log and "rank 0, computing after step 4, ends too" in log
    # Rank 0 kills the frozen one and ends itself: either may be the first that the launch script sees.
    first = {1: "rank 0 ended with exit code 1", 137: "rank 1 was ended by signal 9"}
    assert first[process.returncode] in said
    assert processes_of(tmp_path / "output") == []


def test_a_mistake_is_not_started_again(files, tmp_path) -> None:
    words = [*TRAIN, *map(str, files), "--max_restarts", "2", "--block_size", "4000"]
    faulty_launch(tmp_path, "forward 1 0 SIGTERM process", *words, expect=2)
    assert [starts(tmp_path / "output", rank) for rank in (0, 1)] == [1, 1]
