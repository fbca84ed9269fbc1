"""The simulated NPU itself: what the other tests in this folder take for granted of it."""

import json
import os
import re
import sys

import pytest
from commands import ROOT, run
from small_runs import HERE, simulated

CHECKS = re.findall(r"^def check_(\w+)", (HERE / "simulator_checks.py").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def outcome() -> dict[str, str | None]:
    environment = simulated(devices=2)
    environment["PYTHONPATH"] += os.pathsep + os.pathsep.join([str(ROOT / "tests"), str(HERE)])
    done = run([sys.executable, str(HERE / "simulator_checks.py")], **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_simulated(outcome, check):
    failure = outcome[f"check_{check}"]
    assert failure is None, failure


@pytest.mark.parametrize(
    ("devices", "variables", "expected"),
    [
        (2, {}, "2 True npu"),
        (0, {}, "0 False None"),
        (4, {"ASCEND_RT_VISIBLE_DEVICES": "3,1"}, "2 True npu"),
        (2, {"ASCEND_RT_VISIBLE_DEVICES": "7"}, "0 False None"),
    ],
)
def test_a_simulated_machine_has_the_devices_it_is_told_to(devices, variables, expected):
    program = (
        "import torch, torch_npu\n"
        "found = torch.accelerator.current_accelerator(check_available=True)\n"
        "print(torch.npu.device_count(), torch.npu.is_available(), found)"
    )
    done = run([sys.executable, "-c", program], **simulated(devices, **variables))
    assert done.stdout.strip() == expected, done.stderr


def test_a_busy_simulated_device_gives_no_memory():
    """Busy is the physical device, whatever its number among those that are visible."""
    program = "import torch, torch_npu; torch.ones(2, device='npu:1'); torch.ones(2, device='npu:0')"
    variables = simulated(4, ASCEND_RT_VISIBLE_DEVICES="3,1", NPUSIM_BUSY="3")
    done = run([sys.executable, "-c", program], **variables)
    assert done.returncode == 1 and "RuntimeError: NPU out of memory" in done.stderr and "NPU 0" in done.stderr


def test_transformers_and_accelerate_take_the_simulated_device_for_an_npu():
    """Though torch_npu has no metadata: its version is asked of the module."""
    program = (
        "import torch\n"
        "from accelerate.utils import is_npu_available\n"
        "from transformers.utils import is_torch_npu_available\n"
        "from accelerate import PartialState\n"
        "print(is_npu_available(), is_torch_npu_available(), PartialState().device.type)"
    )
    done = run([sys.executable, "-c", program], **simulated())
    assert done.stdout.strip() == "True True npu", done.stderr


def test_without_the_simulators_folder_there_is_no_npu():
    """The tests beside these run without it: nothing here makes torch_npu importable for them."""
    done = run([sys.executable, "-c", "import importlib.util; print(importlib.util.find_spec('torch_npu'))"])
    assert done.stdout.strip() == "None"
    assert "torch_npu" not in sys.modules
