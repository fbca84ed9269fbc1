"""The log of calls, which tests read."""

import json
import os


def note(call: str, **values) -> None:
    """Appends {"call": call, **values} to the file named in APEX_STAND_IN_LOG."""
    path = os.environ.get("APEX_STAND_IN_LOG")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"call": call, **values}) + "\n")
