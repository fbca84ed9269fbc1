"""Two processes against one with the whole batch, by LanguageModelingTrainer: gradients, losses, evaluation, collectives.

Lines of very unequal length: rank 0 has most targets of each batch, rank 1 one or none.
"""

import data_parallel_training
import pytest
import torch
from commands import run_distributed


@pytest.fixture(scope="module")
def one() -> dict:
    """A single process, whose micro-batches hold the samples of both ranks."""
    return data_parallel_training.train({}, batch=4)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("two")
    run_distributed("tests/data_parallel_training.py", folder, *data_parallel_training.CASES)
    return {case: torch.load(folder / f"{case}.pt") for case in data_parallel_training.CASES}


def difference(found: dict, expected: dict) -> float:
    """Of the gradients, relative to their norm: the worst step."""
    errors = (found["gradients"] - expected["gradients"]).norm(dim=1) / expected["gradients"].norm(dim=1)
    return errors.max().item()


@pytest.mark.parametrize("case", ["plain", "combined", "combined_small_buckets"])
def test_gradients_are_those_of_one_process_with_the_whole_batch(one, two, case):
    """To 1e-6 of their norm: each token weighs the same, on whichever rank and in whichever micro-batch it is."""
    assert difference(two[case], one) < 1e-6
    assert two[case]["losses"] == pytest.approx(one["losses"], rel=1e-6)


@pytest.mark.parametrize(
    ("case", "tolerance"), [("plain_bf16", 5e-3), ("combined_bf16", 5e-3), ("combined_fp16", 5e-4)]
)
def test_half_precision_on_the_wire_rounds_gradients(one, two, case, tolerance):
    """bf16 has 8 bits and fp16 11: each number is rounded by up to 2**-9 or 2**-12 of itself, as often as it is sent."""
    assert 1e-6 < difference(two[case], one) < tolerance
    assert two[case]["losses"] == pytest.approx(one["losses"], rel=tolerance)


@pytest.mark.parametrize("case", ["plain", "combined"])
def test_evaluation_is_exact_where_the_set_does_not_divide(one, two, case):
    """Thirteen samples for two ranks of two a batch: what fills up the last batch counts nowhere."""
    loss, accuracy, samples = two[case]["evaluated"]
    assert loss == pytest.approx(one["evaluated"][0], rel=1e-6)
    assert (accuracy, samples) == (one["evaluated"][1], 13)


def test_accumulated_micro_batches_are_reduced_once(two):
    """Of three micro-batches the last one is reduced; with combined gradients once more, for who received any."""
    for case in ("combined", "combined_small_buckets"):
        buckets = two[case]["buckets"]
        assert two[case]["collectives"].count("gloo:all_reduce") == buckets + 1
    assert two["combined_small_buckets"]["buckets"] > two["combined"]["buckets"] == 2
    assert two["plain"]["collectives"].count("gloo:all_reduce") == 2  # DDP's bucket, and who received any
