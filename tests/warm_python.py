"""Python scripts in forks of a process that has imported torch, transformers and datasets: a second each, not eight.

Nothing of the project is imported in that process: a fork runs every line of the script and of utils/, as `python script`
does, and is spared the libraries' own imports alone.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


class WarmPython:
    """Runs scripts as a Python started in `folder` with this environment would, one at a time."""

    def __init__(self, environment: dict[str, str], folder: Path):
        self.environment = environment
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip

    def run(
        self, command: list[str], timeout: float, new_session: bool = False, **variables: str
    ) -> subprocess.CompletedProcess:
        """The finished process of `python command`, output as text; after `timeout` seconds it dies of SIGALRM.

        variables: of the environment, which the libraries do not read.
        """
        assert self._process.stdin and self._process.stdout
        with tempfile.TemporaryDirectory() as folder:
            said = [Path(folder, name) for name in ("stdout", "stderr")]
            request = {"command": command, "said": [str(path) for path in said], "timeout": int(timeout)}
            request |= {"new_session": new_session, "variables": variables}
            print(json.dumps(request), file=self._process.stdin, flush=True)
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(command, code, *[path.read_text() for path in said])


def await_script() -> None:
    """Forks for each request; returns in the fork, which has become the process that was asked for."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become(**json.loads(line))
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def become(command: list[str], said: list[str], timeout: int, new_session: bool, variables: dict[str, str]) -> None:
    if new_session:
        os.setsid()
    os.environ.update(variables)
    opened = [os.open(os.devnull, os.O_RDONLY), *[os.open(path, os.O_WRONLY | os.O_CREAT) for path in said]]
    for number, file in enumerate(opened):
        os.dup2(file, number)
        os.close(file)
    signal.alarm(timeout)
    sys.argv[:] = command
    sys.path[0] = os.path.dirname(os.path.abspath(command[0]))


if __name__ == "__main__":
    import datasets  # noqa: F401
    import evaluate  # noqa: F401
    import torch  # noqa: F401
    from transformers import (  # noqa: F401
        AutoTokenizer,
        BertForMaskedLM,
        GPT2LMHeadModel,
        Trainer,
        XLNetLMHeadModel,
    )

    assert "utils" not in sys.modules
    await_script()
    runpy.run_path(sys.argv[0], run_name="__main__")
