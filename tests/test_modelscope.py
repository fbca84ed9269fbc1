"""utils/modelscope.py: --hub modelscope, by ModelScope's own library against a local stand-in of its HTTP interface."""

import re
import shutil

import pytest
from commands import ROOT, TINY_GPT2, one_error_line, results, run_script
from stand_in_modelscope import StandInModelScope

TEXT = "the old horse sat near the barn\n"


@pytest.fixture(scope="module")
def modelscope(tmp_path_factory, files):
    """Runs run_clm.py --hub modelscope where ModelScope has a tiny GPT-2, owner/tiny, and a text, owner/text."""
    pytest.importorskip("modelscope", reason="needs ModelScope's library: requirements-test.txt")
    folder = tmp_path_factory.mktemp("modelscope")
    model = folder / "models" / "owner" / "tiny"
    short = ["--do_train", "--max_steps", "1", "--use_cpu", "--output_dir", tmp_path_factory.mktemp("made") / "tiny"]
    run_script("run_clm.py", *TINY_GPT2, *files, *short)
    shutil.copytree(short[-1], model, ignore=shutil.ignore_patterns("checkpoint-*", "run.json"))
    text = folder / "datasets" / "owner" / "text"
    text.mkdir(parents=True)
    (text / "train.txt").write_text(TEXT * 300)
    (text / "validation.txt").write_text(TEXT * 60)

    with StandInModelScope(folder) as stand_in:

        def run(output_dir, *words, expect: int = 0):
            words = ("--hub", "modelscope", *words, "--do_eval", "--use_cpu", "--block_size", "16")
            environment = {"MODELSCOPE_ENDPOINT": stand_in.url, "MODELSCOPE_CACHE": str(folder / "cache")}
            return run_script("run_clm.py", *words, "--output_dir", output_dir, expect=expect, **environment)

        yield run


def test_model_and_text(modelscope, tmp_path) -> None:
    modelscope(tmp_path / "out", "--model_name_or_path", "owner/tiny", "--dataset_name", "owner/text")
    assert results(tmp_path / "out")["eval_loss"] > 0
    assert "owner/text" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_name_that_it_does_not_have(modelscope, tmp_path) -> None:
    words = ("--model_name_or_path", "owner/none", "--dataset_name", "owner/text")
    line = one_error_line(modelscope(tmp_path / "out", *words, expect=2))
    assert re.search(r"--model_name_or_path owner/none: ModelScope does not give it: .*owner/none not exists", line)
    assert "OWNER/NAME" in line


def test_without_its_library(tmp_path, files) -> None:
    (tmp_path / "modelscope.py").write_text("raise ImportError('no such library')\n")
    words = [*TINY_GPT2, *files, "--hub", "modelscope", "--do_train", "--output_dir", tmp_path / "out"]
    done = run_script("run_clm.py", *words, expect=2, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "pip install modelscope" in one_error_line(done)
