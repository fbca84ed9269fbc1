"""The results row: device, accuracy, samples per second, precision level, epochs."""

import os

import torch

from utils import device


def cells(metrics: dict, on: torch.device, processes: int, level: str) -> list[str]:
    """The row, a text for each of published_results.HEADINGS. metrics: those of all_results.json; what is missing shows as "-"."""
    accuracy = metrics.get("eval_accuracy")
    fps = metrics.get("fps")
    epochs = metrics.get("epoch")
    return [
        device.display_name(on, processes),
        "-" if accuracy is None else f"{accuracy:.4f}",
        "-" if fps is None else f"{fps:.3f}",
        level,
        "-" if epochs is None else f"{epochs:g}",
    ]


def table(row: list[str]) -> str:
    """The row as a table in Markdown, in the form of Ascend's ModelZoo."""
    return "\n".join(
        [
            "| Device | Acc | FPS | AMP_Type | Epochs |",
            "|--------|-----|-----|----------|--------|",
            "| " + " | ".join(row) + " |",
        ]
    )


def write_results(output_dir: str, table: str) -> None:
    """Writes <output_dir>/results.md."""
    with open(os.path.join(output_dir, "results.md"), "w", encoding="utf-8") as file:
        file.write(table + "\n")
