"""Memory of CPU tensors: in huge pages, and kept by the process when it is freed.

A training step on a CPU takes and frees the same large blocks each time. glibc gives those of 32 MiB and more, and what is
free at the end of its heap, back to the kernel, which hands them out again in pages of 4 KiB, each zeroed at its first
touch: for GPT-2 200,000 page faults a step.
Products of large matrices then miss the processor's table of pages as well. On an accelerator's host none of this counts.
"""

import ctypes
import os

# Read by torch's CPU allocator at its first block (c10/core/alignment.h): blocks of 2 MiB and more ask for huge pages.
TORCH_VARIABLES = {"THP_MEM_ALLOC_ENABLE": "1"}
# Of glibc's malloc.h; see mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
# Bytes of the largest block that is kept. malloc cannot use a block again for one of the same size at once, for want of what
# alignment may take, so it holds a few too many: by a tenth of the memory where each step takes the same blocks, which is less
# than what their zeroing costs in time; by more than half where lengths differ.
LARGEST_KEPT = 256 * 2**20
LARGEST_KEPT_OF_MANY_SIZES = 64 * 2**20


def ask_for_huge_pages() -> None:
    """For torch to obey, before it is imported. What the user exports wins."""
    for name, value in TORCH_VARIABLES.items():
        os.environ.setdefault(name, value)


def keep_freed_memory(device_type: str, equal_lengths: bool = True) -> bool:
    """Lets malloc serve a step from what the step before has freed; returns whether it does.

    It does for a CPU and with glibc. The process then stays near its peak memory until it ends.
    equal_lengths: all batches have one length, so that a step takes the blocks of the one before.
    """
    if device_type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    # Before 2.35 glibc refuses a threshold above 32 MiB; without any mmap it keeps larger blocks too.
    largest = LARGEST_KEPT if equal_lengths else LARGEST_KEPT_OF_MANY_SIZES
    kept = mallopt(M_MMAP_THRESHOLD, largest) or mallopt(M_MMAP_MAX, 0)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, -1))
