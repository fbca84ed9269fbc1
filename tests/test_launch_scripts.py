"""scripts/train_*.sh, launch.sh, run_rank.sh and env_npu.sh as a user runs them, with processes on the CPU."""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, TINY_GPT2, results

from utils import launch
from utils.errors import UsageError

SCRIPTS = ROOT / "scripts"
SHORT = ["--block_size", "32", "--per_device_train_batch_size", "4", "--logging_steps", "1"]
CLOSING = re.compile(
    r"------------------ Final result ------------------\n"
    r"Final Performance samples/sec : (?P<fps>[\d.]+|n/a)\n"
    r"Final Train Accuracy : (?P<accuracy>[\d.]+|n/a)\n"
    r"E2E Training Duration sec : (?P<seconds>\d+)\n"
    r"\| Device \| Acc \| FPS \| AMP_Type \| Epochs \|\n"
    r"\|[-|]+\|\n"
    r"\| (?P<device>\S+) \|[^\n]*\|\n$"
)


def environment(**variables: str) -> dict[str, str]:
    """The surroundings of a launch: this Python, and nothing that a launcher or CANN has set."""
    leave_out = ("OMP_", "HCCL_", "ASCEND_", "VIRTUAL_ENV", "MASTER_", "TASK_QUEUE", "NETWORK_INTERFACE", "CANN_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(leave_out)}
    return {**kept, "PYTHON": sys.executable, "TOKENIZERS_PARALLELISM": "false", **variables}


def start(folder: Path, script: str, *words: str | Path, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(SCRIPTS / script), *map(str, words)],
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, expect: int = 0) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.terminate()  # which ends its ranks too
    assert process.returncode == expect, f"exit code {process.returncode}\n{out[-4000:]}\n{err[-4000:]}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(
    folder: Path, script: str, *words: str | Path, expect: int = 0, **variables: str
) -> subprocess.CompletedProcess:
    return finish(start(folder, script, *words, **variables), expect)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60):
    """What `condition` returns as soon as that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"after {seconds} s: {what}")


def processes_of(output: Path, rank: int | None = None) -> list[int]:
    """The processes that train into this folder; of one rank, its Python alone."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0") if rank is not None else []
        except OSError:  # gone, or somebody else's
            continue
        is_rank = rank is None or (f"RANK={rank}".encode() in variables and command[1].endswith(b"run_clm.py"))
        if str(output).encode() in command and is_rank:
            found.append(int(entry.name))
    return found


