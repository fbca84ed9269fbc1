"""A real browser without a window: Chromium, if it is installed, opens a page and tells what it saw."""

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OWN = "not an origin"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]


@dataclass(frozen=True)
class Visit:
    """What a page came to: dom, its HTML after its scripts; console, their messages; requests, the addresses that the
    page asked for; screenshot, a PNG."""

    dom: str
    console: list[str]
    requests: list[str]
    screenshot: Path


def visit(page: Path, screenshot: Path, width: int = 1280, height: int = 1600, dark: bool = False) -> Visit:
    """Opens a file in a window of that many pixels."""
    with tempfile.TemporaryDirectory() as folder:
        net_log = Path(folder) / "net.json"
        done = subprocess.run(
            [
                CHROMIUM,
                *FLAGS,
                f"--user-data-dir={folder}/profile",
                f"--log-net-log={net_log}",
                f"--window-size={width},{height}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--screenshot={screenshot}",
                "--virtual-time-budget=10000",
                "--dump-dom",
                page.resolve().as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        console = re.findall(r"CONSOLE[:(].*", done.stderr)
        events = json.loads(net_log.read_text())["events"]
    # Chromium asks for things of its own; those have no origin.
    asked = [event["params"] for event in events if event.get("params", {}).get("initiator", OWN) != OWN]
    return Visit(done.stdout, console, sorted({request["url"] for request in asked}), screenshot)


def colours(picture: Path) -> set[tuple[int, int, int]]:
    """The colours of a screenshot's pixels: red, green, blue from 0 to 255."""
    image = Image.open(picture).convert("RGB")
    return {colour for _, colour in image.getcolors(maxcolors=image.width * image.height)}
