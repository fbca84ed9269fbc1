"""The library that draws a report's curves in the reader's browser: Vega, as one script that stands in the page.

vl-convert-python brings it. It is asked in a process of its own: what it runs on, a JavaScript engine, can take no run
with it, whatever happens to it.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from utils import cann, doctor_checks

PACKAGE = "vl-convert-python"
MAKE = "import sys, vl_convert; sys.stdout.buffer.write(vl_convert.javascript_bundle().encode())"


class NoVega(Exception):
    """Why there is no script, in one line."""


def script(timeout: float = 120) -> str:
    """vegaEmbed and all that it needs, about 0.9 MB of JavaScript. Made once for each version, in some seconds, then kept.

    timeout: seconds. Raises NoVega.
    """
    version = cann.version_of(PACKAGE)
    if version is None:
        raise NoVega(f"{PACKAGE} is not installed; pip install {PACKAGE}")
    kept = doctor_checks.cache_folder() / "report" / f"vega-embed-of-vl-convert-{version}.js"
    try:
        return kept.read_text(encoding="utf-8")
    except OSError:
        made = _make(timeout)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first: several runs may end at once.
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=kept.parent, delete=False) as file:
            file.write(made)
        Path(file.name).replace(kept)
    except OSError:
        pass  # made anew the next time
    return made


def _make(timeout: float) -> str:
    try:
        done = subprocess.run([sys.executable, "-c", MAKE], capture_output=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoVega(f"{PACKAGE} does not answer: {error}") from error
    text = done.stdout.decode("utf-8", errors="replace")
    if done.returncode or "vegaEmbed" not in text:
        why = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise NoVega(f"{PACKAGE} fails: {why[0]}")
    return text.replace("</script", "<\\/script")
