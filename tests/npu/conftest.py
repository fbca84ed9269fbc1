"""Fixtures of the tests on the simulated NPU. They are skipped where there is no C++ compiler."""

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import pytest
from small_runs import SIMULATOR


@pytest.fixture(scope="session", autouse=True)
def simulator() -> Path:
    """The compiled device, from the cache if these sources were compiled before; workers wait for each other."""
    spec = importlib.util.spec_from_file_location("simulator_build", SIMULATOR / "torch_npu" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    if shutil.which(build.compiler()) is None:
        pytest.skip(f"the simulated NPU needs a C++ compiler: there is no {build.compiler()}")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        pytest.skip("the simulated NPU needs Python's headers: there is no Python.h (python3-dev)")
    return build.library()
