"""How training scales over devices: predicted for 8, 64 and 512 of them, and checked with two processes here.

    python -m benchmarks.scaling --output FOLDER [--write docs/scaling.md]

Measured here: how long forward, backward and optimizer take and when in backward each bucket of gradients is full, of GPT-2
and RoBERTa-base in their real size, by one thread. From that, the gradients' bytes, the links' speeds (benchmarks/links.py)
and the time of a step on one device comes the time of a step on many, bucket by bucket (benchmarks/overlap.py).

The check: the same model predicts two processes of this machine, joined by gloo, whose link is measured first; then they
train, in turns with one process of one thread and with two that are not joined, with combined gradients and without.
"""

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
from pathlib import Path

import torch

from benchmarks import machine, page_parts, prediction, trainers, two_processes
from benchmarks.overlap import simulate
from benchmarks.turns import in_turns
from benchmarks.two_processes import MeasuredLink, Profile

SMALL = "n_layer=4,n_embd=256,n_head=4,vocab_size=8192"
TINY = "n_layer=1,n_embd=16,n_head=2,vocab_size=64"
CHECKED = (1, prediction.DEFAULT_MEGABYTES)  # megabytes of a bucket


# ---- recipes ----
def real_models(options: argparse.Namespace) -> list[trainers.Recipe]:
    """Those of prediction.MODELS in their size, with a batch that one thread can take."""
    shrunk = {"gpt2": TINY, "roberta-base": "num_hidden_layers=1,hidden_size=16,num_attention_heads=2,vocab_size=64"}
    return [
        trainers.Recipe(
            is_ours=True,
            objective=objective,
            model=model,
            batch=1,
            length=16 if options.tiny else 256,
            rows=4,
            on_cpu=True,
            flags={"use_combine_grad": True},
            overrides=shrunk[model] if options.tiny else "",
        )
        for model, (objective, _, _) in prediction.MODELS.items()
    ]


def small_model(options: argparse.Namespace) -> trainers.Recipe:
    """What two processes here train."""
    return trainers.Recipe(
        is_ours=True,
        objective="clm",
        model="gpt2",
        batch=1 if options.tiny else options.batch,
        length=8 if options.tiny else options.length,
        rows=64,
        on_cpu=True,
        flags={"use_combine_grad": True},
        overrides=TINY if options.tiny else SMALL,
    )


# ---- check ----
def check(profile: Profile, options: argparse.Namespace) -> tuple[MeasuredLink, list[dict]]:
    """The link, and for each side what was measured (seconds of a step, each round) and what was predicted of it."""
    link = two_processes.measure_link(two_processes.SIZES[:3] if options.tiny else two_processes.SIZES)
    combined = small_model(options)
    plain = dataclasses.replace(combined, flags={})

    def side(recipe: trainers.Recipe, count: int, joined: bool = True, **flags) -> two_processes.Together:
        return two_processes.training(
            dataclasses.replace(recipe, flags=recipe.flags | flags), options.steps, count, joined
        )

    sides = {"one, combined": side(combined, 1), "two not joined": side(combined, 2, False)}
    checked = CHECKED[:1] if options.tiny else CHECKED
    for megabytes in checked:
        sides[f"two, combined, {megabytes} MB"] = side(combined, 2, ddp_bucket_cap_mb=megabytes)
    if not options.tiny:
        sides |= {
            "two, combined, bf16": side(combined, 2, ddp_comm_hook="bf16"),
            "one": side(plain, 1),
            "two, DDP": side(plain, 2),
        }
    for each in sides.values():
        each.hear()
    rounds = in_turns(sides, "train", options.rounds, 1)
    for each in sides.values():
        each.end()
    measured = {name: [max(of_ranks) for of_ranks in times] for name, times in rounds.items()}
    compute = profile.compute.scaled_to(statistics.median(measured["two not joined"]))
    predicted = {
        f"two, combined, {megabytes} MB": simulate(
            compute, prediction.with_flags(profile, megabytes, 1.0), link, stolen=link.stolen
        ).seconds
        for megabytes in checked
    }
    rows = [
        {
            "side": name,
            "seconds": times,
            "efficiency": statistics.median(
                base / own for base, own in zip(measured[base_of(name)], times, strict=True)
            ),
            "predicted": predicted.get(name),
        }
        for name, times in measured.items()
    ]
    return link, rows


def base_of(side: str) -> str:
    """The single process that a side is compared with: with combined gradients, if it has them."""
    return "one" if side in ("one", "two, DDP") else "one, combined"


def check_table(link: MeasuredLink, rows: list[dict]) -> str:
    latency, bandwidth = link.latency_and_bandwidth()
    lines = [
        f"All-reduce between two processes: {latency * 1e6:.0f} µs + bytes by {bandwidth / 1e9:.2f} GB/s; "
        f"{link.stolen:.0%} of its time computing stands still.",
        "",
        "| Processes | Step | Efficiency | Predicted | Error |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = statistics.median(row["seconds"])
        predicted = "- | -"
        if row["predicted"] is not None:
            predicted = f"{row['predicted'] * 1e3:.1f} ms | {row['predicted'] / seconds - 1:+.0%}"
        lines.append(f"| {row['side']} | {seconds * 1e3:.1f} ms | {row['efficiency']:.2f} | {predicted} |")
    return "\n".join(lines)


# ---- what is told ----
def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2, help="of each process in the check")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample in the check")
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side that count")
    parser.add_argument("--tiny", action="store_true", help="models of no size, to see that all works")
    parser.add_argument("--output", type=Path, required=True, help="a folder for scaling.json and scaling.md")
    parser.add_argument("--write", type=Path, help="a page whose tables are replaced, such as docs/scaling.md")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes to come
    recipes = [*real_models(options), small_model(options)]
    *of_models, of_small = two_processes.measure_backward(recipes, prediction.MEGABYTES)
    profiles = dict(zip(prediction.MODELS, of_models, strict=True))
    link, rows = check(of_small, options)
    made = machine.describe(torch.device("cpu"))
    made += f", {datetime.date.today()}; medians of {options.rounds} rounds of {options.steps} steps in turns"
    tables = {
        "prediction": prediction.prediction_table(profiles),
        "ninety": prediction.ninety_table(profiles),
        "published": prediction.published_table(profiles),
        "check": f"{made}\n\n{check_table(link, rows)}",
        "sources": prediction.sources_table(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "scaling.md").write_text("\n\n".join(tables.values()) + "\n", encoding="utf-8")
    found = {
        "profiles": {model: dataclasses.asdict(profile) for model, profile in profiles.items()},
        "link": dataclasses.asdict(link),
        "sides": rows,
    }
    (options.output / "scaling.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        for name, table in tables.items():
            page = page_parts.put(page, name, table)
        options.write.write_text(page, encoding="utf-8")
    print("\n\n".join(tables.values()))


if __name__ == "__main__":
    sys.exit(main())
