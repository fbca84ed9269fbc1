"""What is measured on this machine for benchmarks.scaling: two processes of a thread each, joined by gloo, in turns with one.

Two processes that train side by side and are not joined tell what the machine itself takes away: they share its memory.
"""

import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import torch
import torch.distributed as dist

from benchmarks import trainers
from benchmarks.compare import drive
from benchmarks.overlap import Bucket, Compute
from benchmarks.turns import Side
from utils.combine_grad import CombinedOptimizer
from utils.data_parallel import make_buckets

SIZES = tuple(2**power for power in (12, 16, 18, 20, 22, 23, 24, 25))


class Together:
    """Sides that answer a word together: the processes of one training. As Side, with a list of outcomes in its place.

    environments: of each process, see `ranks`.
    """

    def __init__(self, drive: Callable, arguments: tuple, environments: list[dict[str, str]]):
        self.sides = [Side(drive, arguments, environment) for environment in environments]

    def hear(self) -> list:
        return [side.hear() for side in self.sides]

    def ask(self, word: str) -> list:
        for side in self.sides:
            side.connection.send(word)
        return self.hear()

    def end(self) -> None:
        for side in reversed(self.sides):  # rank 0 holds the store in which the others still look for it
            side.end()


def ranks(count: int, joined: bool = True) -> list[dict[str, str]]:
    """The environment of each of `count` processes, as torchrun would set it; not joined, each is alone."""
    if not joined or count == 1:
        return [{}] * count
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


# ---- training ----
def train(recipe: trainers.Recipe, steps: int, connection: Connection) -> None:
    """A process of a training: benchmarks.compare's, with one thread."""
    torch.set_num_threads(1)
    drive(recipe, steps, 0, connection)


def training(recipe: trainers.Recipe, steps: int, count: int, joined: bool = True) -> Together:
    return Together(train, (recipe, steps), ranks(count, joined))


# ---- the link ----
@dataclass(frozen=True)
class MeasuredLink:
    """seconds: {bytes: of an all-reduce}. stolen: the share of that time in which computing stands still."""

    seconds: dict[int, float]
    stolen: float

    def __call__(self, size: float) -> float:
        """Seconds for `size` bytes: between two that were measured on a line, beyond them at the speed of the last two."""
        sizes, times = list(self.seconds), list(self.seconds.values())
        if size > sizes[-1]:
            return times[-1] + (size - sizes[-1]) * (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
        return float(np.interp(size, sizes, times))

    def latency_and_bandwidth(self) -> tuple[float, float]:
        """Of the line latency + size / bandwidth whose relative errors are least."""
        sizes, times = np.array(list(self.seconds)), np.array(list(self.seconds.values()))
        terms = np.stack([1 / times, sizes / times], axis=1)
        (latency, per_byte), *_ = np.linalg.lstsq(terms, np.ones(len(times)), rcond=None)
        return float(latency), float(1 / per_byte)


def probe_link(sizes: tuple[int, ...], rounds: int, connection: Connection) -> None:
    """A process that all-reduces by itself, computes by itself, and does both at once."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seconds = {}
    for size in sizes:
        gradients = torch.zeros(size // 4)
        times = [_seconds(partial(dist.all_reduce, gradients)) for _ in range(rounds + 2)]
        seconds[size] = statistics.median(times[2:])
    matrix = torch.randn(256, 256)

    def compute(repetitions: int) -> None:
        for _ in range(repetitions):
            matrix @ matrix

    repetitions = max(1, round(3 * seconds[sizes[-1]] / _seconds(lambda: compute(20)) * 20))

    def both() -> None:
        work = dist.all_reduce(gradients, async_op=True)
        compute(repetitions)
        work.wait()

    stolen = []
    for _ in range(rounds):
        alone, reduction, together = (
            _seconds(lambda: compute(repetitions)),
            _seconds(lambda: dist.all_reduce(gradients)),
            _seconds(both),
        )
        stolen.append((together - alone) / reduction)
    connection.send(MeasuredLink(seconds, min(1.0, max(0.0, statistics.median(stolen)))))
    dist.barrier()  # the first to leave would take the store with it
    dist.destroy_process_group()


def _seconds(action: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure_link(sizes: tuple[int, ...] = SIZES, rounds: int = 7) -> MeasuredLink:
    """The link between two processes of this machine."""
    both = Together(probe_link, (sizes, rounds), ranks(2))
    link, _ = both.hear()
    both.end()
    return link


# ---- backward ----
@dataclass(frozen=True)
class Profile:
    """compute: of a micro-batch, by one thread. buckets: {megabytes: in the order in which backward fills them}."""

    compute: Compute
    buckets: dict[float, list[Bucket]]
    parameters: int


def profile_each(recipes: list[trainers.Recipe], megabytes: tuple, rounds: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    connection.send([profile_backward(recipe, megabytes, rounds) for recipe in recipes])


def profile_backward(recipe: trainers.Recipe, megabytes: tuple[float, ...], rounds: int) -> Profile:
    """Runs forward and backward, and notes when each parameter's gradient comes."""
    trainer, _ = trainers.make(recipe)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, CombinedOptimizer)
    came: dict = {}
    for member in optimizer.members:
        member.source.register_post_accumulate_grad_hook(
            lambda _, member=member: came.__setitem__(member, time.perf_counter())
        )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    runs = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        end = time.perf_counter()
        arrivals = [(came[member] - forward) / (backward - forward) for member in optimizer.members]
        runs.append([forward - start, backward - forward, end - backward, *arrivals])
    before, spent, after, *shares = np.median(runs[1:], axis=0).tolist()
    share_of = dict(zip(optimizer.members, shares, strict=True))
    buckets = {
        size: sorted(
            (
                Bucket(bucket.gradients.nbytes, min(1.0, max(share_of[member] for member in bucket.members)))
                for bucket in make_buckets(optimizer, size)
            ),
            key=lambda bucket: bucket.ready,
        )
        for size in megabytes
    }
    return Profile(Compute(before, spent, after), buckets, len(optimizer.members))


def measure_backward(recipes: list[trainers.Recipe], megabytes: tuple[float, ...], rounds: int = 3) -> list[Profile]:
    """Of each recipe, one after the other, in a process of their own."""
    side = Side(profile_each, (recipes, megabytes, rounds))
    profiles = side.hear()
    side.end()
    return profiles
