"""Kills a process at its n-th system call that changes files: at each write, flush and rename of a save.

The process is forked from this one, which has everything imported, and traced with ptrace: what Python, torch's C++ and
safetensors' Rust write is all seen. Its threads are traced, too.
"""

import ctypes
import os
import platform
import signal
from collections.abc import Callable

# Numbers of the system calls, by machine.
CALLS = {
    "x86_64": {
        "write": 1, "mmap-ed sync": 26, "writev": 20, "pwrite64": 18, "pwritev": 296, "fsync": 74, "fdatasync": 75,
        "ftruncate": 77, "rename": 82, "renameat": 264, "renameat2": 316, "mkdir": 83, "mkdirat": 258, "rmdir": 84,
        "unlink": 87, "unlinkat": 263, "copy_file_range": 326, "sendfile": 40,
    },
    "aarch64": {
        "write": 64, "mmap-ed sync": 227, "writev": 66, "pwrite64": 68, "pwritev": 70, "fsync": 82, "fdatasync": 83,
        "ftruncate": 46, "renameat": 38, "renameat2": 276, "mkdirat": 34, "unlinkat": 35, "copy_file_range": 285,
        "sendfile": 71,
    },
}  # fmt: skip
TRACEME, SYSCALL, SETOPTIONS, GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
SYSGOOD, FOLLOW_CLONE, KILL_WITH_TRACER = 1, 8, 0x100000
WAIT_ALL = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes, _libc.ptrace.restype = [ctypes.c_long] * 4, ctypes.c_long


def run_and_kill(work: Callable[[], None], at: int | None) -> tuple[bool, list[str]]:
    """Runs `work` in a fork, killed with SIGKILL on entering its call number `at`, from 0; None: never.

    Returns whether it was killed, and the names of the calls that it began. Raises OSError where tracing is not allowed.
    """
    names = {number: name for name, number in CALLS[platform.machine()].items()}
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if _libc.ptrace(TRACEME, 0, 0, 0) != 0:
                os._exit(99)
            os.kill(os.getpid(), signal.SIGSTOP)
            signal.alarm(60)  # nothing here takes so long: whoever waits for a lock dies
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        raise OSError("tracing is not allowed here")
    _ptrace(SETOPTIONS, child, 0, SYSGOOD | FOLLOW_CLONE | KILL_WITH_TRACER)
    _ptrace(SYSCALL, child, 0, 0)
    seen: list[str] = []
    info = ctypes.create_string_buffer(88)
    while True:
        thread, status = os.waitpid(-1, WAIT_ALL)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if thread != child:
                continue
            killed = os.WIFSIGNALED(status)
            assert killed or os.WEXITSTATUS(status) == 0, "the work itself failed"
            return killed, seen
        deliver = 0
        if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:
            _ptrace(GET_SYSCALL_INFO, thread, 88, ctypes.addressof(info))
            is_entry, number = info.raw[0] == 1, int.from_bytes(info.raw[24:32], "little")
            if is_entry and number in names:
                if at == len(seen):
                    os.kill(child, signal.SIGKILL)
                    seen.append(names[number])
                    continue
                seen.append(names[number])
        elif os.WSTOPSIG(status) not in (signal.SIGTRAP, signal.SIGSTOP):
            deliver = os.WSTOPSIG(status)
        _ptrace(SYSCALL, thread, 0, deliver, gone_is_fine=True)


def _ptrace(request: int, process: int, address: int, data: int, gone_is_fine: bool = False) -> None:
    if _libc.ptrace(request, process, address, data) < 0 and not gone_is_fine:
        raise OSError(ctypes.get_errno(), "ptrace")
