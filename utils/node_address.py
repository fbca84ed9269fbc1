"""This node's address on the network of several, and the interface that has it.

python -m utils.node_address NODE_0 prints both, for scripts/launch.sh: the address by which node 0 is reached from here,
which other nodes reach too, where a host's name may stand for 127.0.0.1 or for another network.
"""

import socket
import sys

import psutil

from utils.errors import UsageError, one_line


def address_towards(node: str) -> str:
    """The address of this machine from which `node` is reached; nothing is sent. Raises UsageError."""
    try:
        [(family, kind, *_, found), *_] = socket.getaddrinfo(node, 29500, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind) as probe:
            probe.connect(found)
            return probe.getsockname()[0]
    except OSError as error:
        reason = one_line(error).split("] ")[-1]
        raise UsageError(f"--master_addr {node}: cannot be reached from {socket.gethostname()} ({reason})") from error


def interface_of(address: str) -> str | None:
    """The name of the interface with that address; None if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in (found.address.partition("%")[0] for found in addresses):
            return name
    return None


def main() -> int:
    try:
        address = address_towards(sys.argv[1])
    except UsageError as error:
        print(f"launch.sh: error: {error}", file=sys.stderr)
        return 2
    print(address, interface_of(address) or "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
