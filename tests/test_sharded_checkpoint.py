"""utils/sharded_checkpoint.py, on shards that torch.distributed.checkpoint wrote; the trainer's are in test_sharded_trainer.py."""

import dataclasses
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from utils import sharded_checkpoint
from utils.checkpoint_safety import reading
from utils.errors import UsageError


@pytest.mark.parametrize(
    ("files", "wrote"),
    [
        (["model.safetensors", "optimizer.pt"], None),
        (["pytorch_model_fsdp.bin", "optimizer.bin"], "--fsdp"),
        (["pytorch_model_fsdp_0", "optimizer_0"], "--fsdp"),
        (["global_step4", "latest"], "--deepspeed"),
    ],
)
def test_a_checkpoint_goes_on_with_its_own_engine_alone(files, wrote, tmp_path):
    for name in files:
        (tmp_path / name).mkdir()
    for flag in (None, "--fsdp", "--deepspeed"):
        if flag == wrote:
            sharded_checkpoint.check_engine(str(tmp_path), flag)
            continue
        with pytest.raises(UsageError, match=f"--resume_from_checkpoint {tmp_path}: was written with"):
            sharded_checkpoint.check_engine(str(tmp_path), flag)


class Code:
    """A pickle that would make a file if it were read."""

    def __init__(self, makes: Path):
        self.makes = makes

    def __reduce__(self):
        return Path.touch, (self.makes,)


@pytest.fixture
def shards(tmp_path) -> Path:
    """A checkpoint with tensors and a value beside them, as FSDP2's optimizer has."""
    state = {"moments": torch.arange(6.0), "group": {"lr": 0.1, "betas": (0.9, 0.95), "fused": None}}
    save(state, storage_writer=FileSystemWriter(tmp_path / "optimizer_0"), no_dist=True)
    return tmp_path


def test_plain_shards_pass(shards):
    sharded_checkpoint.check_plain(str(shards))


def test_code_in_the_description_is_refused(shards):
    (shards / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Code(shards / "called")))
    with pytest.raises(UsageError, match="asks to call pathlib.Path.touch"), reading(str(shards)):
        sharded_checkpoint.check_plain(str(shards))
    assert not (shards / "called").exists()


def test_code_by_a_name_with_a_dot_is_refused(shards):
    """As `torch.distributed.checkpoint.filesystem`, `os.system`: what a module has imported is not its own."""
    for module, name in (
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "io.open"),
        ("torch", "load"),
        ("builtins", "eval"),
    ):
        attack = b"\x80\x04" + b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)])
        attack += name.encode() + b"\x93."
        (shards / "optimizer_0" / ".metadata").write_bytes(attack)
        with pytest.raises(pickle.UnpicklingError, match="GLOBAL"):
            sharded_checkpoint.check_plain(str(shards))


def test_code_among_the_tensors_is_refused(shards):
    description = shards / "optimizer_0" / ".metadata"
    metadata = pickle.loads(description.read_bytes())
    value = io.BytesIO()
    torch.save(Code(shards / "called"), value)
    index, place = next(
        (index, place)
        for index, place in metadata.storage_data.items()
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
    )
    metadata.storage_data[index] = dataclasses.replace(
        place, relative_path="code", offset=0, length=len(value.getvalue())
    )
    (description.parent / "code").write_bytes(value.getvalue())
    description.write_bytes(pickle.dumps(metadata))
    with pytest.raises(pickle.UnpicklingError):
        sharded_checkpoint.check_plain(str(shards))
    assert not (shards / "called").exists()


def test_a_damaged_shard_is_told_in_one_line(shards):
    [shard] = (shards / "optimizer_0").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:10])
    state = {"moments": torch.zeros(6)}
    with pytest.raises(UsageError, match=rf"--resume_from_checkpoint {shards}: a file of it is damaged \(rank 0: "):
        with reading(str(shards)):
            load(state, storage_reader=FileSystemReader(shards / "optimizer_0"), no_dist=True)
