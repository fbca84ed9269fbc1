"""What the launch scripts add to a command line: defaults, the text of --data_path, what suits the device.

python -m utils.launch --plan PLAN ... writes into the file PLAN the output folder and then the flags for run_clm.py,
run_mlm.py or run_plm.py, quoted for a shell.
"""

import argparse
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.errors import UsageError, one_line

# The words in a file's name that say what it is for.
PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
}


def complete(
    mode: str,
    objective: str,
    words: Sequence[str],
    data_path: str,
    world_size: int,
    precision: str,
    is_elastic: bool = False,
) -> list[str]:
    """The whole command line: the config file, if `words` begins with one, then defaults, then the other words.

    Later flags win, so what the user says overrides a default; a default that would contradict a flag, or override the
    config file, is left out.
    mode: "full" or "performance". precision: the flags of the level that suits the device. is_elastic: whether nodes may
    come and go.

    Raises UsageError.
    """
    from_file, rest = take_config_file(words)
    given = set(from_file) | flag_names(rest)
    defaults = ["--do_train"] * ("do_train" not in given)
    if mode == "full":
        defaults += ["--do_eval"] * ("do_eval" not in given)
        defaults += ["--num_train_epochs", "3"] * given.isdisjoint({"num_train_epochs", "max_steps"})
    else:
        defaults += ["--max_steps", "200"] * given.isdisjoint({"num_train_epochs", "max_steps"})
        defaults += ["--save_strategy", "no"] * given.isdisjoint({"save_strategy", "save_steps"})
    engines = {"fsdp", "deepspeed"}
    if given.isdisjoint({"fp16", "bf16", "fp16_opt_level", "use_cpu", "no_cuda"} | engines):
        defaults += precision.split()
    if given.isdisjoint({"use_combine_grad"} | engines):
        defaults += ["--use_combine_grad"]
    if is_elastic:
        defaults += ["--elastic"] * ("elastic" not in given)
    if data_path:
        source = given & {"train_file", "validation_file", "dataset_name"}
        if source:
            raise UsageError(f"--data_path {data_path}: --{min(source)} names text too; give one of them")
        defaults += text_flags(data_path)
    if "output_dir" not in given:
        defaults += ["--output_dir", os.path.join("output", f"{objective}_{mode}_{world_size}p")]
    return [*words[: len(words) - len(rest)], *defaults, *rest]


def take_config_file(words: Sequence[str]) -> tuple[dict, list[str]]:
    """The content of the YAML or JSON file that `words` may begin with, and the words behind it.

    A file that cannot be read counts as empty: the script itself will say what is wrong with it.
    """
    if not words or not words[0].endswith((".json", ".yaml", ".yml")):
        return {}, list(words)
    import yaml

    try:
        text = Path(words[0]).read_text(encoding="utf-8")
        content = json.loads(text) if words[0].endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    return content if isinstance(content, dict) else {}, list(words[1:])


def flag_names(words: Sequence[str]) -> set[str]:
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def value_of(name: str, words: Sequence[str]) -> str | None:
    """The flag's value, the last one if it is given twice."""
    value = None
    for index, word in enumerate(words):
        flag, equals, joined = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            value = joined if equals else next(iter(words[index + 1 : index + 2]), None)
    return value


def text_flags(folder: str) -> list[str]:
    """The flags that name the text in a folder. Raises UsageError where there is none."""
    from utils.compressed_files import SUFFIXES
    from utils.file_kinds import BUILDERS

    if not os.path.isdir(folder):
        raise UsageError(f"--data_path {folder}: no such folder")
    entries = {entry.name: entry for entry in sorted(Path(folder).iterdir())}
    if entries.keys() & {"dataset_dict.json", "state.json"}:  # what `save_to_disk` of datasets leaves
        return ["--dataset_name", folder]
    files: dict[str, list[str]] = {part: [] for part in PARTS}
    for entry in entries.values():
        path = Path(entry.stem) if entry.suffix in SUFFIXES else Path(entry.name)
        if not entry.is_file() or path.suffix.lower() not in BUILDERS:
            continue
        words = set(re.split(r"[^a-z]+", path.stem.lower()))
        for part, names in PARTS.items():
            if not words.isdisjoint(names):
                files[part].append(str(entry))
    if not files["train"]:
        raise UsageError(
            f"--data_path {folder}: holds no training text: a file with 'train' in its name, of a kind among "
            f"{' '.join(BUILDERS)}, or what `datasets` saved; name the files by --train_file"
        )
    flags = ["--train_file", *files["train"]]
    return flags + (["--validation_file", *files["validation"]] if files["validation"] else [])


