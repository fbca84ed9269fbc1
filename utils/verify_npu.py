"""Checks on an NPU what cannot be checked without one, and writes a report to send back: scripts/verify_npu.sh.

Each check runs the project's own commands as a user would, keeps their logs, and says what it could not check.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from utils import published_results

ROOT = Path(__file__).resolve().parent.parent
PASSED, FAILED, UNCHECKED = "passed", "failed", "not checked"
# What the process ends with: the worst of the verdicts decides.
EXIT_CODES = {PASSED: 0, UNCHECKED: 3, FAILED: 1}

PUBLISHED_MODELS = {"clm": "gpt2", "mlm": "roberta-base"}
# Small models whose numbers depend on the device alone: no dropout.
SMALL = {
    "clm": (
        "--model_type gpt2 --config_overrides n_embd=64,n_layer=2,n_head=2,n_positions=64,resid_pdrop=0.0,"
        "attn_pdrop=0.0,embd_pdrop=0.0 --vocab_size 512 --block_size 64"
    ),
    "mlm": (
        "--model_type roberta --config_overrides hidden_size=64,num_hidden_layers=2,num_attention_heads=2,"
        "intermediate_size=128,max_position_embeddings=66,hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0 "
        "--vocab_size 512 --max_seq_length 64"
    ),
    "plm": (
        "--model_type xlnet --config_overrides d_model=64,n_layer=2,n_head=2,d_inner=128,dropout=0.0 "
        "--vocab_size 512 --max_seq_length 64"
    ),
}
STEPS = "--max_steps 10 --logging_steps 1 --learning_rate 3e-3 --per_device_train_batch_size 4 --save_strategy no"
# {name: (flags, how far a loss may be from the CPU's in float32, as a share of what the CPU's falls by)}. Some NPUs
# multiply float32 matrices in a shorter format.
LEVELS = {"O0": ("", 0.03), "O2": ("--fp16 --fp16_opt_level O2 --use_combine_grad", 0.05)}
TITLES = {
    "doctor": "Environment",
    "parity": "Losses beside the CPU's",
    "rows": "Results rows beside the published ones",
    "profile": "Profile of one step",
}


@dataclass
class Check:
    """One section of the report. parts: (verdict, what it is about). text: Markdown below them."""

    name: str
    parts: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""

    def verdict(self) -> str:
        return worst(verdict for verdict, _ in self.parts)

    def markdown(self) -> str:
        lines = [f"## {TITLES[self.name]}: {self.verdict()}", ""]
        lines += [f"- {verdict}: {what}" for verdict, what in self.parts]
        return "\n".join(lines) + "\n" + (f"\n{self.text.rstrip()}\n" if self.text else "")


def worst(verdicts) -> str:
    found = set(verdicts)
    return next((verdict for verdict in (FAILED, UNCHECKED) if verdict in found), PASSED)


class Verification:
    """What all checks share: the options, the device and the folder that the report and the logs go to."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.folder = Path(args.output_dir).absolute()
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.cpu = ["--use_cpu"] if args.device == "cpu" else []
        self.cards, self.missing = self.find_device()

    def find_device(self) -> tuple[int, str]:
        """The number of devices of the kind that is asked for, and if that is 0, why there is none."""
        if self.args.device == "cpu":
            return self.args.nproc or 2, ""
        # In a process of its own: where CANN is not found it ends at this import.
        done = self.run("device", ["-c", "from utils import device; print(device.accelerator(), device.count())"])
        answer = done.stdout.split()[-2:]
        if done.returncode == 0 and answer[0] == self.args.device:
            return int(answer[1]), ""
        why = one_line_of(done) if done.returncode else ""
        return 0, f"there is no {self.args.device.upper()} here" + (f": {why}" if why else "")

    def run(self, name: str, command: list, python: bool = True) -> subprocess.CompletedProcess:
        """Runs a command from the project's folder and keeps what it says as logs/<name>.log."""
        command = [*([sys.executable] if python else []), *map(str, command)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])]),
        }
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT, env=environment)
        log = f"{' '.join(command)}\n{done.stdout}\n{done.stderr}\nexit code {done.returncode}\n"
        (self.folder / "logs" / f"{name}.log").write_text(log, encoding="utf-8")
        return done

    def corpus(self) -> list[str]:
        from utils import sample_corpus

        files = {
            "train": self.folder / "corpus" / "train.txt",
            "validation": self.folder / "corpus" / "validation.txt",
        }
        files["train"].parent.mkdir(exist_ok=True)
        sample_corpus.write(files["train"], documents=150, seed=1)
        sample_corpus.write(files["validation"], documents=30, seed=2)
        return ["--train_file", str(files["train"]), "--validation_file", str(files["validation"])]


