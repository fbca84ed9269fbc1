"""benchmarks/: each of them still runs, on models of no size, and tells a loss or a ratio that is not as it should be.

What is fast is not asked here. It is measured by hand: see docs/performance.md.
"""

import argparse
import json
import os
import subprocess

import pytest
import torch
from commands import ROOT

from benchmarks import async_save, baselines, compare, growth, growth_page, machine, page_parts, turns

TINY = {
    "clm": "n_layer=1,n_embd=16,n_head=2,vocab_size=64",
    "mlm": "num_hidden_layers=1,hidden_size=16,num_attention_heads=2,intermediate_size=32,vocab_size=64",
    "plm": "n_layer=1,d_model=16,n_head=2,d_inner=32,vocab_size=64",
}


pytestmark = pytest.mark.usefixtures("sides_that_start_quickly")


def tiny(objective: str) -> list[str]:
    words = ["--objective", objective, "--config_overrides", TINY[objective], "--length", "16", "--device", "cpu"]
    return [*words, "--rounds", "2", "--warm_up", "1", "--eval_rounds", "1", "--eval_batches", "1", "--combine_grad"]


@pytest.mark.parametrize("objective", TINY)
def test_compare_trains_and_evaluates_both_sides_with_equal_losses(objective, tmp_path, capsys):
    output = tmp_path / "result.json"
    assert compare.main([*tiny(objective), "--output", str(output)]) == 0, capsys.readouterr().err
    found = json.loads(output.read_text())
    own, stock = found["sides"]["ours"], found["sides"]["stock"]
    assert stock["first_loss"] == pytest.approx(own["first_loss"], rel=1e-5)
    assert len(own["losses"]) == len(stock["losses"]) == 3 and len(own["step_seconds"]) == 2
    assert own["step_flops"] == stock["step_flops"] > 0
    assert set(found["ratios"]["stock"]) == {"training", "evaluation", "memory"}
    assert output.with_suffix(".md").read_text().count("\n| ") == 3
    assert "| stock |" in capsys.readouterr().out


