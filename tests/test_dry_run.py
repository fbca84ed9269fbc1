"""--dry_run says what a run would do, and leaves its folder as it is."""

import re
import types

import pytest
import torch
from commands import TINY_GPT2, run_script

from utils import dry_run
from utils.amp import Precision
from utils.errors import UsageError


def told(done) -> dict[str, str]:
    """{what: in words} of the plan that was printed."""
    assert "This is a dry run: nothing is kept." in done.stdout
    plan = done.stdout.split("nothing is kept.")[1]
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in plan.splitlines() if line.strip())


def test_it_tells_of_the_run_and_writes_nothing(files, tmp_path) -> None:
    command = [*TINY_GPT2, "--vocab_size", "300", *files, "--do_train", "--do_eval", "--use_cpu", "--use_combine_grad"]
    command += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--num_train_epochs", "2"]
    (tmp_path / "tmp").mkdir()
    done = run_script(
        "run_clm.py", *command, "--save_steps", "1", "--output_dir", tmp_path / "out", "--dry_run", TMPDIR=str(tmp_path / "tmp")
    )  # fmt: skip
    plan = told(done)
    assert not (tmp_path / "out").exists() and not list((tmp_path / "tmp").glob("dry_run*"))
    assert plan["device"].startswith("1p-CPU") and plan["precision"] == "O0, float32, combined gradients"
    assert re.match(r"gpt2, [\d,]+ parameters, vocabulary of 300", plan["model"])
    samples = int(plan["training samples"].split(",", 1)[0].replace(",", ""))
    assert plan["batch"] == "8 samples (4 a device × 1 × 2 accumulated)"
    batches = -(-samples // 4)
    assert plan["steps"] == f"{2 * -(-batches // 2)}, 2 epochs"
    assert "estimate" in plan["training time"] and "of 8 that were timed" in plan["a step"]


def test_it_asks_a_used_folder_what_the_run_would(files, tmp_path) -> None:
    command = [*TINY_GPT2, "--vocab_size", "300", *files, "--do_eval", "--use_cpu", "--output_dir", tmp_path / "out"]
    run_script("run_clm.py", *command)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    done = run_script("run_clm.py", *command, "--dry_run")
    assert "this run is finished already" in done.stdout and "dry run" not in done.stdout
    done = run_script("run_clm.py", *command, "--block_size", "32", "--dry_run", expect=2)
    assert "holds a run with --block_size None" in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


@pytest.mark.parametrize(
    ("level", "dtype", "combined", "bytes_each"),
    [
        ("O0", torch.float32, False, 16),  # weight, gradient, two moments
        ("O2", torch.float16, True, 2 + 4 + 4 + 8),
        ("O3", torch.bfloat16, False, 2 + 2 + 4),
    ],
)
def test_memory_of_the_weights(level, dtype, combined, bytes_each) -> None:
    words = dry_run.memory_in_words(2**20, Precision(level, dtype, None), combined)
    assert words.startswith(f"about {bytes_each} MiB ")


def test_a_device_without_the_memory_is_told_of() -> None:
    def train():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    args = types.SimpleNamespace(device=torch.device("cpu"), world_size=1, per_device_train_batch_size=64)
    trainer = types.SimpleNamespace(args=args, add_callback=lambda callback: None, train=train)
    with pytest.raises(UsageError, match="--per_device_train_batch_size 64: cpu has not the memory for a step"):
        dry_run.rehearsed(trainer)
