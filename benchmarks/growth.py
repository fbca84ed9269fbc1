"""How the cost of our training steps grows: with depth, width, length, batch and vocabulary, and with a second process.

    python -m benchmarks.growth --output FOLDER --plots docs/images --page docs/performance.md

GPT-2 of moderate size, combined gradients, in float32 unless --bf16 (O2) is given. Settings of a sweep take turns, each in a
process of its own. Two processes and one run run_clm.py on the sample corpus, a thread each, with the same batch for each
process: the efficiency is tokens per second of two by twice those of one. Prints tables in markdown, draws them, and puts
them into a page.

Each part that is measured is kept in FOLDER: the same command goes on with those that are left.
"""

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import growth_page, machine, page_parts, trainers
from benchmarks.compare import drive
from benchmarks.turns import Side, in_turns
from utils import device

ROOT = Path(__file__).resolve().parent.parent
# The setting from which each sweep departs in one thing.
BASE = {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 8192, "length": 256, "batch": 4}
SWEEPS = {
    "n_layer": (2, 4, 8, 16),
    "n_embd": (128, 256, 512, 768),
    "length": (512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16),
    "vocab_size": (2048, 8192, 32768, 50257),
}
TINY_SWEEPS = {
    "n_layer": (1, 2),
    "n_embd": (16, 32),
    "length": (8, 16),
    "batch": (1, 2),
    "vocab_size": (64, 128),
}  # to see that all works
TINY = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 64, "length": 8, "batch": 1}


def recipe(setting: dict, options: argparse.Namespace) -> trainers.Recipe:
    """Ours, on GPT-2 of this setting."""
    flags = {"use_combine_grad": True}
    if options.bf16:
        flags |= {"bf16": True, "fp16_opt_level": "O2"}
    shape = {name: setting[name] for name in ("n_layer", "n_embd", "n_head", "vocab_size")}
    return trainers.Recipe(
        is_ours=True,
        objective="clm",
        model="gpt2",
        batch=setting["batch"],
        length=setting["length"],
        rows=setting["batch"] * (options.steps * (options.rounds + 2) + 1),
        on_cpu=options.device == "cpu",
        flags=flags,
        overrides=",".join(f"{name}={value}" for name, value in shape.items()),
        log_steps=options.steps,
    )


def sweep(name: str, values: tuple, base: dict, options: argparse.Namespace) -> list[dict]:
    """What a step costs at each value of one setting; at long lengths the batch is one sequence."""
    settings = {value: base | {name: value} | ({"batch": 1} if name == "length" else {}) for value in values}
    sides = {value: Side(drive, (recipe(setting, options), options.steps, 1)) for value, setting in settings.items()}
    known = {value: side.hear() for value, side in sides.items()}
    for value, side in sides.items():
        known[value] |= side.ask("measure the peak")
    times = in_turns(sides, "train", options.rounds, 1)
    peaks = {value: side.ask("finish")["peak_bytes"] for value, side in sides.items()}
    for side in sides.values():
        side.end()
    measured = []
    for value, setting in settings.items():
        seconds = statistics.median(times[value])
        measured.append(
            {
                name: value,
                "step_seconds": seconds,
                "tokens_per_second": setting["batch"] * setting["length"] / seconds,
                "mfu": known[value]["step_flops"] / seconds / known[value]["peak_flops"],
                "peak_bytes": peaks[value],
                "parameters": known[value]["parameters"],
            }
        )
    return measured


def scaling(options: argparse.Namespace) -> list[dict]:
    """Tokens per second of run_clm.py in one process and in two, with combined gradients and without."""
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = [sys.executable, "-m", "utils.sample_corpus", "--output_dir", f"{folder}/corpus"]
        subprocess.run(corpus, cwd=ROOT, check=True, capture_output=True)
        for combined in (False, True):
            rates = [train(processes, combined, Path(folder), options) for processes in (1, 2)]
            efficiency = rates[1] / rates[0] / 2
            measured.append({"combined": combined, "one": rates[0], "two": rates[1], "efficiency": efficiency})
    return measured


