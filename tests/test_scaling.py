"""benchmarks/links.py, overlap.py, prediction.py, scaling.py: the model of cost by hand, and that the benchmark still runs."""

import json
import random

import pytest
from commands import ROOT

from benchmarks import prediction, scaling
from benchmarks.links import ACHIEVED, CALL, GIGA, MICRO, SYSTEMS, Level, System, all_reduce_seconds, level_seconds
from benchmarks.overlap import Bucket, Compute, simulate
from benchmarks.two_processes import MeasuredLink, Profile

pytestmark = pytest.mark.usefixtures("sides_that_start_quickly")


# ---- links ----
def link(algorithm: str, count: int = 8, bandwidth: float = 10 * GIGA) -> Level:
    return Level("link", count, bandwidth, 5 * MICRO, algorithm)


@pytest.mark.parametrize(("algorithm", "steps"), [("ring", 14), ("mesh", 2), ("halving-doubling", 6)])
def test_a_level_by_hand(algorithm, steps):
    """Eight devices send and receive 2 * 7/8 of the bytes, in as many steps as the algorithm has."""
    found = level_seconds(link(algorithm), 8, 80e6, achieved=1.0)
    assert found == pytest.approx(steps * 5e-6 + 2 * 7 / 8 * 80e6 / 10e9)


def test_levels_share_the_bytes():
    """Sixteen devices in servers of eight: between the servers each one's eighth is exchanged by pairs."""
    system = System("made up", "", (link("ring"), link("halving-doubling", 0, 1 * GIGA)), "")
    expected = CALL + 14 * 5e-6 + 2 * 7 / 8 * 80e6 / 10e9 + 2 * 5e-6 + 10e6 / 1e9
    assert all_reduce_seconds(system, 16, 80e6, achieved=1.0) == pytest.approx(expected)


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_more_devices_and_more_bytes_cost_more(system):
    assert all_reduce_seconds(system, 1, 1e9) == 0
    times = [all_reduce_seconds(system, devices, 5e8) for devices in (2, 4, 8, 64, 512)]
    assert times == sorted(times)
    assert all_reduce_seconds(system, 8, 1e9) > all_reduce_seconds(system, 8, 1e6) > CALL
    # Never faster than the slowest link lets its share of the bytes through.
    last = system.levels[-1]
    assert times[-1] > 2 * 63 / 64 * 5e8 / 8 / (last.bandwidth * ACHIEVED)


def test_devices_must_fill_their_servers():
    with pytest.raises(ValueError, match="12 devices do not fill groups of 8"):
        all_reduce_seconds(SYSTEMS["h100"], 12, 1e6)


# ---- overlap ----
COMPUTE = Compute(before=1.0, backward=2.0, after=0.5)


def a_second_each(size: float) -> float:
    return 1.0


def test_without_overlap_times_add_up():
    step = simulate(COMPUTE, [Bucket(1, 0.1), Bucket(1, 1.0)], a_second_each, overlap=False)
    assert (step.seconds, step.communication, step.hidden) == (5.5, 2.0, 0.0)
    assert step.efficiency == pytest.approx(3.5 / 5.5)


def test_what_is_ready_early_is_hidden():
    step = simulate(COMPUTE, [Bucket(1, 0.1), Bucket(1, 1.0)], a_second_each)
    assert step.seconds == pytest.approx(4.5)  # only the last is seen
    assert step.hidden == pytest.approx(0.5)


def test_a_bucket_waits_for_the_one_before_it():
    """Ready after 0.2 s, three seconds of reductions: they end 3.2 s after backward has begun, which takes 2 s."""
    step = simulate(COMPUTE, [Bucket(1, 0.1), Bucket(1, 0.2), Bucket(1, 0.3)], a_second_each)
    assert step.seconds == pytest.approx(1.0 + 3.2 + 0.5)