def test_growth_sweeps_one_setting_draws_it_and_goes_on_where_it_stood(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# Growth\n<!-- part growth -->\nold\n<!-- end of growth -->\nthe end\n")
    words = ["--device", "cpu", "--tiny", "--rounds", "1", "--sweeps", "n_layer", "--output", str(tmp_path / "out")]
    growth.main([*words, "--plots", str(tmp_path / "images"), "--page", str(page)])
    found = json.loads((tmp_path / "out" / "growth.json").read_text())
    rows = found["parts"]["n_layer"]
    assert [row["n_layer"] for row in rows] == [1, 2] and rows[1]["parameters"] > rows[0]["parameters"]
    assert (tmp_path / "images" / "growth_n_layer.svg").stat().st_size > 1000
    written = page.read_text()
    assert "| Depth (layers) |" in written and "(images/growth_n_layer.svg)" in written and "old" not in written
    assert written.startswith("# Growth\n") and written.endswith("the end\n")
    assert f"{os.cpu_count()} cores" in written and "python -m benchmarks.growth --device cpu --tiny" in written
    capsys.readouterr()
    growth.main(words)
    assert "n_layer: measured before" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        growth.main([*words, "--steps", "2"])


def test_each_setting_can_be_swept(tmp_path):
    options = argparse.Namespace(bf16=False, steps=1, rounds=3, device="cpu")
    for base, sweeps in ((growth.BASE, growth.SWEEPS), (growth.TINY, growth.TINY_SWEEPS)):
        assert list(sweeps) == list(growth_page.TITLES)
        for name, values in sweeps.items():
            recipes = [growth.recipe(base | {name: value}, options) for value in values]
            assert len({(r.overrides, r.batch, r.length) for r in recipes}) == len(values)
    longest = growth.recipe(growth.BASE | {"length": 4096}, options)
    assert longest.length == 4096 and "n_layer=4" in longest.overrides


def test_growth_trains_in_two_processes(corpus, tmp_path):
    (tmp_path / "corpus").symlink_to(corpus)
    assert growth.train(2, True, tmp_path, argparse.Namespace(tiny=True, device="cpu")) > 0


def test_efficiency_is_told_in_a_table():
    rows = [{"combined": True, "one": 100.0, "two": 180.0, "efficiency": 0.9}]
    assert "| on | 100 tokens/s | 180 tokens/s | 0.90 |" in growth_page.scaling_table(rows)


def grown(power: float) -> list[dict]:
    common = {"parameters": 1e6, "tokens_per_second": 1e3, "mfu": 0.5}
    sizes = (512, 1024, 4096)
    return [common | {"length": n, "step_seconds": n**power / 1e6, "peak_bytes": n * 1000} for n in sizes]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_power_of_growth_is_found(power):
    assert growth_page.exponent(grown(power), "length", "step_seconds") == pytest.approx(power)
    shown = growth_page.table("length", grown(power))
    assert f"the power of {power:.2f}, peak memory to that of 1.00" in shown and "| 4,096 |" in shown


def test_a_part_of_a_page_is_replaced_and_must_be_there():
    page = "before\n<!-- part a -->\nold\n<!-- end of a -->\nafter\n"
    assert page_parts.put(page, "a", "new") == "before\n<!-- part a -->\n\nnew\n\n<!-- end of a -->\nafter\n"
    assert page_parts.put(page_parts.put(page, "a", "new"), "a", "old") == page_parts.put(page, "a", "old")
    with pytest.raises(ValueError, match="no part b: add"):
        page_parts.put(page, "b", "new")
    for name, parts in {"performance": ["growth"], "scaling": ["prediction", "ninety", "published", "check"]}.items():
        page = (ROOT / "docs" / f"{name}.md").read_text()
        assert all("figures" in page_parts.put(page, part, "figures") for part in parts)


def test_the_machine_is_told_without_its_name(tmp_path):
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor : 0\nmodel name\t: A Processor 9000\n")
    assert machine.processor(str(listed)) == "A Processor 9000"
    assert machine.processor(str(tmp_path / "none")) == os.uname().machine
    assert os.uname().nodename not in machine.describe(torch.device("cpu")).split()


# ---- a side that fails ----
def fails(connection):
    connection.recv()
    raise RuntimeError("out of\nmemory")


def test_what_ends_a_side_is_told_in_one_line():
    side = turns.Side(fails, ())
    with pytest.raises(turns.SideFailed, match="RuntimeError: out of memory"):
        side.ask("train")
    with pytest.raises(turns.SideFailed, match="ended"):
        side.ask("train")


def test_a_side_that_fails_leaves_the_others_measured(capsys, tmp_path):
    options = compare.parse(tiny("clm"))
    recipes = compare.make_recipes(options)
    broken = compare.dataclasses.replace(recipes["stock"], flags={"optim": "no such optimizer"})
    found = compare.measure({"ours": recipes["ours"], "stock": broken}, options)
    assert "no such optimizer" in found["stock"]["error"]
    assert len(found["ours"]["evaluation_seconds"]) == 1
    assert compare.conclude(found, options, tmp_path) == 1
    assert "no such optimizer" in capsys.readouterr().err


# ---- what is concluded, of numbers made up ----
def side(step: float = 1.0, loss: float = 5.0, last: float = 4.0) -> dict:
    return {
        "first_loss": loss,
        "last_loss": last,
        "step_seconds": [step, step * 3, step],
        "evaluation_seconds": [step] * 3,
        "peak_bytes": int(step * 2**30),
        "step_flops": 1e9,
        "peak_flops": 1e11,
        "losses": [5.0, 4.0],
    }


def options(*words: str) -> argparse.Namespace:
    return compare.parse(["--device", "cpu", *words])


def test_save_then_check(tmp_path, capsys):
    assert compare.conclude({"ours": side(1.0), "stock": side(1.5)}, options("--save"), tmp_path) == 0
    assert compare.conclude({"ours": side(1.0), "stock": side(1.4)}, options("--check"), tmp_path) == 0
    assert compare.conclude({"ours": side(1.0), "stock": side(1.3)}, options("--check"), tmp_path) == 1
    assert "stock, training: 1.30 times, 1.50 before" in capsys.readouterr().err


def test_check_without_a_baseline_fails(tmp_path, capsys):
    assert compare.conclude({"ours": side(), "stock": side()}, options("--check"), tmp_path) == 1
    assert "--save writes one" in capsys.readouterr().err
    assert compare.conclude({"ours": side(), "stock": side()}, options(), tmp_path) == 0


@pytest.mark.parametrize(
    "processor, name",
    [
        ("AMD EPYC", "amd-epyc-2-cores.json"),
        ("Intel(R) Xeon(R) Platinum 8480C", "intel-xeon-platinum-8480c-2-cores.json"),
    ],
)
def test_each_processor_has_its_own_baselines(processor, name, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "processor", lambda: processor)
    monkeypatch.setattr(baselines.os, "cpu_count", lambda: 2)
    assert baselines.file_of(torch.device("cpu"), tmp_path) == tmp_path / name


def test_rows_are_kept_beside_each_other(tmp_path):
    file = baselines.file_of(torch.device("cpu"), tmp_path)
    for row in ("a", "b"):
        baselines.save(file, row, {"stock": {"training": 1.23456}})
    assert baselines.load(file) == {row: {"stock": {"training": 1.235}} for row in ("a", "b")}
    assert baselines.fallen(file, "a", {}) == ["a: stock, training: nothing was measured, 1.24 before"]


@pytest.mark.parametrize("wrong", [side(1.5, loss=5.001), side(1.5, last=4.4), side(1.5, last=float("nan"))])
def test_nobody_is_faster_by_being_wrong(wrong, tmp_path, capsys):
    assert compare.conclude({"ours": side(), "stock": wrong}, options("--save"), tmp_path) == 1
    assert "should be equal" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []  # and no baseline is made of it


def test_ratios_are_medians_of_rounds_in_turns():
    own, stock = side(1.0), side(2.0)
    own["step_seconds"], stock["step_seconds"] = [1.0, 10.0, 1.0], [2.0, 15.0, 1.8]
    assert compare.ratios_to_ours({"ours": own, "stock": stock})["stock"] == {
        "training": 1.8,
        "evaluation": 2.0,
        "memory": 2.0,
    }


def test_stock_has_its_best_flags_where_there_is_an_accelerator():
    recipes = compare.make_recipes(compare.parse(["--device", "cuda", "--fp16", "O2", "--combine_grad"]))
    assert recipes["ours"].flags == {
        "use_combine_grad": True,
        "torch_compile": False,
        "fp16": True,
        "fp16_opt_level": "O2",
    }
    assert recipes["stock"].flags == {"fp16": True}
    assert recipes["best"].flags == {"optim": "adamw_torch_fused", "torch_compile": True, "bf16": True}
    assert list(compare.make_recipes(options())) == ["ours", "stock"]


def test_gpu_session_has_the_rows_that_are_asked_of_a_gpu():
    session = (ROOT / "benchmarks" / "gpu_session.sh").read_text()
    assert subprocess.run(["bash", "-n", ROOT / "benchmarks" / "gpu_session.sh"]).returncode == 0
    for word in ("gpt2_8", "gpt2_32", "roberta_16", "roberta_64", "xlnet_16"):
        assert f"    {word}) rows " in session


def test_async_save_stalls_training_for_a_part_of_a_save(tmp_path):
    words = ["--device", "cpu", "--size", "tiny", "--rounds", "1", "--steps", "3", "--folder", str(tmp_path)]
    async_save.main([*words, "--output", str(tmp_path / "result.json")])
    found = json.loads((tmp_path / "result.json").read_text())
    assert 0 < found["stall_seconds"] < 60 and found["save_seconds"] > 0 and found["on_disk_seconds"] >= 0
    assert found["losses"]["async"] == found["losses"]["waited for"] != [0.0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
