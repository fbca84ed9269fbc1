"""benchmarks/text_to_blocks.py: both sides run, have the same ids, and the text has no paragraph twice."""

import sys

from commands import run
from datasets import Dataset

from benchmarks import text_on_this_machine
from utils import tokenizer_training


def test_both_sides_run_and_have_the_same_ids(corpus, tmp_path):
    lines = (corpus / "train.txt").read_text().splitlines()
    tokenizer_training.train(Dataset.from_dict({"text": lines}), "bert", 400).save_pretrained(tmp_path)
    command = [sys.executable, "-m", "benchmarks.text_to_blocks", "--tokenizer", str(tmp_path), "--rounds", "1"]
    done = run([*command, "--text", str(corpus / "train.txt")], HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert "ids: the same" in done.stdout and "ratio of CPU time" in done.stdout


def test_the_text_has_no_paragraph_twice(tmp_path):
    total, sizes = text_on_this_machine.write(tmp_path / "text.txt", 0.2)
    lines = (tmp_path / "text.txt").read_text(encoding="utf-8").splitlines()
    assert 2e5 <= total == sum(sizes.values()) == (tmp_path / "text.txt").stat().st_size
    assert len(set(lines)) == len(lines) > 100


def test_markup_is_no_text(tmp_path):
    page = tmp_path / "a.1"
    page.write_text('.TH A 1\n\\" a remark\nUse\n.B \\-\\-all\nand more.\n.PP\nA second\n\\fBparagraph\\fR.\n')
    paragraphs = [" ".join(part.split()) for part in text_on_this_machine.manual_page(page)]
    assert [part for part in paragraphs if part] == ["Use --all and more.", "A second paragraph."]
    assert "".join(text_on_this_machine.of_html("<style>x</style><p>One &amp; two</p>")).strip() == "One & two"
    module = tmp_path / "a.py"
    module.write_text('def f():\n    """What\n\n    it does."""\n    return """no"""\n')
    assert [part.strip() for part in text_on_this_machine.docstrings(module)] == ["What", "it does."]
