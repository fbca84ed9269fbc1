"""Agreement between ranks on one point of the program, without a collective and without looking at the device.

Every rank passes the same sequence of points: the ends of training steps, the batches of an evaluation. One of them is
asked for something, to stop say, and all must do it at the same point, or they would wait for each other for ever.

A thread in each rank looks for requests in a torch.distributed store. It then holds its main thread before the next
point that this one has not left, and publishes the number of that point. The agreed point is the greatest of these
numbers: no rank has left it, since each is held at its own, which is no later; so none can miss it. And none waits for
ever: while a rank is held, all that it waits for are the other ranks' threads, never their main threads, which may be
inside a collective that needs this very rank. This module knows torch only.
"""

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

POLL_SECONDS = 0.3


class Agreement:
    """One sequence of points, and the requests that are obeyed in it.

    store: reached by all ranks, with no other user of its keys, and with a connection of its own: a call that waits
        in it blocks that connection.
    on_silence: called, from the thread, with the request's word and the ranks that have not answered for `patience`
        seconds; the others are held meanwhile. It need not return.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        on_silence: Callable[[str, list[int]], None] = lambda word, ranks: None,
        patience: float = 10.0,
    ):
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._on_silence = on_silence
        self._patience = patience
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._asked: list[str] = []  # by this rank, not yet in the store
        self._passed = 0  # points that the main thread has left
        self._held = False
        self._due: tuple[int, str] | None = None  # the agreed point, and what is to be done there
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="agreement", daemon=True)
        self._thread.start()

    def request(self, word: str) -> None:
        """Asks all ranks for `word`. Returns at once; any thread of any rank may call it."""
        with self._changed:
            self._asked.append(word)
        self._wake.set()

    def point(self) -> str | None:
        """Passes the next point; returns the word that is due here, the same on all ranks. For the main thread."""
        with self._changed:
            number = self._passed + 1
            while self._held and not self._closed:
                self._changed.wait()
            word = None
            if self._due is not None and self._due[0] == number:
                word, self._due = self._due[1], None
                self._changed.notify_all()
            self._passed = number
            return word

    def close(self) -> None:
        """Ends the thread. Requests that come later are forgotten."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._wake.set()

    # ---- the thread ----
    def _run(self) -> None:
        ticket = 1
        while not self._closed:
            self._wake.wait(POLL_SECONDS)
            self._wake.clear()
            with self._changed:
                asked, self._asked = self._asked, []
            try:
                for word in asked:
                    self._store.set(f"word/{self._store.add('tickets', 1)}", word)
                while not self._closed and self._store.check([f"word/{ticket}"]):
                    self._agree(ticket)
                    ticket += 1
            except RuntimeError:  # the store has gone: with its host, whose end the others notice elsewhere
                if not self._closed:
                    self._on_silence((asked or [""])[0], [])
                return

    def _agree(self, ticket: int) -> None:
        ranks = range(self._world_size)
        self._store.set(f"seen/{ticket}/{self._rank}", "")
        with self._changed:
            # A rank on its way to the point of the request before must get there first.
            while self._due is not None and not self._closed:
                self._changed.wait()
            self._held = True
            number = self._passed + 1
        word = self._store.get(f"word/{ticket}").decode()
        self._store.set(f"point/{ticket}/{self._rank}", str(number))
        points = [f"point/{ticket}/{rank}" for rank in ranks]
        deadline = time.monotonic() + self._patience
        while not self._store.check(points):
            if self._closed:
                return
            if time.monotonic() > deadline:
                silent = [rank for rank in ranks if not self._store.check([f"seen/{ticket}/{rank}"])]
                if silent:
                    self._on_silence(word, silent)
                deadline = time.monotonic() + self._patience
            time.sleep(0.01)
        agreed = max(map(int, self._store.multi_get(points)))
        with self._changed:
            self._due = (agreed, word)
            self._held = False
            self._changed.notify_all()


def connect(name: str) -> dist.Store:
    """A store for all ranks of this run, with a connection of its own; `name` keeps its users apart.

    A process of its own has one in its memory. Several meet where the process group has met.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return dist.HashStore()
    server = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
    )
    return dist.PrefixStore(f"{name}/{_restart()}", server)


def meet_after_restart(backend: str, seconds: float) -> None:
    """Forms the process group of a run that torchrun has started again; does nothing at its first start.

    torchrun keeps the store in which ranks meet, and torch looks there under the same names: a rank may find the address
    of one that has died (https://github.com/pytorch/pytorch/issues/135712). Under names of this start it cannot.
    seconds: the group's timeout.
    """
    if _restart() == "0" or dist.is_initialized():
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = connect("process_group")
    store.set_timeout(timedelta(seconds=seconds))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=seconds))


def _restart() -> str:
    """How often torchrun has started this run again, where it keeps the store in which ranks meet. Else that is new.

    Nodes that were started at different times count differently: scripts/launch.sh has several nodes keep none.
    """
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_kept else "0"
