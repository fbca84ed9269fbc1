"""Mistakes of a user, told in one line."""

import logging
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from utils import signals

logger = logging.getLogger(__name__)


class UsageError(ValueError):
    """A mistake that the user can mend: the message names the flag or file, its value and the remedy, in one line.

    of_one_rank: whether other ranks may not have it, so that each that has speaks.
    """

    def __init__(self, message: str, of_one_rank: bool = False):
        super().__init__(message)
        self.of_one_rank = of_one_rank


def run(main: Callable[[], None], wants_traceback: Callable[[], bool]) -> None:
    """Calls `main`; a UsageError ends the process with its message as one line on stderr and exit code 2.

    wants_traceback: asked when an error came; true (--log_level debug) lets the traceback through.
    SIGTERM and SIGINT end it with one line and exit code 143 or 130; a training saves first.
    """
    signals.end_if_ended_for_good()
    signals.listen()
    try:
        main()
        _leave_process_group()
    except signals.Stopped as stopped:
        signals.say(stopped.message)
        if stopped.together:
            if stopped.for_good:
                signals.note_the_end(stopped.code)
            _leave_process_group()  # the first to leave would have a launcher end those that are still saving
        raise
    except UsageError as error:
        if wants_traceback():
            raise
        leave(error)


def leave(error: UsageError) -> NoReturn:
    """Ends the process with the error's message as one line on stderr and exit code 2."""
    # Of several ranks that all fail alike, one speaks.
    if error.of_one_rank or os.environ.get("RANK", "0") == "0":
        script = os.path.basename(sys.argv[0])
        print(f"{script}: error: {one_line(error)}", file=sys.stderr, flush=True)
    signals.note_the_end(2)
    sys.exit(2)


def _leave_process_group() -> None:
    """Waits for the other ranks and closes the process group: one that is left open may abort the process at its end."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


# Control characters, and those that turn the direction of writing: a file's name may hold them, a terminal obeys them.
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(error: BaseException) -> str:
    """The error's message without line breaks, unseen characters by their numbers; its type where it has none."""
    words = " ".join(str(error).split()) or type(error).__name__
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], words)
