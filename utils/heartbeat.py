"""Ranks that have died or got stuck: named by the others, which then end, so that a launcher can start all anew.

Without this, ranks wait in a collective until the backend's own timeout, and its message names an address at best. Here a
thread in each rank counts a beat every second in a torch.distributed store, beside the step that its main thread is at,
and looks at those of all ranks. A beat that stops is a process that was killed, stopped or cut off. Beats that go on
while no rank comes to a new step are a main thread that hangs: the rank that is furthest behind is the one.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from transformers import TrainerCallback

from utils.agreement import connect

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
# Of --ddp_timeout: the backend's own error would come at the whole of it.
PATIENCE = 0.8
# Exit code of a rank that ends because another one does not answer.
EXIT_CODE = 1
# Where a main thread can be, in the order of a step.
PLACES = ("between steps", "evaluating", "waiting for a batch", "computing", "updating weights")


class Heartbeat:
    """Beats for one rank and looks at all.

    store: reached by all ranks, with a connection and keys of its own. patience: seconds. end: receives, in the thread,
        what is to be said of ranks that do not go on; it is to end the process, whose main thread may wait for them.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, patience: float, end: Callable[[str], None] | None = None
    ):
        self._store = store
        self._rank = rank
        self._ranks = range(world_size)
        self._patience = patience
        self._end = end or _end_process
        self._progress = (0, 0, 0)  # step, index in PLACES, how often that was told
        self._first_step: int | None = None
        self._closed = threading.Event()
        self._seen: dict[int, tuple[float, str]] = {}  # rank: when its beat was new, and that beat
        self._moved: dict[int, tuple[float, str]] = {}  # the same of its progress
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def at(self, step: int, place: int) -> None:
        """Tells where the main thread is. Costs an assignment."""
        if self._first_step is None:
            self._first_step = step
        self._progress = (step, place, self._progress[2] + 1)

    def close(self) -> None:
        """Says goodbye: this rank is no longer missed."""
        self._closed.set()
        self._thread.join(2 * BEAT_SECONDS)

    def silent(self) -> list[int]:
        """Ranks whose beat has stopped for longer than three beats, as far as this rank has seen."""
        now = time.monotonic()
        return [rank for rank, (since, _) in self._seen.items() if now - since > 3 * BEAT_SECONDS]

    def describe(self, ranks: list[int]) -> str:
        """The ranks, where each was last, and on which host."""
        told = []
        for rank in ranks:
            step, place, _, host = self._moved[rank][1].split(" ", 3)
            told.append(f"rank {rank} on {host} (last seen {PLACES[int(place)]}, after step {step})")
        return ", ".join(told)

    # ---- the thread ----
    def _run(self) -> None:
        host = f"{socket.gethostname()} pid {os.getpid()}"
        count = 0
        try:
            while not self._closed.wait(BEAT_SECONDS if count else 0):
                count += 1
                step, place, told = self._progress
                self._store.set(f"at/{self._rank}", f"{step} {place} {told} {host}")
                self._store.set(f"beat/{self._rank}", str(count))
                self._look()
            self._store.set(f"beat/{self._rank}", "gone")
        except RuntimeError as error:
            if not self._closed.is_set():
                self._end(f"the launcher's store does not answer any more ({str(error).splitlines()[0]})")

    def _look(self) -> None:
        now = time.monotonic()
        for rank in self._ranks:
            if not self._store.check([f"at/{rank}", f"beat/{rank}"]):
                continue  # it has not come so far; before training a launcher sees who is missing
            place, beat = (value.decode() for value in self._store.multi_get([f"at/{rank}", f"beat/{rank}"]))
            if beat == "gone":
                self._seen.pop(rank, None)
                self._moved.pop(rank, None)
                continue
            for known, value in ((self._seen, beat), (self._moved, place)):
                if rank not in known or known[rank][1] != value:
                    known[rank] = (now, value)
        dead = [rank for rank, (since, _) in self._seen.items() if now - since > self._patience]
        if dead:
            for rank in dead:
                _kill_if_here(rank, self._moved[rank][1].split(" ", 3)[3])
            self._end(f"no sign of life for {self._patience:.0f} s: {self.describe(dead)}; {self._here()}")
        stuck = [rank for rank, (since, _) in self._moved.items() if now - since > self._patience]
        # Before the first step operators are compiled, and a resumed run finds its place in the data: that may take long.
        if stuck and len(stuck) == len(self._moved) and self._progress[0] > (self._first_step or 0):
            progress = {rank: tuple(map(int, self._moved[rank][1].split()[:2])) for rank in stuck}
            last = min(progress.values())
            behind = [rank for rank in stuck if progress[rank] == last]
            self._end(f"no progress for {self._patience:.0f} s: {self.describe(behind)}; {self._here()}")

    def _here(self) -> str:
        return f"rank {self._rank}, {PLACES[self._progress[1]]} after step {self._progress[0]}, ends too"


def _end_process(message: str) -> None:
    logger.error(message)
    logging.shutdown()
    os._exit(EXIT_CODE)


def _kill_if_here(rank: int, host: str) -> None:
    """Kills a process that was stopped, if it is on this host: a launcher would wait long for it to end by itself."""
    name, _, pid = host.partition(" pid ")
    if name != socket.gethostname():
        return
    mine = f"MASTER_PORT={os.environ.get('MASTER_PORT')}".encode()
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        # In a container of its own, another process may have the number.
        if f"RANK={rank}".encode() in variables and mine in variables:
            os.kill(int(pid), 9)
    except OSError:
        pass


class Heartbeats(TrainerCallback):
    """A Heartbeat for the time of a training, where there are several ranks."""

    def __init__(self):
        self.heartbeat: Heartbeat | None = None
        self._trainings = 0

    def on_train_begin(self, args, state, control, **_):
        self.close()
        self._trainings += 1
        if args.world_size > 1:
            self.heartbeat = Heartbeat(
                connect(f"heartbeat/{self._trainings}"),
                args.process_index,
                args.world_size,
                PATIENCE * args.ddp_timeout,
            )
            self.at(state, "between steps")

    def on_train_end(self, args, state, control, **_):
        self.close()

    def close(self) -> None:
        if self.heartbeat is not None:
            self.heartbeat.close()
            self.heartbeat = None

    def at(self, state, place: str) -> None:
        if self.heartbeat is not None:
            self.heartbeat.at(state.global_step, PLACES.index(place))

    def on_step_begin(self, args, state, control, **_):
        self.at(state, "computing")

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.at(state, "updating weights")

    def on_step_end(self, args, state, control, **_):
        self.at(state, "between steps")

    def on_prediction_step(self, args, state, control, **_):
        self.at(state, "evaluating")

    def explain(self) -> str | None:
        """Which ranks have died, for an error that may have come of that; None if all are alive. Waits some beats."""
        if self.heartbeat is None:
            return None
        end = time.monotonic() + 5 * BEAT_SECONDS
        while not self.heartbeat.silent() and time.monotonic() < end:
            time.sleep(0.1)
        silent = self.heartbeat.silent()
        return f"no sign of life any more: {self.heartbeat.describe(silent)}" if silent else None