def stand_in_python(folder: Path, run_clm: str) -> str:
    """A program to be PYTHON: Python, but for run_clm.py, in whose place the shell runs `run_clm`."""
    path = folder / "python"
    path.write_text(
        f'#!/usr/bin/env bash\nif [[ $1 == */run_clm.py ]]; then\n{run_clm}\nelse exec "{sys.executable}" "$@"; fi\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# ---- the scripts ----
def test_the_shell_scripts_pass_shellcheck() -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install -r requirements-test.txt")
    scripts = sorted(SCRIPTS.glob("*.sh"))
    assert len(scripts) >= 12
    done = subprocess.run([shellcheck, "-x", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_help_is_the_head_of_the_script(tmp_path) -> None:
    done = run(tmp_path, "train_full_8p.sh", "--help")
    assert "--data_path FOLDER" in done.stdout and "train_<rank>.log" in done.stdout
    assert "#" not in done.stdout and "set -euo" not in done.stdout


# ---- training ----
@pytest.fixture(scope="module")
def full(corpus, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The accuracy run on two processes, from another folder than the project's: that folder, and what was said."""
    folder = tmp_path_factory.mktemp("full")
    shutil.copytree(corpus, folder / "texts")
    words = ["clm", "--nproc=2", "--data_path", "texts", *TINY_GPT2, *SHORT, "--max_steps", "6"]
    return folder, run(folder, "train_full_8p.sh", *words)


def test_a_full_run_trains_on_all_ranks_and_evaluates(full) -> None:
    folder, _ = full
    output = folder / "output" / "clm_full_2p"
    arguments = json.loads((output / "run.json").read_text())["arguments"]
    assert arguments["do_train"] and arguments["do_eval"] and arguments["use_combine_grad"]
    assert arguments["train_file"] == ["texts/train.txt"] and arguments["validation_file"] == ["texts/validation.txt"]
    assert arguments["max_steps"] == 6
    assert results(output)["eval_accuracy"] > 0
    state = json.loads((output / "trainer_state.json").read_text())
    # 1,631 blocks in batches of 4 on two ranks: 204 steps an epoch.
    assert state["epoch"] == pytest.approx(6 / 204, rel=0.01)


def test_the_log_ends_as_those_of_modelzoo_do(full) -> None:
    folder, done = full
    closing = CLOSING.search(done.stdout)
    assert closing, done.stdout[-1000:]
    found = results(folder / "output" / "clm_full_2p")
    assert float(closing["fps"]) == found["fps"]
    assert float(closing["accuracy"]) == pytest.approx(found["eval_accuracy"], abs=5e-5)
    assert found["train_runtime"] < int(closing["seconds"]) < 120
    assert closing["device"] == "2p-CPU"


def test_each_rank_has_a_log_and_rank_0_the_terminal(full) -> None:
    folder, done = full
    logs = [(folder / "output" / "clm_full_2p" / f"train_{rank}.log").read_text() for rank in (0, 1)]
    for rank, log in enumerate(logs):
        assert re.match(rf"\S+ \S+ rank {rank}: .*run_clm\.py --do_train", log)
    assert "training from step 0 to " in logs[0] and "training from step" not in logs[1]
    assert logs[0] in done.stdout
    assert "rank 1" not in done.stdout


def test_a_performance_run_on_one_card(corpus, tmp_path) -> None:
    words = ["--data_path", corpus, *TINY_GPT2, *SHORT, "--max_steps", "5", "--use_combine_grad", "false"]
    done = run(tmp_path, "train_performance_1p.sh", "clm", *words, "--bind_cores", "yes", OMP_NUM_THREADS="1")
    closing = CLOSING.search(done.stdout)
    assert closing and closing["device"] == "1p-CPU" and closing["accuracy"] == "n/a"
    output = tmp_path / "output" / "clm_performance_1p"
    assert "eval_loss" not in results(output) and "gradient_buffers" not in results(output)
    assert not list(output.glob("checkpoint-*"))
    assert re.search(r"rank 0: taskset -c [\d,]+ ", (output / "train_0.log").read_text())


def test_a_finished_run_does_not_tell_the_seconds_of_doing_nothing(corpus, tmp_path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "all_results.json").write_text('{"fps": 12.5}')
    os.utime(output / "all_results.json", (1e9, 1e9))
    (output / "train_0.log").write_text("the first start\n")
    python = stand_in_python(tmp_path, "echo finished already")
    done = run(tmp_path, "train_full_1p.sh", "clm", "--data_path", corpus, "--output_dir", output, PYTHON=python)
    assert "Final Performance samples/sec : 12.500\nFinal Train Accuracy : n/a\n" in done.stdout
    assert "E2E Training Duration sec : n/a (the run was finished before)\n" in done.stdout
    assert "finished already" in done.stdout and "the first start" not in done.stdout
    assert re.fullmatch(r"the first start\n.*rank 0: .*\nfinished already\n", (output / "train_0.log").read_text())


def test_two_nodes(corpus, tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["clm", "--nnodes", "2", "--nproc", "1", "--master_addr", "127.0.0.1", "--master_port", port]
    words += ["--data_path", corpus, *TINY_GPT2, *SHORT, "--max_steps", "4", "--output_dir", "shared"]
    other = start(tmp_path, "train_performance_8p.sh", *words, "--node_rank=1", OMP_NUM_THREADS="1")
    first = run(tmp_path, "train_performance_8p.sh", *words, "--node_rank=0", OMP_NUM_THREADS="1")
    second = finish(other)
    assert CLOSING.search(first.stdout)["device"] == "2p-CPU"
    assert second.stdout.endswith("the results are on node 0\n")
    assert "rank 0:" in first.stdout and "rank 1:" in second.stdout and "rank 0:" not in second.stdout
    assert "rank 1:" in (tmp_path / "shared" / "train_1.log").read_text()


# ---- failures ----
def test_a_killed_rank_ends_all_and_its_log_is_shown(corpus, tmp_path) -> None:
    output = tmp_path / "output"
    words = ["clm", "--nproc", "2", "--data_path", corpus, *TINY_GPT2, *SHORT]
    process = start(tmp_path, "train_performance_8p.sh", *words, "--max_steps", "100000", "--output_dir", output)
    try:
        log = output / "train_0.log"
        wait_for(lambda: log.exists() and "training from step" in log.read_text(), "no training")
        [rank_1] = wait_for(lambda: processes_of(output, rank=1), "no rank 1")
        (output / "train_1.log").open("a").write("the last words of rank 1\n")
        os.kill(rank_1, signal.SIGKILL)
    except BaseException:
        process.terminate()
        raise
    done = finish(process, expect=128 + signal.SIGKILL)
    assert f"rank 1 was ended by signal 9, and so all ranks were ended. Its log, {output}/train_1.log" in done.stderr
    assert "    the last words of rank 1\n" in done.stderr
    assert "Final Performance" not in done.stdout
    assert processes_of(output) == []


@pytest.mark.parametrize("cards", [1, 2])
def test_ending_the_script_ends_its_ranks(corpus, tmp_path, cards) -> None:
    output = tmp_path / "output"
    sleeping = stand_in_python(tmp_path, "sleep 1000 & wait")
    words = ["clm", "--nproc", cards, "--data_path", corpus, "--model_type", "gpt2", "--output_dir", output]
    process = start(tmp_path, "train_full_8p.sh", *words, PYTHON=sleeping)
    try:
        wait_for(lambda: (output / f"train_{cards - 1}.log").exists() and processes_of(output), "no rank")
        wait_for(lambda: "rank" in (output / f"train_{cards - 1}.log").read_text(), "no rank has begun")
    finally:
        process.send_signal(signal.SIGTERM)
    done = finish(process, expect=128 + signal.SIGTERM)
    assert "ended by SIGTERM" in done.stderr
    assert processes_of(output) == []


def test_a_mistake_is_told_by_rank_0_however_slow_it_is(corpus, tmp_path) -> None:
    """The other ranks say nothing and end first; torchrun would end rank 0 before it has spoken."""
    slow = stand_in_python(
        tmp_path,
        'if ((RANK)); then exit 2; fi\nsleep 2\necho "threads $OMP_NUM_THREADS"\n'
        'echo "run_clm.py: error: no such file"\nexit 2',
    )
    words = ["clm", "--nproc", "2", "--data_path", corpus]
    done = run(tmp_path, "train_full_8p.sh", *words, expect=2, PYTHON=slow, OMP_NUM_THREADS="7")
    assert "threads 7\n" in done.stdout
    assert "rank 0 ended with exit code 2" in done.stderr
    assert "    run_clm.py: error: no such file\n" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to train: clm"),
        (["gpt2", "clm"], "say what to train: clm"),
        (["clm", "--nproc", "0"], "--nproc 0: give a whole number of 1 or more"),
        (["clm", "--nnodes", "2"], "--nnodes 2: add --master_addr"),
        (["clm", "--nnodes", "2:1"], "--nnodes 2:1: give a whole number of 1 or more, or MIN:MAX"),
        (["clm", "--nnodes", "2", "--node_rank", "2"], "--node_rank 2: give a number from 0 to 1"),
        (["clm", "--bind_cores", "1"], "--bind_cores 1: give yes or no"),
        (["clm", "--data-path"], "--data-path: its value is missing"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tmp_path, words, message) -> None:
    done = run(tmp_path, "train_full_8p.sh", *words, expect=2)
    assert done.stderr.startswith(f"launch.sh: error: {message}") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---- ranks ----
def run_rank(folder: Path, bind: str, rank: int, ranks: int, *command: str) -> str:
    """Runs one rank by run_rank.sh; its log."""
    (folder / "notes").mkdir(exist_ok=True)
    subprocess.run(
        ["bash", str(SCRIPTS / "run_rank.sh"), str(folder), str(folder / "notes"), bind, *command],
        env=environment(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks)),
        timeout=60,
    )
    return (folder / f"train_{rank}.log").read_text()


SHOW_CORES = [sys.executable, "-c", "import os; print('cores', *sorted(os.sched_getaffinity(0)))"]


def cores_of(log: str) -> list[int]:
    return [int(core) for core in re.search(r"^cores(.*)$", log, re.MULTILINE)[1].split()]


def test_bound_ranks_share_the_cores(tmp_path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    ranks = min(2, len(allowed))
    shares = [cores_of(run_rank(tmp_path, "yes", rank, ranks, *SHOW_CORES)) for rank in range(ranks)]
    size = len(allowed) // ranks
    assert shares == [allowed[rank * size : (rank + 1) * size] for rank in range(ranks)]


def test_ranks_are_not_bound_unless_asked_or_possible(tmp_path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    assert cores_of(run_rank(tmp_path, "no", 0, 2, *SHOW_CORES)) == allowed
    log = run_rank(tmp_path, "yes", 1, len(allowed) + 1, *SHOW_CORES)
    assert "rank 1: fewer cores than ranks, none is bound" in log and cores_of(log) == allowed


def test_the_first_rank_that_fails_is_noted(tmp_path) -> None:
    run_rank(tmp_path, "no", 0, 3, "true")
    assert not (tmp_path / "notes" / "failure_0").exists()
    run_rank(tmp_path, "no", 2, 3, "bash", "-c", "exit 7")
    run_rank(tmp_path, "no", 1, 3, "false")
    assert (tmp_path / "notes" / "failure_0").read_text() == "2 7\n"


# ---- env_npu.sh ----
SHOW = "for name in CANN_TOLD HCCL_WHITELIST_DISABLE HCCL_CONNECT_TIMEOUT HCCL_IF_IP TASK_QUEUE_ENABLE INF_NAN_MODE_ENABLE"
SHOW += " ASCEND_GLOBAL_LOG_LEVEL ASCEND_SLOG_PRINT_TO_STDOUT; do printf '%s=%s\\n' $name \"${!name-unset}\"; done"


def source_env_npu(home: Path, **variables: str) -> tuple[dict[str, str], str]:
    """Sources the script in a strict shell: the variables then, and stderr."""
    program = f'set -euo pipefail; before=$-; source "{SCRIPTS}/env_npu.sh"; [[ $- == "$before" ]]; {SHOW}; declare -F'
    done = subprocess.run(
        ["bash", "-c", program], env=environment(HOME=str(home), **variables), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "env_npu" not in done.stdout, "it leaves functions behind"
    return dict(line.split("=", 1) for line in done.stdout.splitlines()), done.stderr


def make_cann(folder: Path) -> Path:
    """A set_env.sh as careless as CANN's: it reads what is not set, and a command of it fails."""
    folder.mkdir(parents=True)
    (folder / "set_env.sh").write_text("export CANN_TOLD=${CANN_TOLD}here$#\nfalse\nls /nowhere 2>/dev/null\n")
    return folder / "set_env.sh"


@pytest.mark.parametrize(
    "place", ["Ascend/cann", "Ascend/ascend-toolkit", "Ascend/ascend-toolkit/latest", "Ascend/nnae"]
)
def test_env_npu_finds_cann_in_its_usual_places(tmp_path, place) -> None:
    make_cann(tmp_path / place)
    found, said = source_env_npu(tmp_path)
    assert found["CANN_TOLD"] == "here0" and said == ""
    assert found["HCCL_WHITELIST_DISABLE"] == "1" and found["HCCL_CONNECT_TIMEOUT"] == "1200"
    assert found["TASK_QUEUE_ENABLE"] == "1" and found["INF_NAN_MODE_ENABLE"] == "1"
    assert found["ASCEND_GLOBAL_LOG_LEVEL"] == "3" and found["ASCEND_SLOG_PRINT_TO_STDOUT"] == "0"


def test_env_npu_goes_by_the_installers_record_and_by_the_user(tmp_path) -> None:
    make_cann(tmp_path / "opt" / "nnae")
    (tmp_path / "Ascend").mkdir()
    (tmp_path / "Ascend" / "ascend_cann_install.info").write_text(f"Toolkit_Install_Path_Param={tmp_path}/opt")
    assert source_env_npu(tmp_path)[0]["CANN_TOLD"] == "here0"
    mine = make_cann(tmp_path / "mine")
    mine.write_text("export CANN_TOLD=mine\n")
    found, _ = source_env_npu(tmp_path, CANN_SET_ENV=str(mine), HCCL_CONNECT_TIMEOUT="300", TASK_QUEUE_ENABLE="0")
    assert (found["CANN_TOLD"], found["HCCL_CONNECT_TIMEOUT"], found["TASK_QUEUE_ENABLE"]) == ("mine", "300", "0")
    # Sourced before, in the profile or the container's image: not again, or paths would stand twice in PATH.
    assert source_env_npu(tmp_path, ASCEND_HOME_PATH=str(tmp_path))[0]["CANN_TOLD"] == "unset"


@pytest.mark.skipif(os.path.exists("/usr/local/Ascend"), reason="CANN is installed here")
def test_env_npu_without_cann_says_so_and_goes_on(tmp_path) -> None:
    found, said = source_env_npu(tmp_path)
    assert said.startswith("env_npu.sh: CANN is not found; install it, or name it") and said.count("\n") == 1
    assert found["CANN_TOLD"] == "unset" and found["HCCL_WHITELIST_DISABLE"] == "1"
    assert f"CANN is not found: {tmp_path}/no.sh" in source_env_npu(tmp_path, CANN_SET_ENV=f"{tmp_path}/no.sh")[1]


@pytest.mark.skipif(shutil.which("ip") is None, reason="needs the program ip")
def test_env_npu_takes_the_address_of_the_interface(tmp_path) -> None:
    assert source_env_npu(tmp_path, NETWORK_INTERFACE="lo")[0]["HCCL_IF_IP"] == "127.0.0.1"
    assert source_env_npu(tmp_path, MASTER_ADDR="127.0.0.1")[0]["HCCL_IF_IP"] == "127.0.0.1"
    assert source_env_npu(tmp_path, MASTER_ADDR="no.such.host.invalid")[0]["HCCL_IF_IP"] == "unset"
    assert source_env_npu(tmp_path, HCCL_IF_IP="10.0.0.9", NETWORK_INTERFACE="lo")[0]["HCCL_IF_IP"] == "10.0.0.9"
    # The user has chosen in HCCL's own way, over which HCCL_IF_IP would win.
    assert source_env_npu(tmp_path, HCCL_SOCKET_IFNAME="eth0")[0]["HCCL_IF_IP"] == "unset"


@pytest.mark.parametrize(("answer", "queue"), [("yes", "1"), ("no", "unset")])
def test_the_launcher_sources_env_npu_where_it_is_asked_to(corpus, tmp_path, answer, queue) -> None:
    show = 'echo "queue ${TASK_QUEUE_ENABLE-unset} rank ${RANK-unset} threads ${OMP_NUM_THREADS-unset}"'
    python = stand_in_python(tmp_path, show)
    words = ["clm", "--data_path", corpus, "--env_npu", answer, "--output_dir", tmp_path / "output"]
    # A rank that another launcher has left behind would make the script wait for others.
    run(tmp_path, "train_full_1p.sh", *words, PYTHON=python, RANK="3", WORLD_SIZE="8")
    assert f"queue {queue} rank unset threads unset\n" in (tmp_path / "output" / "train_0.log").read_text()


def test_several_ranks_share_the_threads_unless_they_are_set(corpus, tmp_path) -> None:
    python = stand_in_python(tmp_path, 'echo "threads ${OMP_NUM_THREADS-unset}"')
    words = ["clm", "--nproc", "2", "--data_path", corpus, "--output_dir", tmp_path / "output"]
    run(tmp_path, "train_full_8p.sh", *words, PYTHON=python)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert f"threads {share}\n" in (tmp_path / "output" / "train_1.log").read_text()


# ---- defaults ----
def complete(mode: str, *words: str, data_path: str = "", precision: str = "--fp16 --fp16_opt_level O2") -> list[str]:
    return launch.complete(mode, "clm", words, data_path, 8, precision)


def test_defaults() -> None:
    assert complete("full", "--model_name_or_path", "gpt2") == [
        "--do_train", "--do_eval", "--num_train_epochs", "3", "--fp16", "--fp16_opt_level", "O2", "--use_combine_grad",
        "--output_dir", "output/clm_full_8p", "--model_name_or_path", "gpt2",
    ]  # fmt: skip
    assert complete("performance", precision="") == [
        "--do_train", "--max_steps", "200", "--save_strategy", "no", "--use_combine_grad",
        "--output_dir", "output/clm_performance_8p",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "words", "left_out"),
    [
        ("performance", ["--num_train_epochs", "1"], "--max_steps"),
        ("performance", ["--save_steps", "50"], "--save_strategy"),
        ("full", ["--max-steps=9"], "--num_train_epochs"),
        ("full", ["--bf16"], "--fp16"),
        ("full", ["--fp16", "--fp16_opt_level", "O1"], "O2"),
        ("full", ["--use_cpu"], "--fp16"),
        ("full", ["--fsdp", "full_shard"], "--use_combine_grad"),
        ("full", ["--output-dir", "mine"], "output/clm_full_8p"),
    ],
)
def test_a_default_that_contradicts_the_user_is_left_out(mode, words, left_out) -> None:
    assert left_out in complete(mode)
    assert left_out not in complete(mode, *words)[: -len(words)]
    assert complete(mode, *words)[-len(words) :] == words


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_config_file_stays_first_and_wins_over_defaults(tmp_path, suffix) -> None:
    content = {"num_train_epochs": 7, "bf16": True, "output_dir": "mine", "do_train": True}
    (tmp_path / f"run.{suffix}").write_text(json.dumps(content))
    words = complete("full", str(tmp_path / f"run.{suffix}"), "--seed", "1")
    assert words == [str(tmp_path / f"run.{suffix}"), "--do_eval", "--use_combine_grad", "--seed", "1"]


def test_the_plan_has_the_output_folder_of_a_config_file(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("output_dir: from the file\nuse_cpu: true\n")
    plan = tmp_path / "plan"
    command = [sys.executable, "-m", "utils.launch", "--plan", str(plan), "--mode", "full", "--objective", "clm"]
    command += ["--nproc", "1", "--world_size", "1", "--", str(tmp_path / "run.yaml"), "--train_file", "it's here"]
    subprocess.run(command, cwd=ROOT, check=True)
    assert plan.read_text().startswith("'from the file' ") and plan.read_text().endswith(
        """--train_file 'it'"'"'s here'"""
    )


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        (["train.txt", "validation.txt"], ["--train_file", "train.txt", "--validation_file", "validation.txt"]),
        (["wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"],
         ["--train_file", "wiki.train.raw", "--validation_file", "wiki.valid.raw"]),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "README.md"],
         ["--train_file", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]),
        (["train.jsonl.gz", "dev.jsonl.gz"], ["--train_file", "train.jsonl.gz", "--validation_file", "dev.jsonl.gz"]),
        (["dataset_dict.json", "train.txt"], ["--dataset_name", ""]),
        (["state.json"], ["--dataset_name", ""]),
    ],
)  # fmt: skip
def test_the_text_of_a_data_path(tmp_path, names, flags) -> None:
    for name in names:
        (tmp_path / name).write_text("text")
    assert launch.text_flags(str(tmp_path)) == [
        flag if flag.startswith("--") else os.path.join(tmp_path, flag).rstrip("/") for flag in flags
    ]


def test_a_data_path_that_cannot_be_meant(tmp_path) -> None:
    (tmp_path / "trains.txt").write_text("text")
    with pytest.raises(UsageError, match="holds no training text"):
        complete("full", data_path=str(tmp_path))
    with pytest.raises(UsageError, match="no such folder"):
        complete("full", data_path=str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="--train_file names text too"):
        complete("full", "--train_file", "a.txt", data_path=str(tmp_path))


@pytest.mark.parametrize(("kind", "count", "nproc"), [("npu", 1, 2), ("cuda", 4, 8)])
def test_more_processes_than_devices_are_refused(monkeypatch, kind, count, nproc) -> None:
    from utils import device

    monkeypatch.setattr(sys, "argv", ["pytest"])  # it is changed
    monkeypatch.setattr(device, "accelerator", lambda: kind)
    monkeypatch.setattr(device, "count", lambda: count)
    with pytest.raises(UsageError, match=f"--nproc {nproc}: {count} .* give --nproc {count} or less"):
        launch.suit_device([], nproc, npu_is_here=False)
    assert launch.suit_device(["--use_cpu"], nproc, npu_is_here=False) == ([], "")


def test_one_process_takes_one_of_several_gpus(monkeypatch) -> None:
    from utils import device

    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(device, "accelerator", lambda: "cuda")
    monkeypatch.setattr(device, "count", lambda: 4)
    monkeypatch.setattr(device, "demo_flags", lambda: "--fp16")
    assert launch.suit_device([], 1, npu_is_here=False) == (["--device_id", "0"], "--fp16")
    assert launch.suit_device(["--device_id", "2"], 1, npu_is_here=False) == ([], "--fp16")
    assert launch.suit_device([], 4, npu_is_here=False) == ([], "--fp16")


def test_an_idle_npu_is_warned_of(monkeypatch, capsys) -> None:
    from utils import device

    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(device, "accelerator", lambda: None)
    assert launch.suit_device([], 1, npu_is_here=True) == ([], "")  # float32 on a CPU, whatever it measures
    assert "this machine has NPUs, but" in capsys.readouterr().err
    launch.suit_device(["--use_cpu"], 1, npu_is_here=True)
    launch.suit_device([], 1, npu_is_here=False)
    assert capsys.readouterr().err == ""
