"""Compiles the simulated device and keeps the result, by content, outside the project's tree."""

import fcntl
import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent
MODULE = "npu_simulator"
# Nothing here is worth optimizing: the arithmetic is torch's.
FLAGS = ["-std=c++20", "-O0", "-w", "-fPIC", "-shared"]


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def cache_folder() -> Path:
    """The folder of this version of the sources, of torch and of Python."""
    import torch

    content = hashlib.sha256(f"{torch.__version__} {sys.version} {compiler()} {FLAGS}".encode())
    for path in source_files():
        content.update(path.read_bytes())
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "simulated-npu" / content.hexdigest()[:16]


def source_files() -> list[Path]:
    return sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])


def library() -> Path:
    """The compiled module; the first call compiles it, which takes 20 s or more, while calls beside it wait.

    Raises subprocess.CalledProcessError, the compiler's messages being on stderr; FileNotFoundError without a compiler.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{MODULE}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = folder / "unfinished.so"
            subprocess.run(command(unfinished), check=True)
            unfinished.replace(path)
    return path


def command(output: Path) -> list[str]:
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [*include_paths(), sysconfig.get_paths()["include"]]
    return [
        compiler(),
        *FLAGS,
        *(f"-I{folder}" for folder in includes),
        *(str(path) for path in source_files() if path.suffix == ".cpp"),
        *(word for folder in library_paths() for word in (f"-L{folder}", f"-Wl,-rpath,{folder}")),
        *("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
        *("-o", str(output)),
    ]


if __name__ == "__main__":
    print(library())