def test_a_processor_that_does_it_all_hides_nothing():
    buckets = [Bucket(1, 0.1), Bucket(1, 0.6)]
    assert simulate(COMPUTE, buckets, a_second_each, stolen=1.0).seconds == pytest.approx(5.5)
    # By half: backward has 1.5 of its 2 seconds done when the second begins, and the rest within it.
    assert simulate(COMPUTE, [Bucket(1, 0.5), Bucket(1, 0.6)], a_second_each, stolen=0.5).seconds == pytest.approx(4.5)


def test_a_half_wire_sends_half():
    sent = []
    simulate(COMPUTE, [Bucket(8, 1.0)], lambda size: sent.append(size) or 0.0, wire=0.5)
    assert sent == [4]


def test_accumulated_micro_batches_do_not_communicate():
    step = simulate(COMPUTE.accumulated(3), [Bucket(1, 1.0)], a_second_each)
    assert step.alone == pytest.approx(3 * 3.0 + 0.5)
    assert step.seconds == pytest.approx(step.alone + 1.0)


def test_any_step_lies_between_its_bounds():
    draw = random.Random(0)
    for _ in range(300):
        buckets = sorted((Bucket(draw.random(), draw.random()) for _ in range(5)), key=lambda bucket: bucket.ready)
        step = simulate(COMPUTE, buckets, lambda size: size, stolen=draw.choice([0.0, 0.3]))
        assert max(step.alone, 1.5 + step.communication) - 1e-9 <= step.seconds
        assert step.seconds <= step.alone + step.communication + 1e-9


# ---- what is measured ----
def test_a_link_is_fitted_and_interpolated():
    sizes = [2**power for power in (10, 16, 20, 24)]
    measured = MeasuredLink({size: 1e-4 + size / 2e9 for size in sizes}, stolen=0.5)
    assert measured.latency_and_bandwidth() == pytest.approx((1e-4, 2e9))
    assert measured(2**18) == pytest.approx(1e-4 + 2**18 / 2e9)
    assert measured(2**26) == pytest.approx(1e-4 + 2**26 / 2e9)


def made_up_profile() -> Profile:
    """GPT-2's bytes: a third of them, the embedding, come last."""
    layers = [Bucket(26e6, (i + 1) / 14) for i in range(13)]
    sizes = {megabytes: [*layers, Bucket(154e6, 1.0)] for megabytes in prediction.MEGABYTES}
    return Profile(Compute(1.0, 2.0, 0.1), sizes, parameters=148)


def test_tables_of_what_is_predicted():
    profiles = {model: made_up_profile() for model in prediction.MODELS}
    assert prediction.prediction_table(profiles).count("\n") == 1 + 2 * 2 * len(SYSTEMS)
    assert "| gpt2 | Atlas 800 (model 9000), Ascend 910 | float32 | 702.2 ms (published) |" in (
        prediction.prediction_table(profiles)
    )
    rows = prediction.published_table(profiles).splitlines()
    assert rows[2].startswith("| gpt2 | 76% | 4.5% of the run on one |")
    assert rows[3].startswith("| roberta-base | 51% | 13.8% of the run on one |")
    assert "1 to 1000 MB" in prediction.ninety_table(profiles)


def test_the_benchmark_measures_predicts_and_writes_its_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), encoding="utf-8")
    words = ["--tiny", "--steps", "1", "--rounds", "2", "--output", str(tmp_path), "--write", str(page)]
    scaling.main(words)
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert [len(row["seconds"]) for row in found["sides"]] == [2, 2, 2]
    assert found["sides"][2]["predicted"] > 0
    told = capsys.readouterr().out
    assert "| two, combined, 1 MB |" in told and "| two, combined, 1 MB |" in page.read_text()
    # Buckets come in the order in which backward fills them, and hold all gradients.
    for profile in found["profiles"].values():
        ready = [bucket["ready"] for bucket in profile["buckets"]["1"]]
        assert ready == sorted(ready) and 0 < ready[-1] <= 1
        sizes = {sum(bucket["size"] for bucket in buckets) for buckets in profile["buckets"].values()}
        assert max(sizes) - min(sizes) < 0.2 * max(sizes)  # what lies between parameters is in a bucket or not
