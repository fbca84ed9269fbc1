"""What one process finds out for all of them."""

from collections.abc import Callable
from typing import TypeVar

from utils.errors import UsageError

Found = TypeVar("Found")


def told_by_main(find: Callable[[], Found]) -> Found:
    """What `find` returns in the main process, which alone calls it. For every rank to call, where there are several.

    Thousands of ranks would otherwise list the same folder or ask the hub the same questions. Raises on all ranks the
    UsageError that `find` raises.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return find()
    from accelerate.utils import broadcast_object_list

    found: list = [None]
    if dist.get_rank() == 0:
        try:
            found = [find()]
        except UsageError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], UsageError):
        raise found[0]
    return found[0]
