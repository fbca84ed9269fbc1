"""What benchmarks/growth.py has measured, as tables, as drawings, and as a part of a page."""

import math
import statistics
from pathlib import Path

TITLES = {
    "n_layer": "Depth (layers)",
    "n_embd": "Width",
    "length": "Length (tokens of one sequence)",
    "batch": "Batch (sequences)",
    "vocab_size": "Vocabulary",
}


def exponent(rows: list[dict], name: str, key: str) -> float:
    """The p of key ~ name**p, fitted over all rows: 1 where cost grows in proportion, 2 where it grows by the square."""
    logs = [(math.log(row[name]), math.log(row[key])) for row in rows]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def table(name: str, rows: list[dict]) -> str:
    """A line for each value of one setting, and beneath it how the cost grows."""
    lines = [
        f"| {TITLES[name]} | Parameters | Step | Tokens/s | MFU | Peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row[name]:,} | {row['parameters'] / 1e6:.1f} M | {row['step_seconds']:.3f} s | "
            f"{row['tokens_per_second']:,.0f} | {row['mfu']:.2f} | {row['peak_bytes'] / 2**30:.2f} GiB |"
        )
    step, memory = (exponent(rows, name, key) for key in ("step_seconds", "peak_bytes"))
    lines += [
        "",
        f"Over this range a step grows as the setting to the power of {step:.2f}, peak memory to that of {memory:.2f}.",
    ]
    return "\n".join(lines)


def scaling_table(rows: list[dict]) -> str:
    lines = ["| Combined gradients | One process | Two processes | Efficiency |", "|---|---|---|---|"]
    for row in rows:
        said = "on" if row["combined"] else "off"
        lines.append(f"| {said} | {row['one']:.0f} tokens/s | {row['two']:.0f} tokens/s | {row['efficiency']:.2f} |")
    return "\n".join(lines)


def page(found: dict, pictures: str | None = None) -> str:
    """All parts in markdown. found: content of growth.json. pictures: the drawings' folder as the page names it."""
    parts = [f"{found['machine']}, {found['date']}: `{found['command']}`"]
    for name, rows in found["parts"].items():
        if name == "processes":
            parts.append(scaling_table(rows))
            continue
        parts.append(table(name, rows))
        if pictures is not None:
            parts.append(f"![Step time and peak memory by {TITLES[name].lower()}]({pictures}/{file_name(name)})")
    return "\n\n".join(parts) + "\n"


def file_name(name: str) -> str:
    return f"growth_{name}.svg"


def draw(name: str, rows: list[dict], folder: Path) -> None:
    """Step time and memory by one setting, as folder/growth_<setting>.svg. On white, for light pages and dark ones."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = name  # the same file for the same figures
    values = [row[name] for row in rows]
    figure, axes = pyplot.subplots(1, 2, figsize=(7, 2.8), layout="constrained", facecolor="white")
    for axis, key, unit, scale in zip(axes, ("step_seconds", "peak_bytes"), ("s", "GiB"), (1, 2**30), strict=True):
        axis.plot(values, [row[key] / scale for row in rows], marker="o")
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [f"{value:,}" for value in values])
        axis.minorticks_off()
        axis.set_xlabel(TITLES[name])
        axis.set_title(f"{'a step' if unit == 's' else 'peak memory'}, {unit}", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / file_name(name), metadata={"Date": None})
    pyplot.close(figure)
