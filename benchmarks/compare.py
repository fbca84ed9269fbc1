"""transformers' Trainer and ours in turns, in fresh processes: training and evaluation, memory, and the losses of both.

    python -m benchmarks.compare --objective clm --model gpt2 --batch 2 --length 512 --combine_grad
    python -m benchmarks.compare --objective mlm --model roberta-base --batch 16 --length 512 --fp16 O2 --combine_grad

Sides: "ours" has the flags given here; "stock" the original command's (--fp16 or --bf16, else none) and today's defaults:
fused AdamW and SDPA; "best", where it differs, has its best flags: --bf16 and --torch_compile on an accelerator.

A ratio is the median over rounds of a side's time by ours in the same round. MFU is told of the model's own FLOPs, equal
for all sides. Losses: that of the first weights on equal inputs must be equal, that after training close.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import TrainerCallback

from benchmarks import baselines, machine, trainers
from benchmarks.turns import Side, SideFailed, in_turns
from utils import device, flops, host_memory

MODEL_OF = {"clm": "gpt2", "mlm": "roberta-base", "plm": "xlnet-base"}
# Relative differences of the probe's loss. The first weights are equal, so only rounding differs, in half precision more;
# after some steps dropout and what was hidden have been drawn differently.
SAME, SAME_IN_HALF, CLOSE = 1e-5, 1e-2, 0.03


class Gate(TrainerCallback):
    """Lets the training loop go on for `steps` steps for each "train" that comes, and answers with the seconds of a step."""

    def __init__(self, connection: Connection, steps: int, on: torch.device):
        self.connection = connection
        self.steps = steps
        self.on = on

    def on_train_begin(self, args, state, control, **_):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.steps:
            return
        device.synchronize(self.on)
        self.connection.send((time.perf_counter() - self.start) / self.steps)
        control.should_training_stop = self.connection.recv() != "train"
        self.start = time.perf_counter()


def drive(recipe: trainers.Recipe, steps: int, eval_batches: int, connection: Connection) -> None:
    """A side's process: tells of itself, trains by turns, tells what became of it, evaluates by turns."""
    trainer, probe = trainers.make(recipe)
    on = trainer.args.device
    counted = flops.count_model_flops(trainer.model)
    connection.send(
        {
            "first_loss": probe(),
            "step_flops": counted(recipe.batch, recipe.length) if counted is not None else None,
            "parameters": trainer.model.num_parameters(),
        }
    )
    word = connection.recv()
    if word == "measure the peak":  # when no other side is at work
        precision = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else torch.float32
        connection.send({"peak_flops": device.peak_flops(on, precision)[0]})
        word = connection.recv()
    assert word == "train"
    device.reset_peak_memory(on)
    trainer.add_callback(Gate(connection, steps, on))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    connection.send({"peak_bytes": device.peak_memory(on), "losses": losses, "last_loss": probe()})
    samples = torch.utils.data.Subset(trainer.eval_dataset, range(eval_batches * recipe.batch))
    while connection.recv() == "evaluate":
        device.synchronize(on)
        start = time.perf_counter()
        trainer.evaluate(samples)
        device.synchronize(on)
        connection.send((time.perf_counter() - start) / eval_batches)


def measure(recipes: dict[str, trainers.Recipe], options: argparse.Namespace) -> dict[str, dict]:
    """{side: what was measured, or {"error": why not}}. A side that fails does not keep the others from being measured."""
    sides: dict[str, Side] = {}
    found: dict[str, dict] = {name: {} for name in recipes}

    def only_alive(action) -> None:
        for name in list(sides):
            try:
                found[name] |= action(sides[name])
            except SideFailed as failure:
                found[name] = {"error": str(failure)}
                sides.pop(name).end()

    def turns(word: str, rounds: int, warm_up: int) -> dict[str, list]:
        while sides:
            try:
                return in_turns(sides, word, rounds, warm_up)
            except SideFailed:
                only_alive(lambda side: {} if side.process.is_alive() else side.hear())
        return {}

    for name, recipe in recipes.items():
        # Our scripts ask torch for huge pages; the stock ones do not.
        environment = {} if recipe.is_ours else dict.fromkeys(host_memory.TORCH_VARIABLES, "0")
        sides[name] = Side(drive, (recipe, options.steps, options.eval_batches), environment)
    only_alive(Side.hear)
    only_alive(lambda side: side.ask("measure the peak"))
    for name, seconds in turns("train", options.rounds, options.warm_up).items():
        found[name]["step_seconds"] = seconds
    only_alive(lambda side: side.ask("finish"))
    for name, seconds in turns("evaluate", options.eval_rounds, 1).items():
        found[name]["evaluation_seconds"] = seconds
    for side in sides.values():
        side.end()
    return found