def train(processes: int, combined: bool, folder: Path, options: argparse.Namespace) -> float:
    """Tokens per second, the better of two runs: other work on the machine only ever takes away."""
    size = "n_embd=32,n_layer=1,n_head=2,n_positions=64" if options.tiny else "n_embd=256,n_layer=4,n_head=4"
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    )
    words = ["run_clm.py", "--model_type", "gpt2", "--config_overrides", size, "--vocab_size", "1024"]
    words += ["--block_size", "64" if options.tiny else "256", "--train_file", folder / "corpus" / "train.txt"]
    words += ["--do_train", "--max_steps", 4 if options.tiny else 40, "--per_device_train_batch_size", 4]
    words += ["--save_strategy", "no", "--cache_dir", folder / "cache", *(["--use_combine_grad"] if combined else [])]
    words += ["--use_cpu"] if options.device == "cpu" else []
    rates = []
    for number in range(1 if options.tiny else 2):
        output = folder / f"{processes}-{combined}-{number}"
        command = [sys.executable, *launcher, *map(str, words), "--output_dir", str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
        rates.append(json.loads((output / "all_results.json").read_text())["tokens_per_second"])
    return max(rates)


def begin(options: argparse.Namespace) -> dict:
    """What has been measured before with the same settings, by part; {"parts": {}} and who measures without any."""
    measured_by = {
        "machine": machine.describe(torch.device(options.device)),
        "settings": {name: getattr(options, name) for name in ("device", "bf16", "steps", "rounds", "tiny")},
    }
    file = options.output / "growth.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if found and {name: found[name] for name in measured_by} != measured_by:
        sys.exit(f"error: --output {options.output}: holds figures of another machine or other settings; name another")
    return measured_by | {"date": str(datetime.date.today()), "command": options.command, "parts": {}} | found


def finish(found: dict, options: argparse.Namespace) -> None:
    """Writes what has been measured so far: growth.json, growth.md, the drawings and the part of a page."""
    order = [*SWEEPS, "processes"]
    found["parts"] = dict(sorted(found["parts"].items(), key=lambda part: order.index(part[0])))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "growth.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (options.output / "growth.md").write_text(growth_page.page(found), encoding="utf-8")
    plots = options.plots or options.output
    for name, rows in found["parts"].items():
        if name != "processes":
            growth_page.draw(name, rows, plots)
    if options.page is not None:
        pictures = os.path.relpath(plots, options.page.parent)
        text = options.page.read_text(encoding="utf-8")
        options.page.write_text(page_parts.put(text, "growth", growth_page.page(found, pictures)), encoding="utf-8")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=device.accelerator() or "cpu", help="cpu, or this machine's accelerator")
    parser.add_argument("--bf16", action="store_true", help="O2 in bfloat16")
    parser.add_argument("--sweeps", nargs="*", choices=[*SWEEPS, "processes"], default=[*SWEEPS, "processes"])
    parser.add_argument("--steps", type=int, default=1, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns that count")
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to see that all works")
    parser.add_argument("--output", type=Path, required=True, help="a folder for growth.json and growth.md")
    parser.add_argument("--plots", type=Path, help="a folder for the drawings; default: that of --output")
    parser.add_argument("--page", type=Path, help="a page of markdown that has a part for the figures")
    options = parser.parse_args(words)
    options.command = shlex.join(["python", "-m", "benchmarks.growth", *(sys.argv[1:] if words is None else words)])
    if options.page is not None:
        page_parts.put(options.page.read_text(encoding="utf-8"), "growth", "")  # before minutes are spent
    base, values = (TINY, TINY_SWEEPS) if options.tiny else (BASE, SWEEPS)
    found = begin(options)
    for name in options.sweeps:
        if name in found["parts"]:
            print(f"{name}: measured before", flush=True)
        elif name == "processes":
            found["parts"][name] = scaling(options)
        elif name in values:
            found["parts"][name] = sweep(name, values[name], base, options)
        finish(found, options)
    print(growth_page.page(found))


if __name__ == "__main__":
    main()
