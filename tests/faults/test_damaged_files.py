"""A checkpoint that is damaged or hostile: the file is named, nothing in it is called, and the one before is taken."""

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import resume
import torch

from utils import checkpoint, output_folder
from utils.errors import UsageError

SCRIPT, ARGUMENTS = "run_mlm.py", {"seed": 7}
FILES = [
    *("config.json", "generation_config.json", "manifest.json", "model.safetensors", "optimizer.pt"),
    *("progress_0.json", "rng_state.pth", "scaler.pt", "scheduler.pt", "trainer_state.json", "training_args.bin"),
]


@pytest.fixture(scope="module")
def run():
    """The folder of a run at O2 that was stopped after three checkpoints."""
    folder = resume.memory_folder() / "run"
    output_folder.begin(str(folder), SCRIPT, ARGUMENTS, overwrite=False)
    resume.trainer_in(folder, max_steps=3, use_combine_grad=True, **resume.O2).train()
    yield folder
    shutil.rmtree(folder.parent)


def claim(run: Path, resume_from: str | None = None) -> output_folder.Claim:
    return output_folder.claim(str(run), SCRIPT, ARGUMENTS, overwrite=False, resume=resume_from)


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


def test_these_are_all_files_of_a_checkpoint(run):
    assert sorted(entry.name for entry in (run / "checkpoint-3").iterdir()) == FILES


@pytest.mark.parametrize("harm", [flip, lambda content: content[:-1], lambda content: b"", None])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(name, harm, run, caplog):
    path = run / "checkpoint-3" / name
    content = path.read_bytes()
    try:
        path.write_bytes(harm(content)) if harm else path.unlink()
        if name != "manifest.json" or harm:  # without a manifest it is one of transformers', which may be named
            with pytest.raises(UsageError) as caught:
                claim(run, str(run / "checkpoint-3"))
            assert str(caught.value).startswith(f"--resume_from_checkpoint {run / 'checkpoint-3'}: ")
            assert name in str(caught.value)
        assert claim(run).checkpoint == str(run / "checkpoint-2")
        assert f"checkpoint-3: {name} " in caplog.text
    finally:
        path.write_bytes(content)
    assert claim(run).checkpoint == str(run / "checkpoint-3")


