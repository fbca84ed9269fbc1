"""Sides of a benchmark take turns, step by step, each in a process of its own.

In one process they would share an allocator, and what one frees another gets for nothing. What slows the machine for a
while slows all sides.
"""

import logging
import multiprocessing
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection


def serve(make_step: Callable[..., Callable[[], tuple]], arguments: tuple, connection: Connection) -> None:
    """A side's process: makes its step, then takes one for each message until the connection closes."""
    logging.disable(logging.WARNING)
    step = make_step(*arguments)
    try:
        while connection.recv() == "step":
            connection.send(step())
    except EOFError:
        return


def take_turns(
    make_step: Callable[..., Callable[[], tuple]], sides: Mapping[str, tuple], rounds: int, warm_up: int = 2
) -> dict[str, list[tuple]]:
    """{side: what its step returned in each of `rounds`}, after `warm_up` rounds that do not count.

    make_step: a module's function; make_step(*arguments of the side) returns the function that takes a step.
    """
    context = multiprocessing.get_context("spawn")
    connections = {}
    for name, arguments in sides.items():
        connections[name], there = context.Pipe()
        context.Process(target=serve, args=(make_step, arguments, there), daemon=True).start()
    measured: dict[str, list[tuple]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(warm_up + rounds):
        # Each round starts with another side: one that allocates much leaves the machine's memory in disorder.
        start = number % len(names)
        for name in names[start:] + names[:start]:
            connections[name].send("step")
            outcome = connections[name].recv()
            if number >= warm_up:
                measured[name].append(outcome)
    return measured
