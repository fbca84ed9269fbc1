"""tests/warm_python.py: what runs in a fork is told from a process of its own by its start alone."""

import signal
import sys

import commands
import pytest

SHOW = """
import gc, os, sys
print(__name__, sys.argv, sys.path[0], os.getcwd(), repr(sys.stdin.read()), sys.stdout.isatty(), gc.isenabled())
print({name for name in sys.modules if name.partition(".")[0] in ("utils", "commands", "pytest")})
print(sorted((name, value) for name, value in os.environ.items() if name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HOME")))
"""


@pytest.mark.parametrize("ending", ["", "sys.exit(7)", "raise ValueError('odd')", "os.kill(os.getpid(), 15)"])
def test_a_fork_is_as_a_process_of_its_own(ending, tmp_path) -> None:
    script = tmp_path / "show.py"
    script.write_text(SHOW + "sys.stdout.flush()\n" + ending)
    words = [str(script), "--flag", "a value"]
    fork, own = commands.warm_python().run(words, 60), commands.run([sys.executable, *words])
    assert (fork.returncode, fork.stdout) == (own.returncode, own.stdout) and "set()" in own.stdout
    assert ("ValueError: odd" in fork.stderr) == ("ValueError: odd" in own.stderr) == ("odd" in ending)


def test_the_libraries_are_there_already(tmp_path) -> None:
    script = tmp_path / "show.py"
    script.write_text("import sys; print({'torch', 'datasets', 'transformers.trainer'} - set(sys.modules))")
    assert commands.run_script(str(script)).stdout == "set()\n"
    assert commands.run_script(str(script), PYTHONHASHSEED="1").stdout != "set()\n", "not a process of its own"


def test_a_changed_environment_counts(tmp_path, monkeypatch) -> None:
    """What libraries may read when they are imported means a process of its own."""
    commands.warm_python()
    script = tmp_path / "show.py"
    script.write_text("import os, sys; print(os.environ.get('NAME'), 'torch' in sys.modules)")
    assert commands.run_script(str(script)).stdout == "None True\n"
    monkeypatch.setenv("NAME", "set here")
    assert commands.run_script(str(script)).stdout == "set here True\n"
    assert commands.run_script(str(script), NAME="given").stdout == "given True\n"
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert commands.run_script(str(script)).stdout == "set here False\n"


def test_what_takes_too_long_ends(tmp_path) -> None:
    (tmp_path / "wait.py").write_text("import time; time.sleep(60)")
    done = commands.warm_python().run([str(tmp_path / "wait.py")], timeout=1)
    assert done.returncode == -signal.SIGALRM


RANKS = """
import os, sys, time, torch
torch.distributed.init_process_group("gloo")
total = torch.ones(1) * (int(os.environ["RANK"]) + 1)
torch.distributed.all_reduce(total)
os.write(1, f"{os.environ['LOCAL_RANK']} {int(total)}\\n".encode())  # in one piece: both ranks write to one pipe
if sys.argv[1] == os.environ["RANK"]:
    sys.exit(2)
if sys.argv[1] != "none":
    time.sleep(60)
"""


def test_ranks_meet_and_end_together(tmp_path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    assert sorted(commands.run_distributed(str(script), "none").stdout.split("\n")) == ["", "0 3", "1 3"]
    assert sorted(commands.run_distributed(str(script), "1", expect=1, timeout=30).stdout.split("\n")) == [
        "",
        "0 3",
        "1 3",
    ]


def test_a_module_runs_as_one(tmp_path) -> None:
    words = ["-m", "utils.report", "--help"]
    fork, own = commands.warm_python().run(words, 60), commands.run([sys.executable, *words])
    assert (fork.returncode, fork.stdout) == (own.returncode, own.stdout) and "usage" in own.stdout
