"""Which of the packages named apex is installed, and what it can do. None is needed: precision levels are native here.

Three different programs carry the name, and two of them carry it in two forms:

    Ascend's apex     a patch of NVIDIA's for NPUs; `amp.initialize` knows `combine_grad`
    NVIDIA's apex     with `amp` until May 2025 (NVIDIA/apex#1896), without since
    apex 0.9.10dev    on the package index: a toolkit for web pages, which `pip install apex` brings
"""

from __future__ import annotations  # so that an old Python, too, is told of rather than failed by

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Apex:
    """The installed apex.

    kind: "none", "ascend", "nvidia", "nvidia-without-amp" or "unrelated".
    version: as its installer recorded it; None without a record, or without apex.
    folder: where it is; None without apex.
    """

    kind: str
    version: str | None = None
    folder: str | None = None

    @property
    def explanation(self) -> str:
        """What this apex is, for a person, in one line."""
        return {
            "none": "not installed, and not needed: O0 to O3 and combined gradients are native",
            "ascend": "Ascend's apex, with amp and combine_grad; not needed: both are native",
            "nvidia": "NVIDIA's apex, with amp but without combine_grad; not needed: both are native",
            "nvidia-without-amp": "NVIDIA's apex of May 2025 or later, which has no amp any more; not needed",
            "unrelated": "not the apex of mixed precision but another program of that name, from the package index",
        }[self.kind]


def installed() -> Apex:
    """The apex that `import apex` would load, recognised by its files: nothing of it is executed."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Apex("none")
    places = list(spec.submodule_search_locations or [])
    if not places:  # a single file apex.py
        return Apex("unrelated", _version(), spec.origin)
    folder = Path(places[0])
    return Apex(_kind(folder), _version(), str(folder))


def why_native(level: str, half_type: str | None, trains: bool, sharded: bool) -> str | None:
    """Why a run that asks for apex computes natively all the same, in one line; None if Ascend's apex can do it.

    level: "O0" to "O3". half_type: "fp16", "bf16" or None. trains: whether there is an optimizer to hand over.
    sharded: whether FSDP or DeepSpeed holds the weights.
    """
    apex = installed()
    if apex.kind != "ascend":
        return f"apex is {apex.explanation}"
    if half_type != "fp16" or level not in ("O1", "O2"):  # what its README lists as supported
        return f"Ascend's apex computes in float16, at O1 and O2; this run is {half_type or 'float32'} at {level}"
    if not trains:
        return "Ascend's apex trains; this run only evaluates"
    if sharded:
        return "Ascend's apex takes no weights that FSDP or DeepSpeed shards"
    return None


def _kind(folder: Path) -> str:
    frontend = folder / "amp" / "frontend.py"  # where amp.initialize is defined
    if frontend.is_file():
        return "ascend" if "combine_grad" in frontend.read_text(encoding="utf-8", errors="replace") else "nvidia"
    # What NVIDIA's apex imports first, before and after.
    if all((folder / part).is_dir() for part in ("optimizers", "normalization")):
        return "nvidia-without-amp"
    return "unrelated"


def _version() -> str | None:
    try:
        return importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        return None
