"""The doctor says whether this machine can train, also where something is missing."""

import http.server
import importlib.metadata
import json
import platform
import socket
import sys
import threading

import pytest
from commands import ROOT, run

from utils import apex_backend, cann, doctor, doctor_checks


def ask(*flags, timeout: float = 120, **environment) -> tuple[int, dict]:
    """(exit code, {name: line}) of `python -m utils.doctor --json`, offline."""
    done = run([sys.executable, "-m", "utils.doctor", "--json", *map(str, flags)], timeout, **environment)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["can_train"] is (done.returncode == 0)
    return done.returncode, {line["name"]: line for line in report["lines"]}


def distribution(folder, package: str, version: str, source: str = "") -> None:
    """Installs a package of one file into a folder, as far as metadata and import tell."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(source)
    record = folder / f"{package}-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


# ---- as a user sees it ----
def test_one_screen_on_a_machine_that_can_train():
    done = run([sys.executable, "-m", "utils.doctor"])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()
    assert len(rows) < 25 and rows[-1].startswith("This machine can train: 0 errors")
    lines = [row for row in rows[:-2] if not row.startswith(" ")]
    assert all(row.split()[0] in ("ok", "warning") for row in lines)
    start = lines[0].index(platform.python_version())
    assert all(row[start - 1] == " " and row[start] != " " for row in lines), "the findings stand in one column"
    for name in ("Python", "torch", "torch_npu", "driver", "devices", "gloo", "apex", "transformers", "hub"):
        assert any(row.split()[1] == name for row in lines), name
    assert f"torch         {importlib.metadata.version('torch')}" in done.stdout


def test_json_says_the_same():
    code, lines = ask()
    assert code == 0 and {line["status"] for line in lines.values()} <= {"ok", "warning"}
    assert lines["transformers"]["finding"] == importlib.metadata.version("transformers")
    assert "GiB free" in lines["devices"]["finding"] and "GiB free" in lines["data folder"]["finding"]
    assert lines["hub"]["finding"].startswith("offline, as HF_HUB_OFFLINE has it")


def test_a_broken_torch_is_a_line_of_the_report(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libsomething.so.1: undefined symbol: of_another_build')")
    code, lines = ask(PYTHONPATH=str(tmp_path))
    assert code == 1
    assert lines["torch"]["status"] == "error" and "undefined symbol: of_another_build" in lines["torch"]["finding"]
    assert lines["devices"]["status"] == "error"
    assert lines["apex"]["status"] == "ok" and lines["Python"]["status"] == "ok", "what does not need torch is told"


def test_a_torch_that_hangs_does_not_hang_the_doctor(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT", 1)
    assert doctor.run(["-m", "utils.device_probe"]) == (-1, "", "no answer within 1 seconds")


def test_an_old_transformers_is_an_error_and_a_new_one_a_warning(tmp_path):
    distribution(tmp_path / "old", "transformers", "4.57.1")
    code, lines = ask(PYTHONPATH=str(tmp_path / "old"))
    assert code == 1 and lines["transformers"]["finding"] == "4.57.1 is older than >=5.17,<6"
    assert lines["transformers"]["remedy"] == "pip install -r requirements.txt"
    distribution(tmp_path / "new", "transformers", "6.0.0")
    code, lines = ask(PYTHONPATH=str(tmp_path / "new"))
    assert code == 0 and lines["transformers"]["status"] == "warning"


def test_a_library_that_cannot_be_imported(tmp_path):
    (tmp_path / "tokenizers.py").write_text("raise ImportError('not for this processor')")
    code, lines = ask(PYTHONPATH=str(tmp_path))
    assert code == 1 and "not for this processor" in lines["libraries"]["finding"]


# ---- versions ----
@pytest.mark.parametrize(
    ("version", "wanted", "expected"),
    [
        ("5.17.0", ">=5.17,<6", None),
        ("5.16.9", ">=5.17,<6", "old"),
        ("6.0.0", ">=5.17,<6", "new"),
        ("2.13.0+cpu", "==2.13.0", None),
        ("2.13", "==2.13.0", None),
        ("2.12.1", "==2.13.0", "old"),
        ("2.13.1", "==2.13.0", "new"),
        ("1.15.0.dev0", ">=1.15,<2", None),
    ],
)
def test_versions_are_compared(version, wanted, expected):
    assert doctor_checks.misfit(version, wanted) == expected


def test_requirements_are_read_as_they_stand():
    wanted = doctor_checks.requirements(ROOT / "requirements.txt")
    assert wanted["torch"].startswith("==") and {"transformers", "accelerate", "datasets", "tokenizers"} <= set(wanted)
    assert all(doctor_checks.misfit("99999", versions) in ("new", None) for versions in wanted.values())


@pytest.mark.parametrize(
    ("cann_version", "suits"),
    [("9.2.0", True), ("9.1.0", True), ("8.5.0", True), ("8.3.RC1", False), ("10.0.0", False)],
)
def test_cann_releases(cann_version, suits):
    assert cann.matches("2.13.0", cann_version)[0] is suits
    assert cann.matches("2.99.0", cann_version) == (None, "which CANN torch_npu 2.99.0 is made for is not known here")


def test_the_pinned_torch_npu_is_one_whose_cann_is_known():
    pinned = doctor_checks.requirements(ROOT / "requirements-npu.txt")["torch_npu"].removeprefix("==")
    assert pinned in cann.RELEASE
    torch = doctor_checks.requirements(ROOT / "requirements.txt")["torch"].removeprefix("==")
    assert doctor_checks.torch_npu_line(pinned, torch).status == "ok"


def test_a_torch_npu_of_another_torch():
    line = doctor_checks.torch_npu_line("2.12.0.post3", "2.13.0+cpu")
    assert line.status == "error" and "torch_npu==2.13.0" in line.remedy
    assert doctor_checks.torch_npu_line("2.13.0.post1", "2.13.0+cpu").status == "ok"


# ---- Ascend's files ----
def install_cann(folder, version: str = "9.2.0"):
    place = folder / "cann" / "x86_64-linux"
    place.mkdir(parents=True)
    (folder / "cann" / "set_env.sh").write_text("")
    info = f"package_name=Ascend-cann-toolkit\nversion={version}\ninnerversion=V100R001\narch=x86_64\n"
    (place / "ascend_toolkit_install.info").write_text(info)
    return folder / "cann"


def test_what_cann_says_of_itself(tmp_path, monkeypatch):
    for variable in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert not cann.is_installed([str(tmp_path)])
    folder = install_cann(tmp_path, "8.3.RC1")
    assert cann.is_installed([str(tmp_path)]) and cann.home() is None
    assert cann.set_env([str(tmp_path)]) == str(folder / "set_env.sh")
    assert cann.version(folder) == "8.3.RC1"
    monkeypatch.setenv("ASCEND_HOME_PATH", str(folder))
    assert cann.home() == folder and cann.set_env([]) == str(folder / "set_env.sh")


def test_driver_and_device_files(tmp_path):
    (tmp_path / "version.info").write_text("Version=25.2.0\nascendhal_version=7.35.23\n")
    assert cann.driver_version(str(tmp_path / "version.info")) == "25.2.0"
    assert cann.driver_version(str(tmp_path / "none")) is None
    for name in ("davinci0", "davinci1", "davinci_manager", "devmm_svm"):
        (tmp_path / name).write_text("")
    assert [path[-8:] for path in cann.device_files(str(tmp_path))] == ["davinci0", "davinci1"]


@pytest.mark.parametrize(
    ("version", "status", "words"),
    [
        ("9.2.0", "ok", "the release that torch_npu 2.13.0 is made for"),
        ("8.3.RC1", "warning", "works with 8.5, 9.0, 9.1, 9.2"),
    ],
)
def test_the_line_of_cann(version, status, words, tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(install_cann(tmp_path, version)))
    line = doctor.cann_line("2.13.0", {})
    assert (line.status, line.name) == (status, "CANN") and words in line.finding and version in line.finding
    assert (line.remedy == "") is (status == "ok")


def test_cann_variables_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "gone"))
    line = doctor.cann_line("2.13.0", None)
    assert line.status == "error" and "no such folder" in line.finding and "set_env.sh" in line.remedy


# ---- devices ----
NPU = {
    "torch": "2.13.0",
    "has_cuda_build": False,
    "kind": "npu",
    "devices": [{"name": "Ascend910B3", "peak": 0, "free": 60 << 30, "total": 64 << 30}] * 8,
    "backend": "hccl",
    "has_backend": True,
    "shows_overflow": True,
    "missing_npu": None,
    "computes": True,
}


def test_eight_npus():
    devices, hccl = doctor.device_lines(NPU)
    assert (devices.status, devices.finding) == ("ok", "8 x Ascend910B3, 60.0 of 64.0 GiB free each")
    assert (hccl.status, hccl.name) == ("ok", "HCCL")
    assert doctor_checks.driver_line(NPU).status == "ok"


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"computes": False}, "error", "a product of matrices is wrong"),
        ({"shows_overflow": False}, "warning", "float16 overflow is not seen"),
        ({"devices": [{"name": "A", "free": 1 << 30, "total": 64 << 30}]}, "warning", "1.0 of 64.0 GiB"),
        ({"missing_npu": "torch_npu finds no NPU"}, "error", "torch_npu finds no NPU"),
        ({"has_backend": False}, "warning", "several cannot"),
    ],
)
def test_devices_that_cannot_train_well(change, status, words):
    lines = doctor.device_lines(NPU | change)
    [bad] = [line for line in lines if line.status != "ok"]
    assert bad.status == status and words in bad.finding and bad.remedy


def test_an_nvidia_driver_beside_a_torch_without_cuda(tmp_path):
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n")
    line = doctor_checks.driver_line(NPU | {"kind": "cpu"}, str(version))
    assert line.status == "warning" and "550.54.14, but torch is a build without CUDA" in line.finding
    assert doctor_checks.driver_line(NPU | {"kind": "cuda"}, str(version)).finding == "NVIDIA driver 550.54.14"


# ---- apex ----
FRONTEND = "def initialize(models, optimizers=None, opt_level='O1', loss_scale=None{more}):\n    ...\n"
LAYOUTS = {
    "ascend": {
        "amp/frontend.py": FRONTEND.format(more=", combine_grad=None"),
        "optimizers/": "",
        "normalization/": "",
    },
    "nvidia": {"amp/frontend.py": FRONTEND.format(more=""), "optimizers/": "", "normalization/": ""},
    "nvidia-without-amp": {"optimizers/": "", "normalization/": "", "contrib/": ""},
    "unrelated": {"models.py": "", "views.py": "", "lib/": "", "ext/": ""},
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_apex_is_recognised_without_being_run(kind, tmp_path, monkeypatch):
    distribution(tmp_path, "apex", "0.1", "raise RuntimeError('it was imported')")
    for name, content in LAYOUTS[kind].items():
        path = tmp_path / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    found = apex_backend.installed()
    assert (found.kind, found.version, found.folder) == (kind, "0.1", str(tmp_path / "apex"))
    line = doctor_checks.apex_line()
    assert (line.status == "ok") is (kind != "unrelated") and found.explanation in line.finding


def test_no_apex_is_needed(monkeypatch, tmp_path):
    assert apex_backend.installed() == apex_backend.Apex("none") and doctor_checks.apex_line().status == "ok"
    (tmp_path / "apex.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert apex_backend.installed().kind == "unrelated"


# ---- data and hub ----
def test_the_data_folder(tmp_path):
    assert doctor_checks.data_line(str(tmp_path / "gone")).status == "error"
    assert "holds no files" in doctor_checks.data_line(str(tmp_path)).finding
    (tmp_path / "a.txt").write_text("text\n" * 300_000)
    line = doctor_checks.data_line(str(tmp_path))
    assert (line.status, line.finding) == ("ok", f"{tmp_path}, 1 file, 1.4 MiB")
    code, lines = ask("--data_path", tmp_path / "gone")
    assert code == 1 and lines["data folder"]["status"] == "error"


def test_a_cache_that_does_not_exist_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "yet"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    assert doctor_checks.data_line(None).finding.startswith(str(tmp_path / "not" / "yet" / "datasets"))


def test_the_hub(tmp_path, monkeypatch):
    for folder in ("models--gpt2", "models--bert", "datasets--wikitext"):
        (tmp_path / "hub" / folder).mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for variable in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # refuses HEAD: an answer
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    line = doctor_checks.hub_line()
    assert line.status == "ok" and line.finding.endswith(f"answers; 2 models and 1 datasets in {tmp_path / 'hub'}")
    server.shutdown()
    server.server_close()
    line = doctor_checks.hub_line()
    assert line.status == "warning" and "Connection refused" in line.finding and "HF_HUB_OFFLINE=1" in line.remedy


def test_a_hub_that_takes_the_connection_and_is_silent(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        line = doctor_checks.hub_line(timeout=0.2)
    assert line.status == "warning" and ("0.2 seconds" in line.finding or "timed out" in line.finding)
