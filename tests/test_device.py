"""What differs between devices: chosen, configured, seeded and measured, on the device that this machine has."""

import json
import logging
import os
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
import transformers
from commands import TINY_GPT2, run, run_script

from utils import cann, device

HERE = torch.device(device.accelerator() or "cpu")


# ---- memory, seeds, names ----
MEASURE = """
import json, torch
from utils import device

on = torch.device(device.accelerator() or "cpu")
device.reset_peak_memory(on)
figures = [device.memory(on)]
block = torch.ones(64 << 20, dtype=torch.float32, device=on)  # 256 MiB
figures.append(device.memory(on))
del block
device.empty_cache(on)
figures.append(device.memory(on))
print(json.dumps(figures))
"""


def test_memory_figures():
    """On any device: a peak that rises by what is allocated, and stays. In a process of its own: a CPU's peak is that
    of all tests before."""
    done = run([sys.executable, "-c", MEASURE])
    before, during, after = json.loads(done.stdout)
    assert 200 << 20 <= during["peak"] - before["peak"] <= 320 << 20
    assert after["peak"] >= during["peak"] - (1 << 20)  # Linux counts pages in batches
    for figures in (before, during, after):
        assert 0 <= figures["peak"] and 0 < figures["free"] <= figures["total"]
        assert figures["total"] == before["total"] >= 1 << 30


def test_seeds_give_the_draws_of_transformers_set_seed():
    def draws() -> list:
        import random

        on_device = torch.rand(4, device=HERE).tolist()
        return [random.random(), numpy.random.rand(), torch.rand(4).tolist(), on_device]

    transformers.set_seed(7)
    wanted = draws()
    device.seed_all(7)
    assert draws() == wanted
    device.seed_all(8)
    assert draws() != wanted


def test_backends_and_names():
    assert [device.backend(torch.device(kind)) for kind in ("cpu", "cuda")] == ["gloo", "nccl"]
    assert device.BACKENDS["npu"] == "hccl"  # torch.device("npu") is a word of torch_npu
    assert device.describe(torch.device("cpu")) == "CPU"
    assert device.count() >= 1 and device.describe(HERE)
    assert device.shows_overflow(HERE)


# ---- an NPU's settings ----
NPU = SimpleNamespace(type="npu")  # what is read of a torch.device


def test_a_torch_npu_that_lacks_a_setting_is_told_in_the_debug_log(monkeypatch, caplog):
    seen = {}
    older = SimpleNamespace(set_compile_mode=lambda jit_compile: seen.update(jit_compile=jit_compile))
    monkeypatch.setattr(device, "torch_npu", SimpleNamespace(npu=older))
    with caplog.at_level(logging.DEBUG, logger="utils.device"):
        device.configure(NPU)
    assert seen == {"jit_compile": False}
    assert "set_internal_format: this torch_npu has no such setting" in caplog.text
    assert device.shows_overflow(NPU)


def test_settings_reach_torch_npu(monkeypatch):
    npu = SimpleNamespace(config=SimpleNamespace(), set_compile_mode=lambda **settings: vars(npu).update(settings))
    monkeypatch.setattr(device, "torch_npu", SimpleNamespace(npu=npu))
    device.configure(NPU)
    assert (npu.jit_compile, npu.config.allow_internal_format) == (False, False)
    device.configure(NPU, jit_compile=True, internal_format=True)
    assert (npu.jit_compile, npu.config.allow_internal_format) == (True, True)


