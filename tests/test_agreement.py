"""utils/agreement.py: ranks as threads, which meet in a barrier as if it were a collective."""

import random
import threading
import time

import pytest
import torch.distributed as dist

from utils.agreement import Agreement

RANKS = 4


class Ranks:
    """RANKS threads that pass points. Before each point all meet, but a rank may be up to `lead` points ahead.

    That is how ranks run ahead of each other on a device: a collective is launched, and waited for later.
    """

    def __init__(self, lead: int, seed: int, points: int = 400):
        self.store = dist.HashStore()
        self.agreements = [Agreement(self.store, rank, RANKS) for rank in range(RANKS)]
        self.progress = [0] * RANKS
        self.heard: list[list[tuple[int, str]]] = [[] for _ in range(RANKS)]
        self.changed = threading.Condition()
        self.lead = lead
        self.points = points
        self.random = [random.Random(seed * RANKS + rank) for rank in range(RANKS)]
        self.threads = [threading.Thread(target=self.run, args=(rank,), daemon=True) for rank in range(RANKS)]

    def run(self, rank: int) -> None:
        for number in range(1, self.points + 1):
            time.sleep(self.random[rank].random() * 0.01)
            with self.changed:
                # What was launched `lead` points ago needs all ranks.
                while min(self.progress) < number - 1 - self.lead:
                    self.changed.wait()
            if word := self.agreements[rank].point():
                self.heard[rank].append((number, word))
            with self.changed:
                self.progress[rank] = number
                self.changed.notify_all()
            if word == "stop":
                return

    def finish(self) -> None:
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive(), f"a rank hangs: {self.progress}"
        for agreement in self.agreements:
            agreement.close()


@pytest.mark.parametrize("lead", [0, 3])
@pytest.mark.parametrize("seed", range(3))
def test_all_ranks_stop_at_the_same_point_whoever_asks(lead, seed) -> None:
    ranks = Ranks(lead, seed)
    for thread in ranks.threads:
        thread.start()
    time.sleep(0.2 + 0.1 * seed)
    ranks.agreements[seed % RANKS].request("stop")
    ranks.finish()
    assert [word for _, word in ranks.heard[0]] == ["stop"]
    assert ranks.heard == [ranks.heard[0]] * RANKS
    assert ranks.heard[0][0][0] == max(ranks.progress) < 400


def test_requests_of_several_ranks_are_met_one_after_another() -> None:
    ranks = Ranks(lead=2, seed=7)
    for thread in ranks.threads:
        thread.start()
    for rank in range(RANKS):
        ranks.agreements[rank].request(f"save {rank}")
    time.sleep(0.8)
    ranks.agreements[1].request("stop")
    ranks.finish()
    assert ranks.heard == [ranks.heard[0]] * RANKS
    numbers, words = zip(*ranks.heard[0], strict=True)
    assert sorted(words[:-1]) == [f"save {rank}" for rank in range(RANKS)] and words[-1] == "stop"
    assert list(numbers) == sorted(set(numbers)), "two requests at one point"


def test_a_rank_that_does_not_answer_is_named() -> None:
    store = dist.HashStore()
    silences: list[tuple[str, list[int]]] = []
    agreement = Agreement(store, 0, 3, lambda word, ranks: silences.append((word, ranks)), patience=0.3)
    other = Agreement(store, 2, 3, patience=60)  # rank 1 is not there
    agreement.request("stop")
    end = time.monotonic() + 10
    while not silences and time.monotonic() < end:
        time.sleep(0.05)
    agreement.close()
    other.close()
    assert silences[0] == ("stop", [1])


def test_nothing_is_due_where_nobody_asks() -> None:
    agreement = Agreement(dist.HashStore(), 0, 1)
    assert [agreement.point() for _ in range(1000)] == [None] * 1000
    agreement.close()