class Payload:
    """What a malicious pickle calls when it is read: it creates a file."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_a_malicious_pickle_is_never_called(name, run, tmp_path):
    """A checkpoint from elsewhere, without a manifest, so that nothing but the reader stands between."""
    bad = tmp_path / "checkpoint-3"
    shutil.copytree(run / "checkpoint-3", bad)
    (bad / "manifest.json").unlink()
    if name == "pytorch_model.bin":
        (bad / "model.safetensors").unlink()
    torch.save({"state": Payload(tmp_path / "witness")}, bad / name)
    trainer = resume.trainer_in(tmp_path / "out", max_steps=4, use_combine_grad=True, **resume.O2)
    with pytest.raises(UsageError) as caught:
        trainer.train(resume_from_checkpoint=str(bad))
    assert f"{name} is refused, it asks to call" in str(caught.value) and "system" in str(caught.value)
    assert not (tmp_path / "witness").exists()
    torch.load(bad / name, weights_only=False)
    assert (tmp_path / "witness").exists(), "the payload is a real one"


def test_training_args_are_never_read(run, tmp_path):
    bad = tmp_path / "checkpoint-3"
    shutil.copytree(run / "checkpoint-3", bad)
    (bad / "manifest.json").unlink()
    torch.save(Payload(tmp_path / "witness"), bad / "training_args.bin")
    trainer = resume.trainer_in(tmp_path / "out", max_steps=4, use_combine_grad=True, **resume.O2)
    trainer.train(resume_from_checkpoint=str(bad))
    assert trainer.state.global_step == 4 and not (tmp_path / "witness").exists()


@pytest.mark.parametrize("path", ["../../victim", "/etc/hostname", "a/../../../victim"])
def test_a_manifest_that_points_outside_is_a_damaged_one(path, run, tmp_path):
    bad = tmp_path / "checkpoint-3"
    shutil.copytree(run / "checkpoint-3", bad)
    found = checkpoint.read_manifest(bad)
    checkpoint._write_manifest(bad, checkpoint.Manifest(found.run, 9, 3, 1, {path: (1, "0")}))
    assert checkpoint.read_manifest(bad) is None and checkpoint.damage(bad) == "manifest.json is damaged"


# ---- rotation ----
def test_rotation_keeps_best_and_last_and_all_that_is_not_ours(tmp_path, caplog):
    """save_total_limit 1, the best is not the last, and another run has left higher numbers."""
    output_folder.begin(str(tmp_path), SCRIPT, ARGUMENTS, overwrite=False)
    stranger = tmp_path / "checkpoint-900"
    stranger.mkdir()
    (stranger / "trainer_state.json").write_text("{}")
    staged = checkpoint.staged_folder(tmp_path, 800)
    staged.mkdir(parents=True)
    (staged / "trainer_state.json").write_text("{}")
    checkpoint.commit(staged, "another run", 800, 1)
    options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    trainer = resume.trainer_in(
        tmp_path, max_steps=6, learning_rate=1.0, lr_scheduler_type="constant", eval_steps=1, **options
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint).name
    left = {entry.name for entry in tmp_path.glob("checkpoint-*")}
    assert best != "checkpoint-6", "the case is not the one that is meant"
    assert left == {best, "checkpoint-6", "checkpoint-800", "checkpoint-900"}
    assert claim(tmp_path).checkpoint == str(tmp_path / "checkpoint-6")


def test_a_stranger_in_the_place_of_a_checkpoint_is_kept(tmp_path):
    output_folder.begin(str(tmp_path), SCRIPT, ARGUMENTS, overwrite=False)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "precious").write_text("mine")
    resume.trainer_in(tmp_path, max_steps=2, save_total_limit=1).train()
    assert (tmp_path / "checkpoint-2.kept1" / "precious").read_text() == "mine"
    assert checkpoint.damage(tmp_path / "checkpoint-2") is None


# ---- a full disk ----
@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(path: Path, free: int) -> None:
    """Leaves `free` bytes on the disk that `path` is on."""
    disk = os.statvfs(path.parent)
    path.write_bytes(bytes(max(disk.f_bavail * disk.f_frsize - free, 0)))


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("free", [0, 20_000, 150_000, 400_000])
def test_a_full_disk_costs_neither_the_run_nor_the_last_checkpoint(free, in_background, small_disk, caplog):
    caplog.set_level(logging.ERROR)
    folder = small_disk / "run"
    output_folder.begin(str(folder), SCRIPT, ARGUMENTS, overwrite=False)
    trainer = resume.trainer_in(
        folder, max_steps=2, use_combine_grad=True, async_save=in_background, eval_strategy="no"
    )
    trainer.train()
    last = trainer.last_saved
    fill(small_disk / "filler", free)
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=str(last))
    assert trainer.state.global_step == 4, "training went on"
    [line] = [r.getMessage() for r in caplog.records if "checkpoint-4 could not be saved" in r.getMessage()]
    assert line.startswith(f"--output_dir {folder}: ") and "--save_total_limit" in line and "checkpoint-2" in line
    assert not list((folder / "_incomplete").glob("*")) and checkpoint.damage(last) is None
    fill(small_disk / "more", 0)
    with pytest.raises(UsageError, match="the model could not be saved"):
        trainer.save_model(str(folder))
    for filler in ("filler", "more"):
        (small_disk / filler).unlink()
    assert trainer.save_now().name == "checkpoint-4" and checkpoint.damage(folder / "checkpoint-4") is None


@pytest.mark.parametrize("in_background", [False, True])
def test_a_best_model_that_cannot_be_saved_is_not_the_best(in_background, tmp_path):
    """Its file is a link to /dev/full, where the kernel says that no space is left: the best before is loaded at the end."""
    output_folder.begin(str(tmp_path), SCRIPT, ARGUMENTS, overwrite=False)
    options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "async_save": in_background}
    trainer = resume.trainer_in(tmp_path, max_steps=2, eval_steps=1, lr_scheduler_type="constant", **options)
    trainer.train()
    staged = checkpoint.staged_folder(tmp_path, 3)
    staged.mkdir(parents=True)
    (staged / "optimizer.pt").symlink_to("/dev/full")
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[2] < min(losses[:2]) and trainer.state.global_step == 3, "the case is not the one that is meant"
    assert not (tmp_path / "checkpoint-3").exists()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    kept = resume.state_of(tmp_path / "checkpoint-2")
    for name, value in trainer.model.state_dict().items():
        assert name == "lm_head.weight" or torch.equal(value, kept[f"weights {name}"])


@pytest.mark.parametrize("changes", [{"model_type": "bert"}, {"vocab_size": 77}, {"n_layer": 9}])
def test_a_checkpoint_of_another_model_is_not_called_damaged(changes, run, tmp_path):
    """Its files are whole: nothing is loaded, and what differs is named."""
    shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()
    config = tmp_path / "checkpoint-3" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    trainer = resume.trainer_in(tmp_path / "new", max_steps=4, use_combine_grad=True, **resume.O2)
    [(name, value)] = changes.items()
    with pytest.raises(UsageError, match=f"checkpoint-3: is of a model with {name} {value}, this run's has"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
