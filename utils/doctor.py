"""Says whether this machine can train, in one screen: versions, driver, devices, libraries, data and hub.

python -m utils.doctor [--data_path PATH] [--json]

The exit code is 0 if it can (there may be warnings), 1 if something is in the way. Nothing beyond the standard library
is imported here: what may fail or hang runs in processes of its own, so that a broken torch is a line of the report.
"""

from __future__ import annotations  # so that an old Python, too, is told of rather than failed by

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils import cann
from utils.doctor_checks import (
    Line,
    apex_line,
    data_line,
    driver_line,
    hub_line,
    libraries_line,
    python_line,
    requirements,
    torch_npu_line,
    version_line,
)

ROOT = Path(__file__).resolve().parent.parent
# Seconds: a first operation on an NPU may compile; importing takes 2 s, on a cold disk many times that.
PROBE_TIMEOUT = 120
# Those of the libraries that do not import torch: that is the other process's part, at the same time.
IMPORT_LIBRARIES = "import transformers, datasets, tokenizers, safetensors, yaml, numpy, pandas, fsspec, zstandard"


def run(command: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, the last line of stderr) of a process; exit code -1 if it did not end in time."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):  # one process asks, whatever launcher this shell is of
        environment.pop(variable, None)
    try:
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=PROBE_TIMEOUT, env=environment
        )
    except subprocess.TimeoutExpired:
        return -1, "", f"no answer within {PROBE_TIMEOUT} seconds"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return done.returncode, done.stdout, lines[-1].strip() if lines else f"exit code {done.returncode}"


def examine(data_path: str | None) -> list[Line]:
    """All lines of the report, in the order in which one depends on another."""
    with ThreadPoolExecutor() as pool:
        probing = pool.submit(run, ["-m", "utils.device_probe"])
        importing = pool.submit(run, ["-c", IMPORT_LIBRARIES])
        asking = pool.submit(hub_line)
        code, output, error = probing.result()
        found = json.loads(output.splitlines()[-1]) if code == 0 else None
        wanted = requirements(ROOT / "requirements.txt")
        lines = [python_line(), torch_line(wanted["torch"], found, error)]
        lines += npu_lines(found)
        lines += [driver_line(found), *device_lines(found), apex_line()]
        lines += [version_line("transformers", wanted["transformers"])]
        lines += [libraries_line(wanted, *importing.result()), data_line(data_path), asking.result()]
    return lines


def torch_line(wanted: str, found: dict | None, error: str) -> Line:
    """torch's version, and whether it can be imported as the scripts import it."""
    line = version_line("torch", wanted)
    if found is not None or line.status == "error":
        return line
    _, ours, message = error.partition(": error: ")
    finding, remedy = error, "pip install -r requirements.txt"
    if ours:  # the one line of utils.device; otherwise the last one of a traceback
        finding, _, remedy = message.partition(" (python -m")[0].rpartition("; ")
    return Line("error", "torch", f"{line.finding}: {finding}", remedy)


def npu_lines(found: dict | None) -> list[Line]:
    """torch_npu and CANN; on a machine that has nothing of the kind, one line that says so."""
    package = cann.version_of("torch_npu")
    if package is None and found is not None and found["kind"] == "npu":
        return [Line("ok", "torch_npu", "of unknown version: a folder on Python's path, not installed")]
    if package is None and not cann.device_files() and cann.home() is None:
        return [Line("ok", "torch_npu", "not installed, and this machine has no NPU")]
    return [torch_npu_line(package, cann.version_of("torch")), cann_line(package, found)]


