"""Nodes of a cluster on one machine: network namespaces that a virtual cable joins.

Each node has a network, a host name and processes of its own, and shares the machine's files with the others. Killing a
node ends all its processes at once, without a word to anybody. Needs root, iproute2 and unshare.
"""

import os
import shutil
import subprocess
from pathlib import Path


def why_not() -> str | None:
    """Why there can be no nodes here; None if there can."""
    missing = [program for program in ("ip", "unshare", "hostname") if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    try:
        with Nodes(1) as nodes:
            nodes.start(0, ["true"]).communicate(timeout=20)
    except (subprocess.CalledProcessError, OSError) as error:
        return f"network namespaces are not allowed here: {getattr(error, 'stderr', '') or error}".strip()
    return None


class Nodes:
    """`count` nodes, joined by a bridge of their own, while the `with` block lasts. Node n has the address n + 1 below."""

    def __init__(self, count: int):
        self.names = [f"node{number}-{os.getpid()}" for number in range(count)]
        self.addresses = [f"10.77.0.{number + 1}" for number in range(count)]
        self.switch = f"switch-{os.getpid()}"
        self.running: dict[int, subprocess.Popen] = {}

    def __enter__(self) -> "Nodes":
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for node in list(self.running):
            self.kill(node)
        for name in [*self.names, self.switch]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def _make(self) -> None:
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "switch", "type", "bridge")
        ip("-n", self.switch, "link", "set", "switch", "up")
        for number, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            port = f"port{number}"
            ip("-n", name, "link", "add", "cable", "type", "veth", "peer", "name", port, "netns", self.switch)
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", self.switch, "link", "set", port, "master", "switch", "up")

    def start(self, node: int, command: list[str], **options) -> subprocess.Popen:
        """The command on a node, which it is the first process of."""
        alone = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        named = ["sh", "-c", f'hostname node{node} && exec "$@"', "sh", *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = subprocess.Popen(["ip", "netns", "exec", self.names[node], *alone, *named], **pipes, **options)
        self.running[node] = started
        return started

    def kill(self, node: int) -> None:
        """Ends all processes of the node, as a loss of power does."""
        started = self.running.pop(node)
        started.kill()
        started.communicate()

    def cut(self, node: int) -> None:
        """Pulls the node's cable."""
        ip("-n", self.names[node], "link", "set", "cable", "down")

    def mend(self, node: int) -> None:
        ip("-n", self.names[node], "link", "set", "cable", "up")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, cwd=Path("/"))
