"""--async_save: what is written in the background is what would have been written at once."""

import json
import shutil
import time

import pytest
import resume
from commands import run_distributed

from utils.host_snapshot import HostSnapshot


@pytest.fixture
def folder():
    made = resume.memory_folder()
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("case", ["O0, combined, accumulating", "O2, combined", "best model"])
def test_the_same_checkpoints_in_the_background(case, folder):
    options = resume.CASES[case]
    at_once = resume.train(folder / "at once", **options)
    behind = resume.train(folder / "behind", async_save=True, **options)
    assert resume.differences(at_once, behind) == []
    for checkpoint in sorted((folder / "at once").glob("checkpoint-*")):
        other = folder / "behind" / checkpoint.name
        assert resume.differences(resume.state_of(checkpoint), resume.state_of(other)) == []
    again = resume.train(folder / "again", folder / "behind" / "checkpoint-3", async_save=True, **options)
    assert resume.differences(at_once, again) == []


@pytest.mark.parametrize("case", ["O0", "O2, combined"])
def test_an_update_waits_for_the_copy_of_what_it_changes(case, folder, monkeypatch):
    """A copy that takes longer than all else in a step."""
    fill = HostSnapshot.fill

    def slowly(snapshot):
        time.sleep(0.2)
        fill(snapshot)

    options = {**resume.CASES[case], "max_steps": 4, "eval_strategy": "no"}
    at_once = resume.train(folder / "at once", **options)
    monkeypatch.setattr(HostSnapshot, "fill", slowly)
    behind = resume.train(folder / "behind", async_save=True, **options)
    assert resume.differences(at_once, behind) == []
    for step in range(1, 5):
        states = [resume.state_of(folder / name / f"checkpoint-{step}") for name in ("at once", "behind")]
        assert resume.differences(*states) == []


# ---- a rank that cannot write ----
@pytest.fixture(scope="module")
def failed_saves() -> dict:
    done = run_distributed("tests/faults/full_disk_of_one_rank.py")
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("how", ["at once", "behind"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_is_no_checkpoint_for_any(rank, how, failed_saves):
    """The kernel refuses what that rank writes; the others learn of it, and nobody waits for anybody."""
    found = failed_saves[f"{how}, rank {rank}"]
    assert found["steps"] == [4, 4], "training went on"
    assert found["saved at 2"] == [None, None] and found["saved at 3"] == ["checkpoint-3", "checkpoint-3"]
    assert found["whole"] == ["checkpoint-1", "checkpoint-3", "checkpoint-4"] and found["newest"] == "checkpoint-4"
    [line] = found["told"]
    assert "checkpoint-2 could not be saved" in line and "the last complete checkpoint is checkpoint-1" in line
    assert how == "behind" and rank == 0 or f"rank {rank}: " in line
    assert found["left over"] == []
