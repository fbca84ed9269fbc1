"""The report of a run and the comparison of runs: what stands in them, and that a browser shows it without a network."""

import json
import logging
import re
import types

import browser
import numpy as np
import pytest
import vl_convert
from commands import TINY_GPT2, run_script

from utils import curves, past_run, report, report_page, result_labels, vega
from utils.errors import UsageError

in_a_browser = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="no Chromium here: install it (Debian: apt-get install chromium)"
)


def write_run(folder, entries: int = 40, learning_rate: float = 5e-5, loss: float = 3.0) -> None:
    """What a run of so many logged steps leaves in its folder."""
    folder.mkdir()
    log: list[dict] = []
    for step in range(1, entries + 1):
        falling = loss + 4 / step
        log.append(
            {"loss": falling, "learning_rate": learning_rate, "grad_norm": 1.0 + step % 7, "epoch": 1, "step": step}
        )
        if step % 10 == 0:
            log.append(
                {"eval_loss": falling, "eval_accuracy": step / 100, "eval_runtime": 2.0, "epoch": 1, "step": step}
            )
    results = {
        "eval_loss": loss,
        "eval_accuracy": 0.4,
        "perplexity": 20.1,
        "fps": 11.5,
        "train_runtime": 3723,
        "epoch": 3.0,
    }
    arguments = {"model_name_or_path": "gpt2", "dataset_name": "wikitext", "learning_rate": learning_rate}
    sample = {"prompt": "<b>Once", "continuation": " upon</b>", "text": " a time"}
    files = {
        "trainer_state.json": {"log_history": log},
        "all_results.json": results,
        "run.json": {"script": "run_clm.py", "arguments": arguments, "finished": True},
        "report.json": {"command": "python run_clm.py --do_train", "row": ["1p-CPU", "0.4000", "11.500", "O2", "3"],
                        "environment": {"torch": "2.13.0"}, "samples": [sample]},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "first")
    return tmp_path / "first"


# ---- curves ----
def test_a_long_curve_is_thinned_out_and_keeps_its_spikes() -> None:
    values = np.sin(np.arange(100_000) / 9e3)
    values[77_777], values[12_345] = 50, -50
    steps, means, low, high = curves.thin_out(np.arange(100_000), values)
    assert len(steps) == len(means) == len(low) == len(high) == curves.POINTS
    assert low.min() == -50 and high.max() == 50
    assert np.all(low <= means) and np.all(means <= high) and np.all(np.diff(steps) > 0)
    assert means[100] == pytest.approx(np.sin(steps[100] / 9e3), abs=1e-3)


def test_a_short_curve_is_drawn_as_it_is() -> None:
    steps, values, low, high = curves.thin_out(np.arange(7), np.arange(7.0))
    assert len(steps) == 7 and np.array_equal(values, np.arange(7.0)) and low is values is high


def test_every_figure_of_the_log_is_drawn() -> None:
    log = [
        {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1, "step": 1, "epoch": 0.5, "mfu": 0.4, "an_odd_figure": 3},
        {
            "loss": float("nan"),
            "grad_norm": float("inf"),
            "learning_rate": 0.1,
            "step": 2,
            "epoch": 1.0,
            "tag": "word",
        },
        {"eval_loss": 1.0, "eval_accuracy": 0.5, "eval_runtime": 9.0, "eval_samples_per_second": 4.0, "step": 2},
        {"train_runtime": 9.0, "train_loss": 3.0, "step": 2, "total_flos": 1e9},
    ]
    drawn = {picture.title: picture for picture in curves.pictures(log)}
    assert list(drawn) == [
        "Loss (nats per token)", "Perplexity", "Accuracy", "Learning rate", "Gradient norm", "Model FLOPs utilization",
        "An odd figure",
    ]  # fmt: skip
    training, evaluation = drawn["Perplexity"].curves
    assert training.values.tolist() == [pytest.approx(np.exp(2))] and evaluation.values.tolist() == [
        pytest.approx(np.e)
    ]