# ---- the checks ----
def doctor(verification: Verification) -> Check:
    check = Check("doctor")
    done = verification.run("doctor", ["-m", "utils.doctor", "--json"])
    try:
        found = json.dumps(json.loads(done.stdout), indent=2, ensure_ascii=False)
        (verification.folder / "doctor.json").write_text(found + "\n", encoding="utf-8")
        check.text = f"```json\n{found}\n```"
    except ValueError:
        check.parts.append((FAILED, f"python -m utils.doctor --json gave no JSON: {one_line_of(done)}"))
        return check
    verdict = PASSED if done.returncode == 0 else FAILED
    check.parts.append((verdict, f"python -m utils.doctor, exit code {done.returncode}"))
    return check


def parity(verification: Verification) -> Check:
    """Trains small models for ten steps, on the CPU in float32 and on the device at O0 and O2, and compares losses."""
    check = Check("parity")
    if not verification.cards:
        return unchecked(check, verification)
    text = verification.corpus()
    rows = []
    for objective in verification.args.objectives:

        def losses(name: str, flags: list[str], objective: str = objective) -> list[float] | str:
            """Each step's loss and then the evaluation's; what went wrong, if something did."""
            output = verification.folder / "parity" / f"{objective}_{name}"
            command = [
                f"run_{objective}.py",
                *SMALL[objective].split(),
                *text,
                *STEPS.split(),
                "--do_train",
                "--do_eval",
            ]
            command += ["--overwrite_output_dir", "--output_dir", str(output), *flags]
            done = verification.run(f"parity_{objective}_{name}", command)
            if done.returncode:
                return one_line_of(done)
            history = json.loads((output / "trainer_state.json").read_text())["log_history"]
            last = json.loads((output / "all_results.json").read_text())["eval_loss"]
            return [entry["loss"] for entry in history if "loss" in entry] + [last]

        reference = losses("cpu_O0", ["--use_cpu"])
        for level, (flags, tolerance) in LEVELS.items():
            name = f"{verification.args.device}_{level}"
            what = f"{objective}, {level} on {verification.args.device}"
            ours = reference if isinstance(reference, str) else losses(name, [*flags.split(), *verification.cpu])
            if isinstance(ours, str) or isinstance(reference, str):
                check.parts.append((FAILED, f"{what}: {ours}"))
                continue
            verdict, said = compare(ours, reference, tolerance)
            check.parts.append((verdict, f"{what}: {said}"))
            rows.append([objective, level, *(f"{ours[i]:.4f} / {reference[i]:.4f}" for i in (0, 4, 9, 10))])
    header = ["", "Level", "Step 1", "Step 5", "Step 10", "Evaluation"]
    check.text = f"Loss on {verification.args.device} / on the CPU at O0:\n\n" + table(header, rows)
    return check


def compare(ours: list[float], reference: list[float], tolerance: float) -> tuple[str, str]:
    """Verdict on losses beside the CPU's, which must fall: against that the differences are measured."""
    fall = max(reference) - min(reference)
    difference = max(abs(a - b) for a, b in zip(ours, reference, strict=True)) / fall
    # A loss that is not a number is greater than no other one: all must be small, none need be large.
    close = all(abs(a - b) <= tolerance * fall for a, b in zip(ours, reference, strict=True))
    said = f"losses differ by up to {difference:.2g} of what the CPU's fall by, {tolerance:g} is allowed"
    return PASSED if close else FAILED, said


