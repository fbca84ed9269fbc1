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
