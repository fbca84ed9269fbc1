"""What a run has left in its output folder, read back: arguments, log, results, and what its report needs besides."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UsageError

REPORT_FILE = "report.json"


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it. What it has not written is empty.

    name: the folder's. script, arguments, is_finished: of run.json. log: trainer_state.json's log_history. results: of
    all_results.json. record: of report.json, see report.record.
    """

    name: str
    script: str
    arguments: dict
    is_finished: bool
    log: list[dict]
    results: dict
    record: dict


def read(folder: str | Path) -> Run:
    """The run in an output folder. Raises UsageError if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name the output folder of a run")
    run, state = _read(folder / "run.json"), _read(folder / "trainer_state.json") or _newest_state(folder)
    if not run and not state:
        raise UsageError(f"{folder}: holds no run, neither run.json nor trainer_state.json; name its output folder")
    return Run(
        name=folder.resolve().name,
        script=run.get("script", ""),
        arguments=run.get("arguments", {}),
        is_finished=bool(run.get("finished")),
        log=state.get("log_history", []),
        results=_read(folder / "all_results.json"),
        record=_read(folder / REPORT_FILE),
    )


def text_source(arguments: Mapping) -> str | None:
    """Where the training text came from, else the validation text, in words. arguments: {flag: value}."""
    if arguments.get("dataset_name"):
        return " ".join(filter(None, (arguments["dataset_name"], arguments.get("dataset_config_name"))))
    files = arguments.get("train_file") or arguments.get("data_mix") or arguments.get("validation_file")
    return ", ".join(files) if files else None


def _newest_state(folder: Path) -> dict:
    """Of a run that has not come to its end: the log of its last checkpoint."""
    states = [_read(path) for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(states, key=lambda state: state.get("global_step", 0), default={})


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
