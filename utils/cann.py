"""What this machine has of Ascend's software, told from its files: torch need not be importable.

torch loads torch_npu by itself wherever that is installed, and torch_npu needs the libraries of CANN. Where CANN's
set_env.sh has not been sourced, even `import torch` fails. This module knows the standard library only.
"""

from __future__ import annotations  # so that an old Python, too, is told of rather than failed by

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from utils.errors import one_line

# Where CANN's installers put set_env.sh: "cann" since 8.5, "ascend-toolkit" before and in Ascend's container images.
SET_ENV = ("cann/set_env.sh", "ascend-toolkit/set_env.sh")
ROOTS = ("/usr/local/Ascend", "~/Ascend")
DEFAULT_SET_ENV = "/usr/local/Ascend/ascend-toolkit/set_env.sh"

# The packages of TorchNPU 26.2.0, the CANN release that they are made for, and those that they work with.
# Source: the tables in TorchNPU 26.2.0's release notes, docs/zh/release_notes.md of the repository Ascend/pytorch.
RELEASE = ("2.7.1.post11", "2.9.0.post9", "2.10.0.post7", "2.11.0.post3", "2.12.0.post3", "2.13.0", "2.14.0")
MADE_FOR = "9.2.0"
WORKS_WITH = ("8.5", "9.0", "9.1", "9.2")


# ---- before torch is imported ----
def prepare_import(argv: Sequence[str], variables: dict[str, str]) -> bool:
    """Whether torch_npu is to be imported; to be called before torch is.

    argv: the command line. With --use_cpu torch_npu is hidden from torch, transformers and accelerate, all of which
        import it wherever it is installed: so a machine without CANN still trains on its CPU.
    variables: those that torch_npu reads; set where the user has not.
    """
    if "torch_npu" not in sys.modules and importlib.util.find_spec("torch_npu") is None:
        return False
    if sys.modules.get("torch_npu", "unset") is None:  # hidden already
        return False
    if asks_for_cpu(argv) and "torch_npu" not in sys.modules:
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        sys.modules["torch_npu"] = None  # type: ignore[assignment]  # what Python takes for "there is no such module"
        return False
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    return True


def asks_for_cpu(argv: Sequence[str]) -> bool:
    """Whether the command line, or the config file that it starts with, says --use_cpu (or its old name --no_cuda).

    The real parser is transformers', which cannot be imported before this is known.
    """
    said = re.search(r"\b(use_cpu|no_cuda)[\"']?\s*:\s*[\"']?(true|yes|on)\b", config_text(argv), re.IGNORECASE)
    answer = said is not None
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") not in ("__use_cpu", "__no_cuda"):
            continue
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        value = value if equals else "true" if following.startswith("--") else following
        answer = value.lower() in ("true", "t", "yes", "y", "1")
    return answer


def config_text(argv: Sequence[str]) -> str:
    """What stands in the config file that the command line starts with; nothing if it starts with none."""
    if (
        argv
        and argv[0].endswith((".json", ".yaml", ".yml"))
        and os.path.isfile(argv[0])
        and os.access(argv[0], os.R_OK)
    ):
        return Path(argv[0]).read_text(encoding="utf-8", errors="replace")
    return ""


def explain(error: BaseException) -> str:
    """One line for an import of torch or torch_npu that failed: what is missing and, after "; ", what to do."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = one_line(error)
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is missing; pip install -r requirements.txt"
    if "Two accelerators" in text:
        return (
            f"torch {version_of('torch')} is built for another accelerator, beside which torch_npu cannot be loaded; "
            "pip uninstall torch_npu, or install torch's CPU build for the NPU"
        )
    library = re.match(r"(lib[\w.-]+): cannot open shared object file", text)
    found = f"the library {library[1]} of CANN is not found" if library else text[:200]
    return (
        f"torch_npu is installed but cannot be loaded: {found}; run `source {set_env()}` first, or add --use_cpu to "
        "train on the CPU (python -m utils.doctor tells more)"
    )


# ---- what is installed ----
def version_of(package: str) -> str | None:
    """The version of an installed package, told without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def home() -> Path | None:
    """CANN's folder, as set_env.sh names it; None where that has not been sourced."""
    folder = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    return Path(folder) if folder else None


def set_env(roots: Sequence[str] = ROOTS) -> str:
    """The set_env.sh to source: the one of the CANN that is installed, else where it usually is."""
    candidates = [Path(root).expanduser() / script for root in roots for script in SET_ENV]
    if (installed := home()) is not None:
        candidates = [installed / "set_env.sh", installed.parent / "set_env.sh", *candidates]
    return next((str(path) for path in candidates if path.is_file()), DEFAULT_SET_ENV)


def is_installed(roots: Sequence[str] = ROOTS) -> bool:
    """Whether a CANN is installed where its installers put it, sourced or not."""
    return Path(set_env(roots)).is_file()


def version(folder: Path) -> str | None:
    """The CANN version in its folder, from the file that torch_npu reads it from too; None if there is none."""
    places = (f"{folder}/*-linux/ascend_*_install.info", f"{folder}/ascend_*_install.info")
    for path in sorted(path for place in places for path in glob(place)):
        if found := re.search(r"^version=(\S+)", Path(path).read_text(errors="replace"), re.MULTILINE):
            return found[1]
    return None


def driver_version(path: str = "/usr/local/Ascend/driver/version.info") -> str | None:
    """The version of the NPU's driver; None if it is not installed where its installer puts it."""
    if not os.path.isfile(path):
        return None
    found = re.search(r"^Version=(\S+)", Path(path).read_text(errors="replace"), re.MULTILINE)
    return found[1] if found else None


def device_files(folder: str = "/dev") -> list[str]:
    """The device files of NPUs, one for each that this machine or container may use."""
    return sorted(path for path in glob(f"{folder}/davinci*") if re.search(r"davinci\d+$", path))


def matches(torch_npu: str, cann: str) -> tuple[bool | None, str]:
    """(whether a torch_npu package works with a CANN release, in words); None if that is not known."""
    if torch_npu not in RELEASE:
        return None, f"which CANN torch_npu {torch_npu} is made for is not known here"
    if cann.startswith(MADE_FOR.rsplit(".", 1)[0] + "."):
        return True, f"the release that torch_npu {torch_npu} is made for"
    if cann.startswith(tuple(f"{release}." for release in WORKS_WITH)):
        return True, f"works with torch_npu {torch_npu}, which is made for CANN {MADE_FOR}"
    return False, f"torch_npu {torch_npu} is made for CANN {MADE_FOR} and works with {', '.join(WORKS_WITH)}"
