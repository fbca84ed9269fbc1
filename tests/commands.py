"""Runs the scripts as a user does: in a subprocess, from the project's root."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from warm_python import WarmPython

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

READ_BY_IMPORTS = re.compile(
    "HF_|TRANSFORMERS|DATASETS|TOKENIZERS|TORCH|PYTORCH|PYTHON|OMP|MKL|KMP|CUDA|NPU_|NPUSIM_DEVICES|ASCEND|LD_"
)

# A model and a corpus small enough that a run takes a few seconds.
TINY_GPT2 = [
    "--model_type",
    "gpt2",
    "--config_overrides",
    "n_embd=32,n_layer=2,n_head=2,n_positions=64,vocab_size=300",
]


def run(command: list[str], timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """The finished process of `command`, output as text. One thread each, so that tests side by side do not fight."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**surroundings(), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def surroundings() -> dict[str, str]:
    """The environment of commands, less the name of the test."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@functools.cache
def warm_python(**environment: str) -> WarmPython:
    return WarmPython({**surroundings(), **environment}, ROOT)


def run_warm(
    words: list[str], timeout: float = 300, processes: int | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """The finished process of `python words`, or of that many ranks, in forks of a Python that has the libraries imported.

    One such Python is kept for the tests' own environment, and one for each stand-in in tests/ that comes by PYTHONPATH. In
    processes of their own where another variable that libraries read when they are imported is not as that Python had it.
    """
    stand_in = environment.get("PYTHONPATH", "").startswith(str(ROOT / "tests"))
    kept = {"PYTHONPATH", "NPUSIM_DEVICES"} & environment.keys() if stand_in else {}
    python = warm_python(**{name: environment[name] for name in sorted(kept)})
    before, now = python.environment, {**surroundings(), **environment}
    changed = {name: now.get(name) for name in before.keys() | now.keys() if now.get(name) != before.get(name)}
    if any(READ_BY_IMPORTS.match(name) for name in changed):
        launcher = [sys.executable] if processes is None else torchrun(processes)
        return run([*launcher, *words], timeout, **environment)
    return python.run(words, timeout, processes=processes, variables=changed)


def run_script(
    script: str, *arguments: str | Path, expect: int = 0, **environment: str
) -> subprocess.CompletedProcess:
    """Runs `python script arguments`; fails, showing the output, if the exit code is not `expect`. In a fork where it can."""
    done = run_warm([script, *map(str, arguments)], **environment)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def run_distributed(
    script: str, *arguments: str | Path, processes: int = 2, expect: int = 0, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Runs the script with that many processes; as run_script does, in forks where it can, and else under torchrun."""
    words = [script, *map(str, arguments)]
    done = run_warm(words, timeout, processes, **environment)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def results(folder: Path) -> dict:
    """The content of all_results.json."""
    return json.loads((Path(folder) / "all_results.json").read_text())


def losses(folder: Path) -> list[float]:
    """The training losses in trainer_state.json's log history."""
    return [entry["loss"] for entry in log_history(folder) if "loss" in entry]


def log_history(folder: Path) -> list[dict]:
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


def one_error_line(done: subprocess.CompletedProcess) -> str:
    """The only error line on stderr, progress bars aside; fails if there is a traceback."""
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
    return lines[0]
