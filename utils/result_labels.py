"""A run's figures in words: what each is called, how it is written, and which of two is the better one."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One of all_results.json. better: "low", "high" or "" where neither is."""

    key: str
    label: str
    write: Callable[[float], str]
    better: str = ""


def count(value: float) -> str:
    """12,345"""
    return f"{value:,.0f}"


def share(value: float) -> str:
    """12.34 %"""
    return f"{100 * value:.2f} %"


def size(value: float) -> str:
    """Bytes in binary units: 1.50 GiB"""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:,.2f} GiB"


def duration(seconds: float) -> str:
    """12.3 s, 4 min 5 s, 3 h 4 min or 2 d 3 h"""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {int(seconds) % 60} s"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def plain(value: object) -> str:
    """A value as a reader expects it: numbers with six digits and separators, switches as yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "–"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _four(value: float) -> str:
    return f"{value:.4f}"


def _three(value: float) -> str:
    return f"{value:,.3f}"


FIGURES = [
    Figure("eval_loss", "Evaluation loss", _four, "low"),
    Figure("perplexity", "Perplexity", _three, "low"),
    Figure("eval_accuracy", "Accuracy", share, "high"),
    Figure("train_loss", "Training loss (mean)", _four, "low"),
    Figure("fps", "Samples per second", _three, "high"),
    Figure("tokens_per_second", "Tokens per second", count, "high"),
    Figure("mfu", "Model FLOPs utilization", share, "high"),
    Figure("optimizer_share", "Time in the optimizer", share, "low"),
    Figure("data_wait", "Time waiting for data", share, "low"),
    Figure("train_runtime", "Training time", duration, "low"),
    Figure("train_peak_memory_bytes", "Peak memory", size, "low"),
    Figure("epoch", "Epochs", plain),
    Figure("data_tokens", "Tokens of training text", count),
    Figure("data_dropped_tokens", "of them in no sample", count),
    Figure("data_seconds", "Time to make token ids", duration),
    Figure("train_samples", "Training samples", count),
    Figure("eval_samples", "Evaluation samples", count),
]
BY_KEY = {figure.key: figure for figure in FIGURES}
# At the top of a report.
TILES = ("eval_loss", "perplexity", "eval_accuracy", "fps", "tokens_per_second", "mfu", "train_runtime", "train_peak_memory_bytes")  # fmt: skip
DATA = ("data_tokens", "data_dropped_tokens", "train_samples", "eval_samples", "data_seconds")


def written(results: dict, keys: tuple[str, ...] | None = None) -> list[tuple[str, str]]:
    """(label, value as text) of those figures that the results have, in the order above or of `keys`."""
    figures = FIGURES if keys is None else [BY_KEY[key] for key in keys]
    return [(f.label, f.write(results[f.key])) for f in figures if isinstance(results.get(f.key), int | float)]
