"""Steps on many devices, predicted from one: of the models that were published, on the servers of benchmarks/links.py."""

import functools

import torch
import transformers

from benchmarks import trainers
from benchmarks.links import ACHIEVED, SYSTEMS, System, all_reduce_seconds
from benchmarks.overlap import Bucket, Step, simulate
from benchmarks.two_processes import Profile
from utils import flops, published_results
from utils.device_peaks import stated_tflops

DEVICES = (8, 64, 512)
MEGABYTES = (1, 2, 5, 10, 25, 50, 100, 1000)
DEFAULT_MEGABYTES = 25  # of --ddp_bucket_cap_mb
# Of the published commands: a device's batch, and the tokens of a sample.
MODELS = {"gpt2": ("clm", 8, 1024), "roberta-base": ("mlm", 8, 512)}
MFU = 0.4  # assumed where no step was measured


def alone(system: System, model: str) -> tuple[float, str]:
    """(seconds of a step on one device, where that is from)."""
    batch = MODELS[model][1]
    rows = published_results.rows_of(model, 1) if system.device == "Ascend910" else []
    rows = [row for row in rows if "NPU" in row[0]]
    if rows:
        return batch / float(rows[0][2]), "published"
    peak = stated_tflops(system.device, "half") * 1e12
    return step_flops(model) / (peak * MFU), f"MFU {MFU}"


@functools.cache
def step_flops(model: str) -> float:
    objective, batch, length = MODELS[model]
    recipe = trainers.Recipe(True, objective, model, batch, length, rows=1, on_cpu=True)
    kind = transformers.AutoModelForMaskedLM if objective == "mlm" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return flops.count_model_flops(kind.from_config(trainers.make_config(recipe)))(batch, length)


def predict(
    profile: Profile,
    seconds: float,
    system: System,
    devices: int,
    megabytes: float = DEFAULT_MEGABYTES,
    wire: float = 1.0,
    overlap: bool = True,
    accumulate: int = 1,
    achieved: float = ACHIEVED,
) -> Step:
    """A step on `devices`, of which one alone takes `seconds` for a micro-batch."""
    compute = profile.compute.scaled_to(seconds).accumulated(accumulate)

    def cost(size: float) -> float:
        return all_reduce_seconds(system, devices, size, achieved)

    return simulate(compute, with_flags(profile, megabytes, wire), cost, wire, overlap)


def with_flags(profile: Profile, megabytes: float, wire: float) -> list[Bucket]:
    """The buckets, and behind them what tells which parameters received a gradient: 4 bytes each, on any wire."""
    return [*profile.buckets[megabytes], Bucket(4 * profile.parameters / wire, 1.0)]


def sizes_that_reach(share: float, profile: Profile, seconds: float, system: System, devices: int, **options) -> list:
    """The sizes of a bucket, in megabytes, with which a step has at least that efficiency."""
    return [
        megabytes
        for megabytes in profile.buckets
        if predict(profile, seconds, system, devices, megabytes, **options).efficiency >= share
    ]


def micro_batches_that_reach(
    share: float, profile: Profile, seconds: float, system: System, devices: int, **options
) -> int:
    """How many micro-batches a step must have for that efficiency, with buckets of the default size."""
    count = 1
    while predict(profile, seconds, system, devices, accumulate=count, **options).efficiency < share:
        count += 1
    return count


def cell(step: Step) -> str:
    return f"{step.seconds * 1e3:.1f} ms, {step.efficiency:.0%}"


def prediction_table(profiles: dict[str, Profile]) -> str:
    lines = [
        "| Model | Devices | Sent as | Step of one | "
        + " | ".join(f"{count}" for count in DEVICES)
        + " | Hidden at 512 |",
        "|---|---|---|---|" + "---|" * (len(DEVICES) + 1),
    ]
    for model, profile in profiles.items():
        for system in SYSTEMS.values():
            seconds, source = alone(system, model)
            for sent, wire in (("float32", 1.0), ("half", 0.5)):
                steps = [predict(profile, seconds, system, count, wire=wire) for count in DEVICES]
                lines.append(
                    f"| {model} | {system.name} | {sent} | {seconds * 1e3:.1f} ms ({source}) | "
                    + " | ".join(map(cell, steps))
                    + f" | {steps[-1].hidden:.0%} |"
                )
    return "\n".join(lines)


def ninety_table(profiles: dict[str, Profile]) -> str:
    lines = [
        "| Model | Devices of 512 | float32, after backward | float32, overlapping | half, overlapping | "
        "Micro-batches, float32 | Micro-batches, half |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, profile in profiles.items():
        for system in SYSTEMS.values():
            seconds, _ = alone(system, model)
            given = (0.9, profile, seconds, system, 512)
            sizes = [
                sizes_that_reach(*given, overlap=False),
                sizes_that_reach(*given),
                sizes_that_reach(*given, wire=0.5),
            ]
            reached = " | ".join(f"{min(some)} to {max(some)} MB" if some else "none" for some in sizes)
            counts = f"{micro_batches_that_reach(*given)} | {micro_batches_that_reach(*given, wire=0.5)}"
            lines.append(f"| {model} | {system.name} | {reached} | {counts} |")
    return "\n".join(lines)


def published_table(profiles: dict[str, Profile]) -> str:
    """Eight devices: what was published and what start-up would explain it; what links explain, and what ours should reach.

    start-up: the part of the time of a run on one device that does not shrink with more of them, if there is no other loss.
    """
    lines = [
        "| Model | Published | Explained by a start-up of | Nothing hidden | Overlapping | Overlapping, half |",
        "|---|---|---|---|---|---|",
    ]
    system = SYSTEMS["ascend-910"]
    for model, profile in profiles.items():
        one, eight = (float(published_results.rows_of(model, cards)[0][2]) for cards in (1, 8))
        seconds, _ = alone(system, model)
        steps = [
            predict(profile, seconds, system, 8, overlap=False),
            predict(profile, seconds, system, 8),
            predict(profile, seconds, system, 8, wire=0.5),
        ]
        shown = " | ".join(f"{step.efficiency:.0%}" for step in steps)
        reached = eight / one / 8
        lines.append(f"| {model} | {reached:.0%} | {(1 / reached - 1) / 7:.1%} of the run on one | {shown} |")
    return "\n".join(lines)


def sources_table() -> str:
    lines = ["| Devices | Links of one, in one direction | Source |", "|---|---|---|"]
    for system in SYSTEMS.values():
        links = ", ".join(f"{level.name} {level.bandwidth / 1e9:g} GB/s" for level in system.levels)
        lines.append(f"| {system.name} | {links} | {system.source} |")
    return "\n".join(lines)
