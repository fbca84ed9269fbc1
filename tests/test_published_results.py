"""The published figures that stand beside results are those of the README."""

from commands import ROOT

from utils import published_results


def test_published_figures_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for model in published_results.PUBLISHED:
        rows = published_results.rows_of(model)
        assert len(rows) == 4
        for row in rows:
            assert f"| {' | '.join(row)} |" in readme


def test_rows_of_a_model_by_any_of_its_names() -> None:
    assert published_results.rows_of("FacebookAI/roberta-base", 8)[0][:2] == ("8p-NPU(910ProB)", "0.6984")
    assert published_results.rows_of("./models/gpt2/") == published_results.rows_of("gpt2")
    assert published_results.rows_of("bert-base-uncased") == published_results.rows_of(None) == []