def rows(verification: Verification) -> Check:
    """The published trainings by the launch scripts, on one card and on eight, or as many as there are."""
    check = Check("rows")
    if not verification.cards:
        return unchecked(check, verification)
    args = verification.args
    models = {"clm": args.gpt2, "mlm": args.roberta}
    text = ["--data_path", str(Path(args.data_path).absolute())] if args.data_path else []
    text = text or ["--dataset_name", "wikitext", "--dataset_config_name", "wikitext-2-raw-v1"]
    steps = ["--max_steps", str(args.max_steps)] if args.max_steps else []
    lines = []
    several = min(args.nproc or 8, verification.cards)
    for objective in [objective for objective in models if objective in args.objectives]:
        for cards in sorted({1, several}):
            name = f"rows_{objective}_{cards}p"
            output = verification.folder / name
            command = ["bash", "scripts/train_full_1p.sh" if cards == 1 else "scripts/train_full_8p.sh", objective]
            command += ["--nproc", str(cards), "--model_name_or_path", models[objective], *text, *steps]
            command += ["--output_dir", str(output), "--overwrite_output_dir", *verification.cpu]
            done = verification.run(name, command, python=False)
            what = f"{models[objective]} on {cards}"
            if done.returncode:
                why = one_line_of(done)
                # A machine without a network says nothing about its NPUs.
                verdict = UNCHECKED if "cannot be reached" in why else FAILED
                check.parts.append((verdict, f"{what}: {why}"))
                continue
            check.parts.append((PASSED, what))
            row = (output / "results.md").read_text(encoding="utf-8").splitlines()[-1]
            lines.append([models[objective], *(cell.strip() for cell in row.strip("|").split("|"))])
        for cards in sorted({1, several} & {1, 8}):
            lines += [
                [f"{PUBLISHED_MODELS[objective]}, published", *row]
                for row in published_results.rows_of(PUBLISHED_MODELS[objective], cards)
            ]
    if several < 8:
        check.parts.append((UNCHECKED, f"8 cards: {verification.cards} of them here, so {several} took part at most"))
    if steps:
        check.parts.append((UNCHECKED, f"accuracy: it needs 3 epochs, --max_steps {args.max_steps} ended them early"))
    check.text = table(["", "Device", "Acc", "FPS", "AMP_Type", "Epochs"], lines)
    return check


def profile(verification: Verification) -> Check:
    """Where the time of a step goes: GPT-2 in its own size, from scratch; a small one with --small and on a CPU."""
    check = Check("profile")
    if not verification.cards:
        return unchecked(check, verification)
    folder = verification.folder / "profile"
    small = verification.args.small or verification.args.device == "cpu"
    own_size = "--model_type gpt2 --config_overrides vocab_size=50257 --vocab_size 512 --block_size 512"
    flags = (SMALL["clm"] if small else own_size).split()
    flags += [*verification.corpus(), *STEPS.split(), *LEVELS["O2"][0].split(), *verification.cpu]
    command = ["-m", "utils.profile_step", folder, 8, "run_clm.py", *flags, "--do_train"]
    done = verification.run(
        "profile", [*command, "--overwrite_output_dir", "--output_dir", verification.folder / "profile_run"]
    )
    # PyTorch's table, or what torch_npu makes of its profile.
    found = [path for name in ("operators.txt", "op_statistic*.csv") for path in sorted(folder.rglob(name))]
    if done.returncode or not found:
        check.parts.append(
            (FAILED, one_line_of(done) if done.returncode else "the profiler left no table of operators")
        )
        return check
    check.parts.append((PASSED, f"step 8 of {'a small ' * small}GPT-2 at O2; all of it in {folder.name}/"))
    shown = "\n".join(found[-1].read_text(encoding="utf-8", errors="replace").splitlines()[:50])
    check.text = f"```text\n{shown}\n```"
    return check


CHECKS = {"doctor": doctor, "parity": parity, "rows": rows, "profile": profile}


