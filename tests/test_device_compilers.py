"""utils/device_compilers.py: what is missing is told before a run begins."""

import sysconfig
from types import SimpleNamespace

import pytest
import torch

from utils import device_compilers

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
NPU = SimpleNamespace(type="npu")  # what is read of a torch.device


def test_only_cuda_may_compile_by_itself():
    assert [device_compilers.may_pay(on) for on in (CPU, CUDA, NPU)] == [False, True, False]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "cudagraphs"])
def test_a_backend_without_kernels_of_its_own_needs_nothing(backend, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert device_compilers.missing(CPU, backend) is None


def test_inductor_needs_a_compiler_and_pythons_headers(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "needs a C++ compiler" in device_compilers.missing(CPU, "inductor")
    compiler = tmp_path / "g++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h" in device_compilers.missing(CPU, "inductor")
    (tmp_path / "Python.h").touch()
    assert device_compilers.missing(CPU, "inductor") is None


@pytest.mark.skipif(device_compilers.importlib.util.find_spec("triton") is not None, reason="triton is there")
def test_accelerators_need_triton():
    assert "install triton" in device_compilers.missing(CUDA, "inductor")
    assert "install triton-ascend" in device_compilers.missing(NPU, "inductor")


@pytest.mark.skipif(device_compilers.importlib.util.find_spec("torch_npu") is not None, reason="torch_npu is there")
def test_the_npu_backend_needs_torchair(monkeypatch, tmp_path):
    assert "torchair" in device_compilers.missing(NPU, "npu")
    (tmp_path / "torch_npu" / "dynamo" / "torchair").mkdir(parents=True)
    (tmp_path / "torch_npu" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert device_compilers.missing(NPU, "npu") is None