def test_a_scale_of_one_that_never_skips_is_not_drawn() -> None:
    log = [{"loss": 1.0, "loss_scale": 1.0, "skipped_steps": 0, "step": step} for step in (1, 2)]
    assert [picture.title for picture in curves.pictures(log)] == [
        "Loss (nats per token), training",
        "Perplexity, training",
    ]
    log[1] |= {"loss_scale": 0.5, "skipped_steps": 1}
    assert "Loss scale" in [picture.title for picture in curves.pictures(log)]


@pytest.mark.parametrize("entries", [1, 40, 1000])
def test_vega_lite_draws_what_is_specified(tmp_path, entries) -> None:
    write_run(tmp_path / "run", entries)
    pictures = curves.pictures(past_run.read(tmp_path / "run").log)
    assert len(pictures) >= 4
    for picture in pictures:
        specification = {**curves.specification(picture), "width": 300}
        drawn = vl_convert.vegalite_to_svg(specification)
        marks = re.findall(r'<path aria-label="([^"]*)"[^>]*d="M([^"]+)"', drawn)
        assert marks or entries == 1, picture.title
        assert "NaN" not in drawn


# ---- the page ----
def test_the_page_of_a_long_run_is_small(tmp_path) -> None:
    write_run(tmp_path / "long", 20_000)
    page = report.write(tmp_path / "long")
    assert page.stat().st_size < 1_200_000


def test_the_page_tells_of_the_run(folder) -> None:
    page = report.write(folder).read_text(encoding="utf-8")
    assert "<h1>gpt2</h1>" in page
    for told in ("python run_clm.py --do_train", "1 h 2 min", "40.00 %", "1p-NPU(910ProB)", "69.126", "2.13.0"):
        assert told in page, told
    assert "&lt;b&gt;Once<mark> upon&lt;/b&gt;</mark>" in page, "text of the corpus is no HTML"


def test_without_the_drawing_package_the_rest_is_told(folder, monkeypatch) -> None:
    monkeypatch.setattr(vega, "PACKAGE", "no-such-package")
    page = report.write(folder).read_text(encoding="utf-8")
    assert "Not drawn: no-such-package is not installed; pip install no-such-package." in page
    assert "69.126" in page and "vegaEmbed" not in page


def test_a_drawing_package_that_hangs_is_given_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(vega.NoVega, match="does not answer"):
        vega.script(timeout=0.01)


def test_a_failure_is_one_warning(folder, caplog) -> None:
    args = types.SimpleNamespace(output_dir=str(folder))
    with caplog.at_level(logging.INFO):
        report.write_after_training(types.SimpleNamespace(args=args), [], "")  # a trainer that has nothing else
    [record] = caplog.records
    assert record.levelname == "WARNING" and "report.html is not written" in record.message
    assert "\n" not in record.message


def test_an_unfinished_run_shows_its_last_checkpoint(tmp_path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "all_results.json").unlink()
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    (tmp_path / "run" / "trainer_state.json").unlink()
    for step in (9, 10):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        checkpoint.mkdir()
        content = {"global_step": step, "log_history": state["log_history"][:step]}
        (checkpoint / "trainer_state.json").write_text(json.dumps(content))
    assert len(past_run.read(tmp_path / "run").log) == 10
    assert report.write(tmp_path / "run").is_file()


@pytest.mark.parametrize("what", ["nothing", "empty"])
def test_a_folder_without_a_run_is_named(tmp_path, what) -> None:
    if what == "empty":
        (tmp_path / what).mkdir()
    with pytest.raises(UsageError, match=f"{what}: (no such folder|holds no run)"):
        past_run.read(tmp_path / what)