def unchecked(check: Check, verification: Verification) -> Check:
    check.parts.append((UNCHECKED, verification.missing))
    return check


# ---- the report ----
def one_line_of(done: subprocess.CompletedProcess) -> str:
    """The line that says what went wrong: the script's own error, else the last one."""
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    return (errors or lines or ["no output"])[-1][:300] + f" (exit code {done.returncode})"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_report(verification: Verification, checks: list[Check]) -> str:
    """Writes report.md and report.json, and returns the verdict."""
    verdict = worst(check.verdict() for check in checks)
    summary = table(["Check", "Verdict"], [[TITLES[check.name], check.verdict()] for check in checks])
    sections = "\n".join(check.markdown() for check in checks)
    report = f"# Verification on {verification.args.device.upper()}: {verdict}\n\n{summary}\n\n{sections}"
    (verification.folder / "report.md").write_text(report, encoding="utf-8")
    content = {
        "device": verification.args.device,
        "verdict": verdict,
        "checks": {
            check.name: {"verdict": check.verdict(), "parts": [list(part) for part in check.parts]} for check in checks
        },
    }
    (verification.folder / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return verdict


def pack(folder: Path) -> Path:
    """One file to send: reports, logs and tables, without what is large."""
    archive = folder.with_name(folder.name + ".tar.gz")
    kept = [folder / name for name in ("report.md", "report.json", "doctor.json")]
    kept += [*folder.glob("logs/*.log"), *folder.glob("rows_*/train_*.log"), *folder.glob("rows_*/*_results.json")]
    kept += [path for path in (folder / "profile").rglob("*") if path.suffix in (".txt", ".csv", ".json")]
    with tarfile.open(archive, "w:gz") as file:
        for path in kept:
            if path.is_file() and path.stat().st_size < 20_000_000:
                file.add(path, Path(folder.name) / path.relative_to(folder))
    return archive


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    def names(allowed):
        def read(text: str) -> list[str]:
            given = text.split(",")
            if not set(given) <= set(allowed):
                raise argparse.ArgumentTypeError(f"{text}: give some of {','.join(allowed)}")
            return given

        return read

    parser = argparse.ArgumentParser(prog="verify_npu.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", default="output/verify_npu", help="Where the report goes.")
    parser.add_argument("--device", default="npu", choices=["npu", "cuda", "cpu"], help="What is checked.")
    parser.add_argument(
        "--checks", type=names(CHECKS), default=list(CHECKS), help="Some of the checks: doctor,parity."
    )
    parser.add_argument(
        "--objectives", type=names(SMALL), default=list(SMALL), help="Some of the objectives: clm,mlm,plm."
    )
    parser.add_argument("--gpt2", default="gpt2", help="GPT-2's weights: a name on the hub, or a folder.")
    parser.add_argument("--roberta", default="roberta-base", help="RoBERTa's weights: a name on the hub, or a folder.")
    parser.add_argument("--data_path", help="A folder with WikiText-2, where the hub cannot be reached.")
    parser.add_argument("--small", action="store_true", help="Profile a small model, not GPT-2 in its own size.")
    parser.add_argument("--max_steps", type=int, help="End the trainings of the results rows early.")
    parser.add_argument(
        "--nproc", type=int, help="Cards of the larger results row. Default: 8, or all if there are less."
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    verification = Verification(parse(argv))
    checks: list[Check] = []
    for name in verification.args.checks:
        print(f"{TITLES[name]} ...", flush=True)
        checks.append(CHECKS[name](verification))
        # After each one: what is known stays known if a later one hangs.
        verdict = write_report(verification, checks)
        print("\n".join(f"  {what}: {part}" for part, what in checks[-1].parts), flush=True)
    print(f"\n{verdict}. The report: {verification.folder / 'report.md'}")
    print(
        f"To send back: {pack(verification.folder)} (versions, paths and logs of this machine; look through it first)"
    )
    return EXIT_CODES[verdict]


if __name__ == "__main__":
    sys.exit(main())
