"""Python scripts in forks of a process that has imported torch, transformers and datasets: a second each, not eight.

Nothing of the project is imported in that process: a fork runs every line of the script and of utils/, as `python script`
does, and is spared the libraries' own imports alone.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


class WarmPython:
    """Runs scripts as a Python started in `folder` with this environment would, one script at a time."""

    def __init__(self, environment: dict[str, str], folder: Path):
        self.environment = environment
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip

    def run(
        self,
        command: list[str],
        timeout: float,
        new_session: bool = False,
        processes: int | None = None,
        variables: dict[str, str | None] | None = None,
    ) -> subprocess.CompletedProcess:
        """The finished process of `python command`, output as text; after `timeout` seconds it dies of SIGALRM.

        processes: as many of them, ranks of one job as torchrun would start; if one fails the others are ended, and the exit
        code is 1. variables: of the environment, which libraries do not read when they are imported; None unsets.
        """
        assert self._process.stdin and self._process.stdout
        with tempfile.TemporaryDirectory() as folder:
            said = [Path(folder, name) for name in ("stdout", "stderr")]
            request = {"command": command, "said": [str(path) for path in said], "timeout": int(timeout)}
            request |= {"new_session": new_session, "processes": processes, "variables": variables or {}}
            print(json.dumps(request), file=self._process.stdin, flush=True)
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(command, code, *[path.read_text() for path in said])


def await_script() -> None:
    """Forks for each request; returns in the fork, which has become the process that was asked for."""
    for line in sys.stdin:
        request = json.loads(line)
        processes = request.pop("processes")
        jobs = [{}] if processes is None else ranks(processes)
        children = []
        for job in jobs:
            children.append(os.fork())
            if children[-1] == 0:
                request["variables"] |= job
                become(**request)
                return
        code = wait_for(set(children))
        print(code if processes is None else int(code != 0), flush=True)
    sys.exit()


def ranks(processes: int) -> list[dict[str, str]]:
    """The environment of each rank of a job on this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    job |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def wait_for(children: set[int]) -> int:
    """The first exit code that is not 0, once all have ended."""
    first = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code != 0 and first == 0:
            first = code
            for other in children:
                os.kill(other, signal.SIGTERM)
    return first


def become(
    command: list[str], said: list[str], timeout: int, new_session: bool, variables: dict[str, str | None]
) -> None:
    if new_session:
        os.setsid()
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    opened = [
        os.open(os.devnull, os.O_RDONLY),
        *[os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in said],
    ]
    for number, file in enumerate(opened):
        os.dup2(file, number)
        os.close(file)
    signal.alarm(timeout)
    sys.argv[:] = command
    sys.path[0] = os.getcwd() if command[0] == "-m" else os.path.dirname(os.path.abspath(command[0]))


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
    gc.freeze()  # else each fork looks for garbage among the libraries' objects, which takes half of a short run
    await_script()
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
