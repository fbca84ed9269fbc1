"""What was measured before, by device, and whether a ratio has fallen since."""

import json
import os
import re
from pathlib import Path

import torch

from benchmarks import machine
from utils import device

FOLDER = Path(__file__).parent / "baselines"
TOLERANCE = 0.1  # of a baseline: what a busy machine takes away


def file_of(on: torch.device, folder: Path = FOLDER) -> Path:
    """The file of this machine's device: amd-epyc-2-cores.json, nvidia-h100-80gb-hbm3.json."""
    name = f"{machine.processor()} {os.cpu_count()} cores" if on.type == "cpu" else device.describe(on)
    words = re.findall("[a-z0-9]+", re.sub(r"\((r|tm)\)", " ", name.lower()))
    return folder / f"{'-'.join(words)}.json"


def load(file: Path) -> dict:
    """{row: {side: {"training": ratio, "evaluation": ratio}}}."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def save(file: Path, row: str, ratios: dict) -> None:
    """Writes a row's ratios beside those of other rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = load(file) | {row: {side: {kind: round(r, 3) for kind, r in of.items()} for side, of in ratios.items()}}
    file.write_text(json.dumps(dict(sorted(content.items())), indent=2) + "\n", encoding="utf-8")


def fallen(file: Path, row: str, ratios: dict) -> list[str]:
    """What is more than TOLERANCE below its baseline or missing, a line each."""
    baseline = load(file).get(row)
    if baseline is None:
        return [f"{file.name} has no baseline of {row!r}: --save writes one"]
    complaints = []
    for side, of in baseline.items():
        for kind, before in of.items():
            now = ratios.get(side, {}).get(kind)
            if now is None:
                complaints.append(f"{row}: {side}, {kind}: nothing was measured, {before:.2f} before")
            elif now < before * (1 - TOLERANCE):
                complaints.append(f"{row}: {side}, {kind}: {now:.2f} times, {before:.2f} before")
    return complaints
