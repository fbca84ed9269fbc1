"""--async_save: what is written in the background is what would have been written at once."""

import shutil

import pytest
import resume


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
