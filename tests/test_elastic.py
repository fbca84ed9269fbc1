"""utils/elastic.py: a run goes on with another number of processes as if it had always had that many."""

import json
from pathlib import Path
from types import SimpleNamespace

import elastic_worker
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from commands import TINY_GPT2, log_history, run_distributed, run_script
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, RandomSampler

from utils import arguments, elastic
from utils.errors import UsageError

CHANGES = (3, 8)  # steps: from two processes to one, and back


# ---- the run ----
@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with each case's `whole`, of two processes, and the same by two (`whole`), one (`one`) and two (`back`)."""
    folder = tmp_path_factory.mktemp("elastic")
    run_distributed("tests/elastic_worker.py", folder, "whole")
    elastic_worker.train(folder, "one", "whole", CHANGES[0])
    run_distributed("tests/elastic_worker.py", folder, "back", "one", CHANGES[1])
    return folder


def state(folder: Path, step: int) -> dict:
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())


@pytest.mark.parametrize("case", elastic_worker.CASES)
def test_from_two_processes_to_one_and_back(trained, case) -> None:
    """Losses to 1e-6 and weights to 1e-6 of the unbroken run, with dropout."""
    whole, back = trained / case / "whole", trained / case / "back"
    last = max(int(path.name.split("-")[1]) for path in whole.glob("checkpoint-*"))
    assert last > CHANGES[1] + 2
    logs = [
        [(e["step"], e["epoch"], e["learning_rate"], e["loss"]) for e in state(f, last)["log_history"] if "loss" in e]
        for f in (whole, back)
    ]
    for before, after in zip(*logs, strict=True):
        assert after == pytest.approx(before, rel=1e-6), case
    weights = [load_file(f / f"checkpoint-{last}" / "model.safetensors") for f in (whole, back)]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)
    moments = [
        torch.load(f / f"checkpoint-{last}" / "optimizer.pt", weights_only=True)["state"] for f in (whole, back)
    ]
    assert moments[0].keys() == moments[1].keys() and moments[0]
    # It was another number of processes indeed.
    assert [len(list((f / f"checkpoint-{s}").glob("progress_*"))) for f, s in ((whole, 3), (back, last))] == [2, 2]
    assert len(list((trained / case / "one" / f"checkpoint-{CHANGES[1]}").glob("progress_*"))) == 1


def test_the_scripts_go_on_with_fewer(files, tmp_path) -> None:
    output = tmp_path / "output"
    words = [*TINY_GPT2, *files, "--do_train", "--block_size", "32", "--max_steps", "6", "--save_steps", "2"]
    words += ["--logging_steps", "1", "--output_dir", output, "--report_to", "none"]
    words += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3", "--use_cpu"]
    run_distributed("run_clm.py", *words, "--elastic")
    whole = [entry["loss"] for entry in log_history(output) if "loss" in entry]
    record = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**record, "finished": False}))
    for step in (4, 6):  # as if it had been killed at step 3
        for path in sorted((output / f"checkpoint-{step}").iterdir()):
            path.unlink()
        (output / f"checkpoint-{step}").rmdir()
    done = run_script("run_clm.py", *words, "--elastic")
    assert "--elastic: 12 samples a step as before, in 6 micro-batches of 2 on each of 1 processes" in done.stdout
    again = [entry["loss"] for entry in log_history(output) if "loss" in entry]
    assert again == pytest.approx(whole, rel=1e-6) and len(whole) == 6


# ---- its parts ----
def flags(world_size: int = 1, batch: int = 4, accumulation: int = 1, **others) -> SimpleNamespace:
    return SimpleNamespace(
        elastic=True,
        world_size=world_size,
        process_index=0,
        train_batch_size=batch,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **others,
    )


def checkpoint_of(folder: Path, samples: int) -> str:
    (folder / "progress_0.json").write_text(json.dumps({"samples_per_step": samples}))
    return str(folder)


@pytest.mark.parametrize(("before", "processes", "accumulation"), [(16, 1, 4), (16, 2, 2), (16, 4, 1), (48, 3, 4)])
def test_accumulation_adapts(tmp_path, before, processes, accumulation) -> None:
    args = flags(processes)
    elastic.keep_global_batch(args, checkpoint_of(tmp_path, before))
    assert args.gradient_accumulation_steps == accumulation and elastic.samples_per_step(args) == before


@pytest.mark.parametrize(("before", "processes"), [(16, 3), (16, 8)])
def test_a_step_that_cannot_be_shared_out_is_refused(tmp_path, before, processes) -> None:
    with pytest.raises(UsageError, match=f"16 samples, which {processes} processes .* use 1, 2, 4 processes"):
        elastic.keep_global_batch(flags(processes), checkpoint_of(tmp_path, before))


def test_a_run_that_begins_with_fewer_has_the_batch_of_all(monkeypatch) -> None:
    """launch.sh says how many nodes there may be; those that are there begin."""
    monkeypatch.setenv(elastic.PROCESSES, "8")
    args = flags(2, accumulation=3)
    elastic.keep_global_batch(args, None)
    assert args.gradient_accumulation_steps == 12


@pytest.mark.parametrize("drop_last", [False, True])
def test_each_step_has_the_same_samples_for_any_number_of_processes(drop_last) -> None:
    """Dealt out by accelerate, as in a training."""
    batch, step, samples = 2, 12, 31
    found = []
    for processes in (1, 2, 3, 6):
        order = elastic.WholeSteps(RandomSampler(range(samples)), step, drop_last, seed=5)
        batches = BatchSampler(order, batch, drop_last)
        shares = []
        for rank in range(processes):
            order.sampler.set_epoch(0)
            shares.append(list(BatchSamplerShard(batches, processes, rank)))
        assert {len(share) for share in shares} == {len(order) // batch // processes}
        steps = [sum((share[k] for k in range(len(shares[0])) for share in shares), [])]
        found.append([sorted(steps[0][i : i + step]) for i in range(0, len(order), step)])
        torch.manual_seed(99)  # which the order has nothing to do with
    assert found[0] == found[1] == found[2] == found[3]
    seen = sum(found[0], [])
    assert len(seen) == (24 if drop_last else 36) and len(set(seen)) == (24 if drop_last else 31)


def test_what_cannot_be_elastic_is_refused() -> None:
    args = flags(do_train=True, do_eval=False, max_steps=2, fsdp=False)
    text = SimpleNamespace(streaming=True, dataset_name=None, train_file=["text.txt"], data_mix=None)
    with pytest.raises(UsageError, match="--elastic: a stream is shared out among so many processes"):
        arguments.check_run(text, args)
    for words in ({"fsdp": "full_shard"}, {"auto_find_batch_size": True}):
        with pytest.raises(UsageError, match=f"--elastic does not work with --{next(iter(words))}"):
            arguments.LanguageModelingArguments(output_dir="output", elastic=True, use_cpu=True, **words)
