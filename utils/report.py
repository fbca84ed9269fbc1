"""What a run leaves for people to read: the results row, in results.md and at the end of the log."""

import os

import torch

from utils import device


def results_table(metrics: dict, on: torch.device, processes: int, level: str) -> str:
    """The results as a table in the form of Ascend's ModelZoo: device, accuracy, samples/s, precision level, epochs.

    metrics: those of all_results.json; what is missing shows as "-".
    """
    accuracy = metrics.get("eval_accuracy")
    fps = metrics.get("fps")
    epochs = metrics.get("epoch")
    cells = [
        device.display_name(on, processes),
        "-" if accuracy is None else f"{accuracy:.4f}",
        "-" if fps is None else f"{fps:.3f}",
        level,
        "-" if epochs is None else f"{epochs:g}",
    ]
    return "\n".join(
        [
            "| Device | Acc | FPS | AMP_Type | Epochs |",
            "|--------|-----|-----|----------|--------|",
            "| " + " | ".join(cells) + " |",
        ]
    )


def write_results(output_dir: str, table: str) -> None:
    """Writes <output_dir>/results.md."""
    with open(os.path.join(output_dir, "results.md"), "w", encoding="utf-8") as file:
        file.write(table + "\n")