# ---- comparison ----
def test_runs_are_compared(folder, tmp_path) -> None:
    write_run(tmp_path / "second", learning_rate=1e-4, loss=2.5)
    runs = [past_run.read(folder), past_run.read(tmp_path / "second")]
    page = report_page.of_comparison(runs)
    assert re.search(r"Evaluation loss</th><td>3.0000</td><td class=\"best\">2.5000</td>", page)
    assert re.search(r"learning_rate</th><td>5e-05</td><td>0.0001</td>", page)
    assert "dataset_name" not in page, "what is the same in both"
    runs[1].log[:] = [entry for entry in runs[1].log if "eval_loss" not in entry]
    drawn = {picture.title: picture.curves for picture in report_page.beside_one_another(runs, ["first", "second"])}
    assert list(drawn)[:2] == ["Loss (nats per token), training", "Loss (nats per token), evaluation"]
    assert [curve.name for curve in drawn["Loss (nats per token), training"]] == ["first", "second"]
    assert [curve.name for curve in drawn["Loss (nats per token), evaluation"]] == ["first"]


def test_folders_of_one_name_are_told_apart(folder) -> None:
    run = past_run.read(folder)
    assert report_page.distinct_names([run, run]) == ["first (1)", "first (2)"]


def test_the_command_compares(folder, tmp_path) -> None:
    done = run_script("-m", "utils.report", folder, folder, "--output", tmp_path / "both.html")
    assert done.stdout.strip() == str(tmp_path / "both.html") and (tmp_path / "both.html").is_file()
    done = run_script("-m", "utils.report", folder, tmp_path / "none", expect=2)
    assert done.stderr.startswith("utils.report: error: ") and done.stderr.count("\n") == 1


# ---- figures and command ----
@pytest.mark.parametrize(
    ("seconds", "written"), [(0.25, "0.25 s"), (59.9, "59.9 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (2e5, "2 d 7 h")]
)  # fmt: skip
def test_durations(seconds, written) -> None:
    assert result_labels.duration(seconds) == written


def test_sizes() -> None:
    assert [result_labels.size(n) for n in (12, 2048, 3 * 2**20, 1536 * 2**20)] == [
        "12 B",
        "2 KiB",
        "3 MiB",
        "1.50 GiB",
    ]


# ---- in a browser ----
@in_a_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, True)])
def test_a_browser_shows_the_curves_and_asks_for_nothing(folder, tmp_path, width, dark) -> None:
    seen = browser.visit(report.write(folder), tmp_path / "seen.png", width, dark=dark)
    assert seen.console == [] and seen.requests == []
    pictures = curves.pictures(past_run.read(folder).log)
    for number in range(len(pictures)):
        curve = seen.dom.split(f'id="curve-{number}"')[1].split("</figure>")[0]
        lines = re.findall(
            r'aria-roledescription="line mark"[^>]*?d="(M[^"]+)"|d="(M[^"]+)"[^>]*stroke="var\(--curve', curve
        )
        assert any(len("".join(line).split("L")) >= 4 for line in lines), pictures[number].title
    colours = browser.colours(seen.screenshot)
    own = [(0x0A, 0x62, 0xC4), (0xFB, 0xFB, 0xF9)] if not dark else [(0x6C, 0xB3, 0xFF), (0x14, 0x17, 0x1B)]
    assert all(colour in colours for colour in own), "curves and page have the colours of their scheme"


@in_a_browser
def test_a_page_that_asks_for_something_is_found_out(tmp_path) -> None:
    (tmp_path / "page.html").write_text('<script>fetch("http://127.0.0.1:9/x"); console.error("no")</script>')
    seen = browser.visit(tmp_path / "page.html", tmp_path / "seen.png")
    assert seen.requests == ["http://127.0.0.1:9/x"] and "no" in seen.console[0]


# ---- a run ----
def test_a_run_writes_its_report(files, tmp_path) -> None:
    command = [
        *TINY_GPT2,
        "--vocab_size",
        "300",
        *files,
        "--max_steps",
        "3",
        "--logging_steps",
        "1",
        "--do_train",
        "--do_eval",
    ]
    done = run_script("run_clm.py", *command, "--token", "hf_secret", "--output_dir", tmp_path / "out", "--use_cpu")
    assert "report.html is not written" not in done.stdout
    record = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert record["command"].startswith("python run_clm.py --model_type gpt2") and "hf_secret" not in str(record)
    assert len(record["samples"]) == 3 and all(sample["continuation"] for sample in record["samples"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h1>gpt2 from scratch</h1>" in page and "not finished" not in page and "hf_secret" not in page
