"""utils/heartbeat.py: ranks as heartbeats of this process, which share a store."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from utils import heartbeat
from utils.heartbeat import PLACES, Heartbeat

COMPUTING, WAITING = PLACES.index("computing"), PLACES.index("waiting for a batch")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.1)


def ranks(count: int, patience: float) -> tuple[list[Heartbeat], list[str]]:
    store, said = dist.HashStore(), []
    return [Heartbeat(store, rank, count, patience, said.append) for rank in range(count)], said


def wait_until(said: list[str], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not said and time.monotonic() < end:
        time.sleep(0.05)


def test_the_rank_that_hangs_is_the_one_furthest_behind() -> None:
    """All are alive: two wait in a collective of step 8 for the third, which waits for its data."""
    all_ranks, said = ranks(3, patience=1)
    for rank, one in enumerate(all_ranks):
        one.at(5, COMPUTING)
        one.at(7, WAITING if rank == 1 else COMPUTING)
    wait_until(said)
    for one in all_ranks:
        one.close()
    assert said[0].startswith("no progress for 1 s: rank 1 on ")
    assert "(last seen waiting for a batch, after step 7)" in said[0] and "rank 0 on" not in said[0]


def test_a_slow_rank_is_left_alone() -> None:
    all_ranks, said = ranks(2, patience=1)
    for step in range(8):
        all_ranks[0].at(step, COMPUTING)
        all_ranks[1].at(4, WAITING)  # tells the same place again and again: it evaluates, say
        time.sleep(0.3)
    for one in all_ranks:
        one.close()
    assert said == []


def test_a_first_step_may_take_long() -> None:
    all_ranks, said = ranks(2, patience=0.5)
    for one in all_ranks:
        one.at(100, COMPUTING)  # resumed from there
    wait_until(said, 2)
    for one in all_ranks:
        one.close()
    assert said == []


def test_who_says_goodbye_is_not_missed() -> None:
    [first, second], said = ranks(2, patience=0.5)
    time.sleep(0.3)
    second.close()
    for step in range(10):
        first.at(step, COMPUTING)
        time.sleep(0.2)
    first.close()
    assert said == []


def test_a_process_of_another_run_is_not_killed(monkeypatch) -> None:
    """Only a rank of the same run, by its environment, though host and number are right."""
    monkeypatch.setenv("MASTER_PORT", "12345")
    for port, killed in (("12345", True), ("54321", False)):
        process = subprocess.Popen(
            [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"],
            env={**os.environ, "RANK": "1", "MASTER_PORT": port},
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        heartbeat._kill_if_here(1, f"{heartbeat.socket.gethostname()} pid {process.pid}")
        time.sleep(0.3)
        assert (process.poll() == -signal.SIGKILL) == killed
        process.kill()
        process.wait()