# ---- before torch is imported ----
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--use_cpu"], True),
        (["--use-cpu"], True),
        (["--use_cpu", "True", "--bf16"], True),
        (["--use_cpu=1"], True),
        (["--no_cuda"], True),
        (["--use_cpu", "false"], False),
        (["--use_cpu", "--use_cpu=false"], False),
        (["--output_dir", "use_cpu"], False),
        ([], False),
    ],
)
def test_who_asks_for_the_cpu(words, wanted):
    assert cann.asks_for_cpu(words) is wanted
    assert cann.asks_for_cpu(["--seed", "1", *words]) is wanted


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("c.json", '{"seed": 1, "use_cpu": true}', True),
        ("c.yaml", "seed: 1\nuse_cpu: yes\n", True),
        ("c.yml", "no_cuda: True\n", True),
        ("c.json", '{"use_cpu": false, "bf16": true}', False),
        ("c.yaml", "not_use_cpu: true\n", False),
    ],
)
def test_who_asks_for_the_cpu_in_a_file(name, text, wanted, tmp_path):
    (tmp_path / name).write_text(text)
    assert cann.asks_for_cpu([str(tmp_path / name)]) is wanted
    assert cann.asks_for_cpu([str(tmp_path / name), "--use_cpu", "false"]) is False


def stand_in(folder, source: str) -> dict[str, str]:
    """The environment of a process that finds a torch_npu of this source, which torch loads by itself."""
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(source)
    record = folder / "torch_npu-2.13.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (record / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return {"PYTHONPATH": str(folder)}


TELL = "import os; print('variables', [os.environ.get(v) for v in {names}]); _autoload = lambda: None\n"


def test_variables_are_set_before_torch_npu_is_imported(tmp_path):
    names = sorted(device.NPU_VARIABLES)
    environment = stand_in(tmp_path, TELL.format(names=names))
    command = [sys.executable, "-c", "import utils.device"]
    done = run(command, **environment)
    assert f"variables {[device.NPU_VARIABLES[name] for name in names]}" in done.stdout, done.stderr
    done = run(command, **environment, TASK_QUEUE_ENABLE="0")
    kept = [{**device.NPU_VARIABLES, "TASK_QUEUE_ENABLE": "0"}[name] for name in names]
    assert f"variables {kept}" in done.stdout, "what the user exports wins"


@pytest.mark.skipif(device.torch_npu is not None, reason="torch_npu is there")
def test_no_variable_is_set_without_torch_npu():
    assert not cann.prepare_import([], {"A_VARIABLE_OF_AN_NPU": "1"}) and "A_VARIABLE_OF_AN_NPU" not in os.environ


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "raise ImportError('libascendcl.so: cannot open shared object file: No such file')",
            "libascendcl.so of CANN",
        ),
        (
            "raise Exception('ASCEND_OPP_PATH environment variable is not set.')",
            "ASCEND_OPP_PATH environment variable",
        ),
        ("raise RuntimeError('Two accelerators cannot be used at the same time')", "pip uninstall torch_npu"),
        ("import a_package_that_is_not_there", "the package a_package_that_is_not_there is missing"),
    ],
)
def test_a_torch_npu_that_cannot_be_loaded_is_told_in_one_line(source, words, tmp_path):
    done = run_script("run_clm.py", "--help", expect=2, **stand_in(tmp_path, source))
    [line] = done.stderr.splitlines()
    assert line.startswith("run_clm.py: error: ") and words in line


def test_an_npu_that_is_not_found_is_told(tmp_path):
    """torch_npu is there and works, but finds no device: nobody trains on a CPU for days without having been told."""
    source = "import types\nnpu = types.SimpleNamespace(is_available=lambda: False)\n_autoload = lambda: None\n"
    environment = stand_in(tmp_path, source)
    words = [*TINY_GPT2, "--train_file", "README.md", "--do_train", "--output_dir", tmp_path / "out"]
    done = run_script("run_clm.py", *words, expect=2, ASCEND_RT_VISIBLE_DEVICES="3", **environment)
    [line] = done.stderr.splitlines()
    assert "finds no NPU (ASCEND_RT_VISIBLE_DEVICES is 3)" in line and "--use_cpu" in line


def test_nothing_is_missing_where_there_is_no_torch_npu():
    assert device.torch_npu is not None or device.missing_npu() is None


def test_the_launcher_tells_how_many_processes_share_a_host(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert device.local_process_count() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert device.local_process_count() == 8
