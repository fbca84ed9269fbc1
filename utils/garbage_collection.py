"""Imports without looking for garbage among what they make, which stays."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No garbage is looked for within.

    For imports and little else: a fifth of the time in which torch, transformers and datasets are imported goes to
    looking for cycles among a million objects of theirs, again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def last_imports() -> Iterator[None]:
    """As `paused`; and all that is there afterwards is never looked through again: neither in training nor when Python ends.

    For the script itself, before it has made anything: what is there has come by imports. Each search among these objects
    takes a fifth of a second, in which no step is launched, and Python's end has several. Forks share the pages that no
    search writes to.
    """
    with paused():
        yield
    gc.freeze()
