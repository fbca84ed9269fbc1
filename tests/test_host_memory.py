"""utils/host_memory.py: page faults and huge pages of a process of its own, as the kernel counts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

from utils import host_memory

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# A step that takes and frees two blocks of as many MiB.
FAULTS = """
import resource, sys
import torch
from utils import host_memory
if sys.argv[1] != "give back":
    assert host_memory.keep_freed_memory("cpu", sys.argv[1] == "keep")
elements = int(sys.argv[2]) * 2**18
def step():
    first = torch.ones(elements)
    second = torch.ones(elements)
for _ in range(30):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HUGE = """
from utils import host_memory
host_memory.ask_for_huge_pages()
import torch
block = torch.ones(64 * 2**20)
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""


def number_told_by(program: str, *words: str, **variables: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name not in host_memory.TORCH_VARIABLES}
    told = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, env=environment | variables,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(told.stdout)


@pytest.mark.skipif("glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="mallopt is glibc's")
def test_a_step_faults_no_pages_that_an_earlier_one_has_freed():
    assert number_told_by(FAULTS, "give back", "40") >= 4 * 2 * 19  # 40 MiB in huge pages, if those are always used
    assert number_told_by(FAULTS, "keep", "40") < 4 * 19
    assert number_told_by(FAULTS, "keep small ones", "40") < 4 * 19


@pytest.mark.skipif("glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="mallopt is glibc's")
def test_large_blocks_are_kept_where_all_steps_take_the_same():
    """GPT-2's token embedding has 147 MiB."""
    assert number_told_by(FAULTS, "keep", "147") < 4 * 73
    assert number_told_by(FAULTS, "keep small ones", "147") >= 4 * 2 * 73


@pytest.mark.skipif(not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="this kernel gives no huge pages")
def test_tensors_lie_in_huge_pages_unless_the_user_says_no():
    if "[madvise]" in SWITCH.read_text():
        assert number_told_by(HUGE, THP_MEM_ALLOC_ENABLE="0") < 64 * 2**10
    assert number_told_by(HUGE) > 128 * 2**10  # KiB, of 256 MiB


def test_an_accelerators_host_is_left_alone():
    assert not host_memory.keep_freed_memory("cuda")