def ratios_to_ours(found: dict[str, dict]) -> dict[str, dict[str, float]]:
    """{stock side: {"training", "evaluation": the median of its rounds' ratios, "memory": of peaks}}; > 1 where ours wins."""
    ratios: dict[str, dict[str, float]] = {}
    own = found["ours"]
    for name, side in found.items():
        if name == "ours" or "error" in side or "error" in own:
            continue
        ratios[name] = {
            kind: statistics.median(a / b for a, b in zip(side[times], own[times], strict=True))
            for kind, times in (("training", "step_seconds"), ("evaluation", "evaluation_seconds"))
        }
        ratios[name]["memory"] = side["peak_bytes"] / own["peak_bytes"]
    return ratios


def differing_losses(found: dict[str, dict], in_half: bool) -> list[str]:
    """Where a side has another loss than ours, a line each."""
    complaints = []
    own = found["ours"]
    for name, side in found.items():
        for kind, tolerance in (("first_loss", SAME_IN_HALF if in_half else SAME), ("last_loss", CLOSE)):
            if kind in side and kind in own and not abs(side[kind] - own[kind]) <= tolerance * abs(own[kind]):
                complaints.append(f"{name}: {kind} {side[kind]:.6f}, ours {own[kind]:.6f}: they should be equal")
    return complaints


def table(found: dict[str, dict], ratios: dict, tokens: int) -> str:
    """In markdown, a line for each side."""
    lines = [
        "| Side | Step | Ratio | Tokens/s | MFU | Peak memory | Evaluation | Ratio | First loss | Last loss |",
        "|------|------|-------|----------|-----|-------------|------------|-------|------------|-----------|",
    ]
    for name, side in found.items():
        if "error" in side:
            lines.append(f"| {name} | {side['error']} |" + " - |" * 8)
            continue
        step, evaluation = (statistics.median(side[f"{kind}_seconds"]) for kind in ("step", "evaluation"))
        mfu = f"{side['step_flops'] / step / side['peak_flops']:.3f}" if side["step_flops"] else "-"
        of = ratios.get(name, {"training": 1.0, "evaluation": 1.0})
        lines.append(
            f"| {name} | {step:.4f} s | {of['training']:.2f} | {tokens / step:.0f} | {mfu} | "
            f"{side['peak_bytes'] / 2**30:.2f} GiB | {evaluation:.4f} s | {of['evaluation']:.2f} | "
            f"{side['first_loss']:.5f} | {side['last_loss']:.5f} |"
        )
    return "\n".join(lines)


def make_recipes(options: argparse.Namespace) -> dict[str, trainers.Recipe]:
    on_cpu = options.device == "cpu"
    half = "fp16" if options.fp16 else "bf16" if options.bf16 else None
    own: dict = {"use_combine_grad": options.combine_grad, "torch_compile": options.torch_compile}
    if half is not None:
        own |= {half: True, "fp16_opt_level": options.fp16 or options.bf16}
    best: dict = {"optim": "adamw_torch_fused", "torch_compile": options.torch_compile if on_cpu else True}
    if half is not None:
        best["bf16"] = True
    flags = {"ours": own, "stock": {half: True} if half is not None else {}, "best": best}
    if on_cpu and half is None and not options.torch_compile:
        del flags["best"]  # which is what stock has by default
    base = trainers.Recipe(
        is_ours=False,
        objective=options.objective,
        model=options.model or MODEL_OF[options.objective],
        batch=options.batch,
        length=options.length,
        rows=options.batch * max(options.steps * (options.rounds + options.warm_up) + 1, options.eval_batches),
        on_cpu=on_cpu,
        overrides=options.config_overrides,
        log_steps=options.steps,
    )
    return {
        name: dataclasses.replace(base, is_ours=name == "ours", flags=flags[name])
        for name in flags
        if name == "ours" or name in options.against
    }


