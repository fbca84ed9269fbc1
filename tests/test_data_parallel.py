"""utils/data_parallel.py: two real processes, against torch's DistributedDataParallel."""

import json

import pytest
from commands import run_distributed


@pytest.fixture(scope="module")
def outcome() -> dict:
    done = run_distributed("tests/data_parallel_worker.py")
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("case", ["gpt2", "gpt2_small_buckets", "gpt2_all_used", "gpt2_accumulating", "gpt2_bf16"])
def test_equals_distributed_data_parallel(outcome, case):
    """Rung 2 of the numerics ladder under DDP; with bfloat16 on the wire beside torch's own hook."""
    both = outcome[case]
    assert both["combined"] == pytest.approx(both["ddp"], rel=1e-6)
    assert both["difference"] < 1e-6
    assert both["ranks_agree"]
    assert both["ddp"][-1] < both["ddp"][0]


def test_bucket_size_is_obeyed(outcome):
    assert outcome["gpt2"]["buckets"] == 2  # the two groups of parameters
    assert outcome["gpt2_small_buckets"]["buckets"] > 3


def test_buckets_leave_in_place_while_backward_runs(outcome):
    """No copy: a bucket on its way is the slice of the buffer that the optimizer reads.

    In the first step the expected order is the wrong way round, and all buckets wait for the last; from then on they
    leave as they are filled.
    """
    found = outcome["in_place"]
    assert found["on_their_way"][:8] == [0, 0, 0, 4, 1, 2, 3, 4]
    assert found["reduced_in_place"] == [True] * 4 and all(found["read_by_optimizer"])
    assert found["wire_bytes"] == found["gradient_bytes"]


def test_half_precision_on_the_wire_halves_the_bytes(outcome):
    found = outcome["on_a_half_wire"]
    assert found["wire_bytes"] * 2 == found["gradient_bytes"]
    assert all(found["read_by_optimizer"])


def test_half_precision_on_the_wire_rounds_gradients_and_no_more(outcome):
    """Over six steps of Adam. torch's fp16 hook divides what it has cast, which rounds small numbers twice."""
    for case, tolerance in (("gpt2_fp16", 2e-4), ("gpt2_bf16", 2e-3)):
        assert outcome[case]["combined"] == pytest.approx(outcome["gpt2"]["combined"], rel=tolerance)
        assert outcome[case]["combined"] != outcome["gpt2"]["combined"]
        assert outcome[case]["combined"] == pytest.approx(outcome[case]["ddp"], rel=tolerance)
        assert outcome[case]["ranks_agree"]


def test_a_second_backward_in_a_step_is_an_error(outcome):
    assert "twice in a step" in outcome["in_place"]["error"]


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
