"""Signals that ask a run to end (SIGTERM, SIGINT) or to save (SIGUSR1): heard at once, obeyed where nothing is lost.

Nothing heavy is imported here: the scripts listen before they import torch.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

ENDING = (signal.SIGTERM, signal.SIGINT)
# One request may come several times: a process group, a launcher and a scheduler each hand it on. What comes later than
# this is a second request.
REPEAT_SECONDS = 1.0
# How long the main thread may take to leave by itself when there is nothing to save.
LEAVING_SECONDS = 5.0


class Stopped(SystemExit):
    """The run ends on request. `code` is the exit code: 128 plus the signal's number, or 0 when its time is over.

    A SystemExit, so that nothing on the way takes it for an error. message: one line for the user, or None if another
    rank says it. together: whether all ranks leave at this point, so that they may wait for each other. for_good: whether
    no launcher may start them again.
    """

    code: int

    def __init__(self, code: int, message: str | None, together: bool = False, for_good: bool = True):
        super().__init__(code)
        self.message = message
        self.together = together
        self.for_good = for_good


def exit_code(number: int) -> int:
    """What a shell shows for a process that the signal ended."""
    return 128 + number


class Listener:
    """Hears signals in a thread of its own, so that they count while the main thread is inside a call that never returns.

    on_request: while it is set, it receives the name of each signal, from that thread: a training takes care of it.
        While it is None, SIGTERM and SIGINT raise Stopped in the main thread.
    A second signal, or none heeded for LEAVING_SECONDS, ends the process at once.
    """

    def __init__(self):
        self.on_request: Callable[[str], None] | None = None
        self._first: float | None = None
        self.started = time.monotonic()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    def listen(self, *signals: signal.Signals) -> None:
        """Begins to hear these signals. To be called in the main thread."""
        for number in signals:
            signal.signal(number, self._in_main_thread)

    def start(self) -> None:
        """Listens to SIGTERM and SIGINT; processes that are forked from now on leave signals to this one."""
        # The descriptor is written to when the signal comes; its Python handler waits for the main thread's next line.
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self.listen(*ENDING)
        os.register_at_fork(after_in_child=_leave_signals_to_the_parent)
        threading.Thread(target=self._hear, name="signals", daemon=True).start()

    def _hear(self) -> None:
        while True:
            for number in self._reader.recv(64):
                if number in (*ENDING, signal.SIGUSR1):
                    self._heard(signal.Signals(number))

    def _heard(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if number in ENDING:
            if self._first is not None and now - self._first > REPEAT_SECONDS:
                leave_at_once(number, f"stopped at once by a second {number.name}")
            if self._first is not None:
                return
            self._first = now
        if self.on_request is not None:
            self.on_request(number.name)
        elif number in ENDING:
            watch = threading.Timer(LEAVING_SECONDS, self._leave_if_nobody_cares, (number,))
            watch.daemon = True
            watch.start()

    def _leave_if_nobody_cares(self, number: signal.Signals) -> None:
        if self.on_request is None:
            leave_at_once(number, stopped_by(number))

    def _in_main_thread(self, number: int, _frame) -> None:
        if number in ENDING and self.on_request is None:
            self.listen_no_more()
            raise Stopped(exit_code(number), stopped_by(signal.Signals(number)))

    def listen_no_more(self) -> None:
        """Further signals raise nothing in the main thread: it is leaving already. A second one still ends it at once."""
        for number in ENDING:
            signal.signal(number, lambda *_: None)


def stopped_by(number: signal.Signals) -> str:
    return f"stopped by {number.name}"


def leave_at_once(number: signal.Signals, message: str) -> None:
    """Ends the process now, whatever its threads are doing. Only what is on the disk stays."""
    logger.warning(message)
    logging.shutdown()
    os._exit(exit_code(number))


def _leave_signals_to_the_parent() -> None:
    """In a forked process, such as one that loads data: only its parent ends it, by a signal or by its own end.

    A signal to the whole process group must not end the loaders before the training has saved, and their handlers, which
    they inherit, would tell the training of one signal once more.
    """
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_BLOCK, (*ENDING, signal.SIGUSR1))
    parent = os.getppid()

    def wait_for_the_parent() -> None:
        while True:
            heard = signal.sigwaitinfo((*ENDING, signal.SIGUSR1))
            if heard.si_pid == parent and heard.si_signo in ENDING:
                os._exit(exit_code(heard.si_signo))

    threading.Thread(target=wait_for_the_parent, name="signals", daemon=True).start()


# ---- what ends for good ----
def note_the_end(code: int) -> None:
    """Leaves a note that this run ended for good with this exit code: torchrun would start it again all the same."""
    path = _note()
    if code != 0 and path:
        path.write_text(f"{code}\n", encoding="ascii")


def is_noted() -> bool:
    """Whether the end of this run is noted already: launch.sh does so before it hands a signal on."""
    path = _note()
    return path is not None and path.exists()


def end_if_ended_for_good() -> None:
    """Ends a process that torchrun has started again after its run had ended for good."""
    path = _note() if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 else None
    if path is not None and path.exists():
        sys.exit(int(path.read_text(encoding="ascii")))


def _note() -> Path | None:
    """run_rank.sh names the file; otherwise torchrun's process does, by its number and when it began."""
    if "FINAL_NOTE" in os.environ:
        return Path(os.environ["FINAL_NOTE"])
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
        return None
    launcher = os.getppid()
    began = Path(f"/proc/{launcher}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19]
    return Path(tempfile.gettempdir()) / f"ended-for-good-{launcher}-{began}"


# The listener of this process, if it is one of the scripts.
listener: Listener | None = None


def listen() -> Listener:
    """Starts this process's listener. Once per process, in the main thread."""
    global listener
    if listener is None:
        listener = Listener()
        listener.start()
    return listener


def say(message: str | None) -> None:
    """One line for the user: as the log has it, or on stderr before there is a log."""
    if message and os.environ.get("RANK", "0") == "0":
        logger.warning(message)
        sys.stdout.flush()