def row_name(options: argparse.Namespace) -> str:
    """What a baseline is kept under."""
    parts = [options.objective, options.model or MODEL_OF[options.objective], f"{options.batch}x{options.length}"]
    parts += [f"{half} {getattr(options, half)}" for half in ("fp16", "bf16") if getattr(options, half)] or ["fp32"]
    parts += [name for name in ("combine_grad", "torch_compile") if getattr(options, name)]
    return " ".join([*parts, options.config_overrides]).strip()


def conclude(found: dict[str, dict], options: argparse.Namespace, folder: Path = baselines.FOLDER) -> int:
    """Prints the table, writes what is asked for, and returns the exit code: 1 if something is not as it should be."""
    ratios = ratios_to_ours(found)
    row, on = row_name(options), torch.device(options.device)
    shown = table(found, ratios, options.batch * options.length)
    made = f"{machine.describe(on)}, {datetime.date.today()}"
    print(f"{row} on {made}\n\n{shown}\n")
    if options.output:
        content = {"row": row, "machine": made, "options": vars(options), "sides": found, "ratios": ratios}
        Path(options.output).write_text(json.dumps(content, indent=2), encoding="utf-8")
        Path(options.output).with_suffix(".md").write_text(f"{row}\n\n{made}\n\n{shown}\n", encoding="utf-8")
    complaints = [f"{name}: {side['error']}" for name, side in found.items() if "error" in side]
    complaints += differing_losses(found, bool(options.fp16 or options.bf16))
    if options.check:
        complaints += baselines.fallen(baselines.file_of(on, folder), row, ratios)
    elif options.save and not complaints:
        baselines.save(baselines.file_of(on, folder), row, ratios)
    for complaint in complaints:
        print(f"error: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=list(MODEL_OF), default="clm")
    parser.add_argument("--model", choices=list(trainers.MODELS), help="default: GPT-2, RoBERTa-base or XLNet-base")
    parser.add_argument("--config_overrides", default="", help="e.g. n_layer=2,n_embd=64")
    parser.add_argument("--device", default=device.accelerator() or "cpu", help="cpu, or this machine's accelerator")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    levels = ["O1", "O2", "O3"]
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--fp16", choices=levels, nargs="?", const="O2", help="ours at this level in float16")
    half.add_argument("--bf16", choices=levels, nargs="?", const="O2", help="ours at this level in bfloat16")
    parser.add_argument("--combine_grad", action="store_true")
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--against", nargs="*", choices=["stock", "best"], default=["stock", "best"])
    parser.add_argument(
        "--steps", type=int, help="of a turn; default 1 on a CPU, else 10, so that the host runs ahead"
    )
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side that count")
    parser.add_argument("--warm_up", type=int, default=2, help="turns before")
    parser.add_argument("--eval_batches", type=int, default=16)
    parser.add_argument("--eval_rounds", type=int, default=4)
    parser.add_argument("--output", help="write the result here, as JSON, and beside it the table as .md")
    parser.add_argument("--save", action="store_true", help="keep the ratios as this device's baseline")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if a ratio is more than a tenth below its baseline"
    )
    options = parser.parse_args(words)
    options.steps = options.steps or (1 if options.device == "cpu" else 10)
    return options


def main(words: list[str] | None = None, folder: Path = baselines.FOLDER) -> int:
    options = parse(words)
    return conclude(measure(make_recipes(options), options), options, folder)


if __name__ == "__main__":
    sys.exit(main())
