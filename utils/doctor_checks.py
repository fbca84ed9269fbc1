"""The doctor's checks of versions, driver, apex, data and hub: they read files or ask a socket, and import nothing."""

from __future__ import annotations  # so that an old Python, too, is told of rather than failed by

import os
import platform
import re
import shutil
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from utils import apex_backend, cann


@dataclass
class Line:
    """One line of the report. status: "ok", "warning" or "error"; remedy: what to do about it, empty if nothing."""

    status: str
    name: str
    finding: str
    remedy: str = ""


# ---- versions ----
def requirements(path: Path) -> dict[str, str]:
    """{package: versions} as a requirements file has them, e.g. {"transformers": ">=5.17,<6"}."""
    lines = re.findall(r"^([A-Za-z][\w-]*)([<>=!~][^\s#;]*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(lines)


def numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version: (2, 13, 0) of "2.13.0+cpu" and of "2.13"."""
    matched = re.match(r"\d+(?:\.\d+)*", version)
    assert matched is not None, version
    found = [int(part) for part in matched[0].split(".")]
    return tuple((found + [0, 0])[:3])


def misfit(version: str, wanted: str) -> str | None:
    """ "old" or "new" if a version is outside of e.g. ">=5.17,<6" or "==2.13.0"; None if it fits."""
    found = numbers(version)
    for part in wanted.split(","):
        matched = re.match(r"([<>=]=?)(.+)", part)
        assert matched is not None, wanted
        operator, bound = matched[1], numbers(matched[2])
        if operator in (">=", "==") and found < bound:
            return "old"
        if (operator == "==" and found > bound) or (operator == "<" and found >= bound):
            return "new"
    return None


def python_line() -> Line:
    version = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036  (what this line is there to tell)
        return Line("error", "Python", version, "install Python 3.11 or newer")
    return Line("ok", "Python", f"{version}, {sys.executable}")


def version_line(package: str, wanted: str) -> Line:
    """A package's version beside the one that the requirements name: too old is an error, too new is untested."""
    version = cann.version_of(package)
    if version is None:
        return Line("error", package, "not installed", "pip install -r requirements.txt")
    found = misfit(version, wanted)
    if found is None:
        return Line("ok", package, version)
    remedy = "pip install -r requirements.txt"
    if found == "old":
        return Line("error", package, f"{version} is older than {wanted}", remedy)
    return Line("warning", package, f"{version} is newer than {wanted}, which the tests prove", remedy)


def libraries_line(wanted: dict[str, str], code: int, _: str, error: str) -> Line:
    """All other packages of the requirements, and whether all of them can be imported."""
    others = {package: versions for package, versions in wanted.items() if package not in ("torch", "transformers")}
    lines = [version_line(package, versions) for package, versions in others.items()]
    for status in ("error", "warning"):
        bad = [f"{line.name} {line.finding}" for line in lines if line.status == status]
        if bad:
            return Line(status, "libraries", "; ".join(bad), "pip install -r requirements.txt")
    if code != 0:
        return Line("error", "libraries", f"cannot be imported: {error}", "pip install -r requirements.txt")
    told = [f"{package} {cann.version_of(package)}" for package in ("accelerate", "datasets", "tokenizers")]
    return Line("ok", "libraries", f"{', '.join(told)} and {len(others) - len(told)} more")


def torch_npu_line(package: str | None, torch: str | None) -> Line:
    """torch_npu's version, which must be that of torch."""
    if package is None:
        return Line("warning", "torch_npu", "not installed: NPUs are not used", "pip install -r requirements-npu.txt")
    if torch is not None and numbers(package) != numbers(torch):
        plain = ".".join(map(str, numbers(torch)))
        remedy = f"pip install torch_npu=={plain}, or the torch of requirements-npu.txt"
        return Line("error", "torch_npu", f"{package} does not match torch {torch}", remedy)
    return Line("ok", "torch_npu", package if torch is None else f"{package}, which matches torch {torch}")


# ---- driver ----
def driver_line(found: dict | None, nvidia: str = "/proc/driver/nvidia/version") -> Line:
    """The driver of the NPUs or GPUs.

    found: what utils.device_probe found; None if it failed.
    """
    npu, devices = cann.driver_version(), cann.device_files()
    if found is not None and found["kind"] == "npu":
        return Line("ok", "driver", f"NPU driver {npu or 'of unknown version'}, which answers")
    if npu is not None and not devices:
        remedy = "npu-smi info tells its state; in a container pass /dev/davinci* and /dev/davinci_manager in"
        return Line("error", "driver", f"NPU driver {npu}, but there is no device file /dev/davinci*", remedy)
    if npu is not None or devices:
        return Line("ok", "driver", f"NPU driver {npu or 'of unknown version'}, {len(devices)} device files")
    if cann.version_of("torch_npu") is not None:
        return Line("error", "driver", "no NPU driver is installed", "install Ascend's driver and firmware (HDK)")
    if not os.path.isfile(nvidia):
        return Line("ok", "driver", "none, and the CPU needs none")
    version = re.search(r"\s(\d+\.\d+[.\d]*)\s", Path(nvidia).read_text())
    finding = f"NVIDIA driver {version[1] if version else 'of unknown version'}"
    if found is not None and found["kind"] != "cuda":
        why = "torch is a build without CUDA" if not found["has_cuda_build"] else "torch finds no GPU"
        return Line("warning", "driver", f"{finding}, but {why}", "install a CUDA build of torch; see nvidia-smi")
    return Line("ok", "driver", finding)


def apex_line() -> Line:
    """Which apex is installed. None is needed, so none is an error."""
    apex = apex_backend.installed()
    if apex.kind == "unrelated":
        return Line("warning", "apex", apex.explanation, "pip uninstall apex")
    return Line("ok", "apex", f"{apex.version}: {apex.explanation}" if apex.version else apex.explanation)


# ---- data and hub ----
def cache_folder() -> Path:
    """Where the hub's libraries keep what they downloaded: HF_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{base}/huggingface").expanduser()


def data_line(path: str | None) -> Line:
    """The texts at `path`; without one the folder that prepared texts are kept in."""
    if path is not None:
        return _given_data_line(Path(path).expanduser())
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or cache_folder() / "datasets").expanduser()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return Line("error", "data folder", f"{folder} cannot be written", "set HF_HOME to a folder that can")
    free = shutil.disk_usage(existing).free / 2**30
    if free < 5:
        return Line("warning", "data folder", f"{folder} has {free:.1f} GiB free", "set HF_HOME to a larger disk")
    return Line("ok", "data folder", f"{folder}, {free:.0f} GiB free")


def _given_data_line(path: Path) -> Line:
    if not path.exists():
        return Line("error", "data folder", f"--data_path {path}: not there", "name the folder or file of your texts")
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    unreadable = [file for file in files if not os.access(file, os.R_OK)]
    if unreadable:
        return Line("error", "data folder", f"{unreadable[0]} cannot be read", "change its permissions")
    if not files:
        return Line("error", "data folder", f"--data_path {path}: holds no files", "put your texts there")
    size = sum(file.stat().st_size for file in files) / 2**20
    return Line("ok", "data folder", f"{path}, {len(files)} file{'s' * (len(files) != 1)}, {size:.1f} MiB")


def hub_line(timeout: float = 3) -> Line:
    """Whether names of models and datasets can be resolved: by the hub, or from the cache."""
    hub = Path(os.environ.get("HF_HUB_CACHE") or cache_folder() / "hub").expanduser()
    models, datasets = len(list(hub.glob("models--*"))), len(list(hub.glob("datasets--*")))
    cached = f"{models} models and {datasets} datasets in {hub}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Line("ok", "hub", f"offline, as HF_HUB_OFFLINE has it; {cached}")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    error = _ask(endpoint, timeout)
    if error is not None:
        remedy = "set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 to use the cache, or train on local files"
        return Line("warning", "hub", f"{endpoint} cannot be reached ({error}); {cached}", remedy)
    return Line("ok", "hub", f"{endpoint} answers; {cached}")


def _ask(endpoint: str, timeout: float) -> str | None:
    """Why an address does not answer within so many seconds; None if it does."""
    found: list[str | None] = [f"no answer within {timeout:g} seconds"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout).close()
            found[0] = None
        except urllib.error.HTTPError:
            found[0] = None  # an answer, if only to say no
        except (OSError, ValueError) as error:
            found[0] = str(getattr(error, "reason", None) or error)

    # In a thread that may be left behind: no time limit holds for the resolution of names.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return found[0]
