"""utils/data_parallel.py: two real processes, against torch's DistributedDataParallel."""

import json

import pytest
from commands import run_distributed


@pytest.fixture(scope="module")
def outcome() -> dict:
    done = run_distributed("tests/data_parallel_worker.py")
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("case", ["gpt2", "gpt2_small_buckets", "gpt2_all_used", "gpt2_accumulating"])
def test_equals_distributed_data_parallel(outcome, case):
    """Rung 2 of the numerics ladder under DDP."""
    both = outcome[case]
    assert both["combined"] == pytest.approx(both["ddp"], rel=1e-6)
    assert both["difference"] < 1e-6
    assert both["ranks_agree"]
    assert both["ddp"][-1] < both["ddp"][0]


def test_bucket_size_is_obeyed(outcome):
    assert outcome["gpt2"]["buckets"] == 1
    assert outcome["gpt2_small_buckets"]["buckets"] > 3


def test_parameters_used_by_one_rank_or_by_none(outcome):
    """All ranks start from rank 0's weights, and what one rank alone uses moves on all of them."""
    assert outcome["uneven"]["combined"] == pytest.approx(outcome["uneven"]["ddp"], rel=1e-6)
    assert outcome["uneven"]["difference"] < 1e-6
    assert outcome["uneven"]["ranks_agree"]


def test_one_ranks_overflow_makes_all_ranks_skip(outcome):
    first, second = outcome["overflow"]["trace"]
    assert first == second
    assert first[1] == first[0]
    assert first[2] != first[1]
