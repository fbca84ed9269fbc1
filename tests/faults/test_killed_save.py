"""SIGKILL at each write, flush and rename of a save: what is left is a whole checkpoint, and the next start goes on."""

import json
import logging
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import killing
import pytest
import resume
import torch
import transformers

from utils import checkpoint, output_folder

SCRIPT, ARGUMENTS = "run_clm.py", {"seed": 7}


@pytest.fixture(autouse=True)
def no_progress_bars():
    """Their lock is shared with forks: one that is killed while it writes a bar would hold it for ever."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def folder():
    made = resume.memory_folder()
    yield made
    shutil.rmtree(made)


def claimed(folder: Path) -> output_folder.Claim:
    checkpoint.recover(folder)
    return output_folder.claim(str(folder), SCRIPT, ARGUMENTS, overwrite=False, resume="auto")


def saved_once(folder: Path, **options):
    """A trainer that has trained one step in the folder of a run, and saved it as checkpoint-1."""
    output_folder.begin(str(folder), SCRIPT, ARGUMENTS, overwrite=False)
    trainer = resume.trainer_in(folder, max_steps=1, use_combine_grad=True, **options)
    trainer.train()
    return trainer


def kills(trainer, work) -> list[str]:
    """How many calls there are to be killed at; the folder is as before afterwards."""
    output = Path(trainer.args.output_dir)
    shutil.copytree(output, output.with_name("before"))
    try:
        return killing.run_and_kill(work, None)[1]
    except OSError as error:
        pytest.skip(f"{error}, so no process can be killed at a system call")
    finally:
        restore(output)


def restore(output: Path) -> None:
    shutil.rmtree(output)
    shutil.copytree(output.with_name("before"), output)


pytestmark = pytest.mark.skipif(platform.machine() not in killing.CALLS, reason="system calls of another machine")


@pytest.mark.parametrize("how", ["next", "rotating", "same step", "in the background"])
def test_a_kill_at_any_write_leaves_a_whole_checkpoint(how, folder, caplog):
    """next: checkpoint-2 beside checkpoint-1. rotating: in its place. same step: checkpoint-1 is written anew. In
    the background: as next, by the thread of --async_save."""
    caplog.set_level(logging.ERROR)
    torch.set_num_threads(1)
    options = {"save_total_limit": 1} if how == "rotating" else {}
    trainer = saved_once(folder / "run", **options)
    first = resume.state_of(folder / "run" / "checkpoint-1")

    def save():
        if how != "same step":
            trainer.state.global_step = 2
        if how == "in the background":
            trainer._thread = ThreadPoolExecutor(1)  # in the fork: threads are not copied with a process
        trainer._save_checkpoint(trainer.model_wrapped, trial=None)
        trainer.finish_saves()

    calls = kills(trainer, save)
    assert calls.count("fsync") > 8 and len(calls) > 30
    assert sum(name.startswith("rename") for name in calls) >= 1
    outcomes = set()
    for at in range(len(calls)):
        killed, _ = killing.run_and_kill(save, at)
        found = claimed(folder / "run")
        assert found.verdict == "resume", f"killed at {at}, {calls[at]}: nothing is left"
        assert checkpoint.damage(Path(found.checkpoint)) is None
        state = json.loads(Path(found.checkpoint, "trainer_state.json").read_text())
        outcomes.add(state["global_step"])
        if state["global_step"] == 1 and how != "same step":
            assert resume.differences(first, resume.state_of(Path(found.checkpoint))) == []
        output_folder.begin(str(folder / "run"), SCRIPT, ARGUMENTS, overwrite=False)
        assert not (folder / "run" / "_incomplete").exists(), f"killed at {at}, {calls[at]}: something is left over"
        assert killed or at > len(calls) - 3
        restore(folder / "run")
    assert outcomes == ({1} if how == "same step" else {1, 2}), "the kills did not hit the save"


def test_after_a_kill_training_goes_on_to_the_same_weights(folder):
    """Killed in the middle of its third save, the run ends where an undisturbed one does."""
    whole = resume.train(folder / "whole", max_steps=6)
    output_folder.begin(str(folder / "run"), SCRIPT, ARGUMENTS, overwrite=False)

    def train():
        torch.set_num_threads(1)
        trainer = resume.trainer_in(folder / "run", max_steps=6)
        trainer.train()

    for share in (0.4, 0.75):
        try:
            calls = killing.run_and_kill(train, None)[1]
        except OSError as error:
            pytest.skip(f"{error}, so no process can be killed at a system call")
        shutil.rmtree(folder / "run")
        output_folder.begin(str(folder / "run"), SCRIPT, ARGUMENTS, overwrite=False)
        assert killing.run_and_kill(train, int(len(calls) * share))[0]
        found = claimed(folder / "run")
        assert found.verdict == "resume" and found.checkpoint[-1] in "2345"
        output_folder.begin(str(folder / "run"), SCRIPT, ARGUMENTS, overwrite=False)
        resumed = resume.train(folder / "run", Path(found.checkpoint), max_steps=6)
        assert resume.differences(whole, resumed) == []
        shutil.rmtree(folder / "run")
        output_folder.begin(str(folder / "run"), SCRIPT, ARGUMENTS, overwrite=False)