def check_nodes(nodes: str, words: Sequence[str]) -> bool:
    """Whether nodes may come and go. nodes: N or MIN:MAX.

    Raises UsageError if some number of them could not share out the micro-batches of a step: told now, and not when a node
    is lost.
    """
    fewest, _, most = nodes.partition(":")
    if not most or fewest == most:
        return False
    name = "gradient_accumulation_steps"
    given = value_of(name, words) or take_config_file(words)[0].get(name) or 1
    counts = range(int(fewest), int(most) + 1)

    def is_shared_out(accumulation: int) -> bool:
        return all(accumulation * int(most) % count == 0 for count in counts)

    if str(given).isdigit() and not is_shared_out(int(given)):
        fits = next(k for k in range(1, math.lcm(*counts) + 1) if is_shared_out(k))
        one = next(count for count in counts if int(given) * int(most) % count)
        raise UsageError(
            f"--nnodes {nodes}: the {int(given) * int(most)} micro-batches of a step cannot be shared out among {one} nodes; "
            f"give --{name} {fits} or a multiple of it, or other numbers of nodes"
        )
    return True


def suit_device(words: Sequence[str], nproc: int, npu_is_here: bool) -> tuple[list[str], str]:
    """Flags that the device asks for, and those of the precision level that suits it; warns where an NPU lies idle.

    Raises UsageError if there are fewer devices than processes.
    """
    names = flag_names(words) | set(take_config_file(words)[0])
    if {"use_cpu", "no_cuda"} & names:
        return [], ""
    sys.argv = ["launch.sh", *words]  # --device_id is looked for here, when `device` is imported
    from utils import device

    kind = device.accelerator()
    if npu_is_here and kind != "npu":
        print(
            f"launch.sh: warning: this machine has NPUs, but {sys.executable} sees none; `python -m utils.doctor` tells "
            "why",
            file=sys.stderr,
        )
    if kind is None:
        return [], ""  # float32, however fast this CPU's float16 may be: a default must not hang on a measurement
    count = device.count()
    if nproc > count:
        raise UsageError(
            f"--nproc {nproc}: {count} {device.NAMES.get(kind, kind)} visible here; give --nproc {count} or less"
        )
    # transformers would split each batch of a single process over all GPUs that it sees.
    alone = nproc == 1 and kind == "cuda" and count > 1 and "device_id" not in names
    return ["--device_id", "0"] if alone else [], device.demo_flags()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--mode", required=True)
    parser.add_argument("--objective", required=True)
    parser.add_argument("--nproc", type=int, required=True)
    parser.add_argument("--world_size", type=int, required=True)
    parser.add_argument("--nnodes", default="1")
    parser.add_argument("--data_path", default="")
    parser.add_argument("--npu_is_here", default="no")
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    try:
        extra, precision = suit_device(args.words, args.nproc, args.npu_is_here == "yes")
        is_elastic = check_nodes(args.nnodes, args.words)
        words = complete(args.mode, args.objective, args.words, args.data_path, args.world_size, precision, is_elastic)
        words += extra
        output = value_of("output_dir", words) or take_config_file(words)[0].get("output_dir")
        if not output:
            raise UsageError("--output_dir: its value is missing")
    except UsageError as error:
        print(f"launch.sh: error: {one_line(error)}", file=sys.stderr)
        return 2
    args.plan.write_text(shlex.join([str(output), *words]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
