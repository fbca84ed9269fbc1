"""Sides of a benchmark take turns, step by step, each in a process of its own.

In one process they would share an allocator, and what one frees another gets for nothing. What slows the machine for a
while slows all sides.
"""

import logging
import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection

START_METHOD = "spawn"  # a Python of its own, that has imported nothing


class SideFailed(Exception):
    """What ended a side, in one line."""


class Side:
    """A process that runs drive(*arguments, connection): it answers each word that it is sent with one outcome.

    environment: variables that it sees, above those of this process.
    """

    def __init__(self, drive: Callable, arguments: tuple, environment: Mapping[str, str] | None = None):
        context = multiprocessing.get_context(START_METHOD)
        self.connection, there = context.Pipe()
        environment = dict(environment or {})
        self.process = context.Process(target=guard, args=(drive, arguments, environment, there), daemon=True)
        before = dict(os.environ)
        os.environ.update(environment)  # for what libraries read when they are imported
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        there.close()

    def hear(self):
        """The next outcome. Raises SideFailed if the process failed or died."""
        try:
            outcome = self.connection.recv()
        except EOFError:
            self.process.join()
            raise SideFailed(f"the process ended with exit code {self.process.exitcode}") from None
        if isinstance(outcome, SideFailed):
            self.process.join()
            raise outcome
        return outcome

    def ask(self, word: str):
        """What the side answers to a word. Raises SideFailed."""
        try:
            self.connection.send(word)
        except OSError:
            pass  # it has ended, and hear() tells why
        return self.hear()

    def end(self) -> None:
        self.connection.close()
        self.process.join(30)
        if self.process.is_alive():
            self.process.terminate()


def guard(drive: Callable, arguments: tuple, environment: dict[str, str], connection: Connection) -> None:
    """A side's process: what ends it early is its last outcome."""
    os.environ.update(environment)  # a fork server's processes have its own
    logging.disable(logging.WARNING)
    try:
        drive(*arguments, connection)
    except EOFError:
        return
    except BaseException as error:  # an out-of-memory error is a RuntimeError, a user's mistake a SystemExit
        line = " ".join(str(error).split())[:300]
        connection.send(SideFailed(f"{type(error).__name__}: {line}"))


def in_turns(sides: Mapping[str, Side], word: str, rounds: int, warm_up: int) -> dict[str, list]:
    """{side: its outcomes of `rounds`}, after `warm_up` rounds that do not count. Raises SideFailed.

    Each round starts with another side: one that allocates much leaves the machine's memory in disorder.
    """
    outcomes: dict[str, list] = {name: [] for name in sides}
    names = list(sides)
    for number in range(warm_up + rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            outcome = sides[name].ask(word)
            if number >= warm_up:
                outcomes[name].append(outcome)
    return outcomes


def take_turns(
    make_step: Callable[..., Callable[[], tuple]], sides: Mapping[str, tuple], rounds: int, warm_up: int = 2
) -> dict[str, list[tuple]]:
    """{side: what its step returned in each of `rounds`}, after `warm_up` rounds that do not count.

    make_step: a module's function; make_step(*arguments of the side) returns the function that takes a step.
    """
    started = {name: Side(step_by_step, (make_step, arguments)) for name, arguments in sides.items()}
    try:
        return in_turns(started, "step", rounds, warm_up)
    finally:
        for side in started.values():
            side.end()


def step_by_step(make_step: Callable[..., Callable[[], tuple]], arguments: tuple, connection: Connection) -> None:
    step = make_step(*arguments)
    while connection.recv() == "step":
        connection.send(step())