def cann_line(package: str | None, found: dict | None) -> Line:
    """Whether CANN is there, sourced, and of a release that suits torch_npu."""
    folder = cann.home()
    if folder is None:
        # Libraries may be found by other means, such as a container image's own settings.
        status = "error" if found is None else "warning"
        if cann.is_installed():
            return Line(status, "CANN", "installed but not sourced", f"source {cann.set_env()}")
        remedy = f"install CANN {cann.MADE_FOR}, then source {cann.set_env()}"
        return Line(status, "CANN", "not found where it is usually installed, and not sourced", remedy)
    if not folder.is_dir():
        return Line("error", "CANN", f"ASCEND_HOME_PATH={folder}: no such folder", f"source {cann.set_env()}")
    release = cann.version(folder)
    if release is None:
        return Line("warning", "CANN", f"of unknown version, at {folder}", "see that its toolkit package is installed")
    if package is None:
        return Line("ok", "CANN", f"{release}, at {folder}")
    suits, why = cann.matches(package, release)
    if suits:
        return Line("ok", "CANN", f"{release}, {why}")
    remedy = f"install CANN {cann.MADE_FOR}" if suits is False else "compare the tables of TorchNPU's release notes"
    return Line("warning", "CANN", f"{release}; {why}", remedy)


def device_lines(found: dict | None) -> list[Line]:
    """The devices with their memory, and what they communicate by."""
    if found is None:
        return [Line("error", "devices", "not known, since torch cannot be imported", "mend what stands above first")]
    if found["missing_npu"]:
        here = cann.device_files()
        if not here:
            return [
                Line(
                    "error",
                    "devices",
                    "torch_npu finds no NPU, and there is no device file /dev/davinci*",
                    "see the driver; in a container pass the devices in; to train on the CPU add --use_cpu",
                )
            ]
        remedy = "npu-smi info tells their state; see ASCEND_RT_VISIBLE_DEVICES; to train on the CPU add --use_cpu"
        return [Line("error", "devices", f"torch_npu finds no NPU, although {here[0]} is there", remedy)]
    kind, devices = found["kind"], found["devices"]
    names = sorted({device["name"] for device in devices})
    free, total = min(device["free"] for device in devices), min(device["total"] for device in devices)
    count = (
        f"CPU with {len(os.sched_getaffinity(0))} cores" if kind == "cpu" else f"{len(devices)} x {', '.join(names)}"
    )
    each = " each" if len(devices) > 1 else ""
    finding = f"{count}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free{each}"
    line = Line("ok", "devices", finding)
    if not found["computes"]:
        line = Line("error", "devices", f"{finding}; a product of matrices is wrong", "test the device and its driver")
    elif not found["shows_overflow"]:
        remedy = "train with --bf16 or a fixed --loss_scale; unset INF_NAN_MODE_ENABLE if it is 0"
        line = Line("warning", "devices", f"{finding}; float16 overflow is not seen: it gives 65504, not inf", remedy)
    elif free < total / 10:
        line = Line("warning", "devices", finding, "other processes hold the memory; end them, or use --device_id")
    name = {"hccl": "HCCL", "nccl": "NCCL"}.get(found["backend"], found["backend"])
    if found["has_backend"]:
        return [
            line,
            Line("ok", name, "for training on several devices" if kind != "cpu" else "for several processes"),
        ]
    return [
        line,
        Line("warning", name, "missing: one process can train, several cannot", "install a torch that has it"),
    ]


def show(lines: list[Line]) -> str:
    """The report as one screen of text."""
    width = max(len(line.name) for line in lines)
    rows = []
    for line in lines:
        rows.append(f"{line.status:8}{line.name:{width + 2}}{line.finding}")
        if line.remedy:
            rows.append(f"{'':{8 + width + 2}}→ {line.remedy}")
    return "\n".join([*rows, "", verdict(lines)])


def verdict(lines: list[Line]) -> str:
    """The last line: whether this machine can train."""
    errors = sum(line.status == "error" for line in lines)
    warnings = sum(line.status == "warning" for line in lines)
    told = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    return f"This machine {'cannot' if errors else 'can'} train: {told}."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m utils.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", help="A folder or file of texts that is to be trained on.")
    parser.add_argument("--json", action="store_true", help="The report for programs.")
    args = parser.parse_args()
    lines = examine(args.data_path)
    can_train = all(line.status != "error" for line in lines)
    if args.json:
        print(json.dumps({"can_train": can_train, "lines": [vars(line) for line in lines]}, indent=2))
    else:
        print(show(lines))
    sys.exit(0 if can_train else 1)


if __name__ == "__main__":
    main()
