"""Feeds the readers of checkpoints with files that nobody has written, for as long as asked:

    python tests/faults/fuzz_checkpoints.py --minutes 10

A checkpoint with a manifest is refused by its checksums before anything else is read. So here it has none, or a manifest
of false content that is right by its own checksum. Each reader must give a result or one line that tells what is wrong
(UsageError), and call nothing. What was found is replayed by test_fuzz_finds.py.
"""

import atexit
import contextlib
import functools
import json
import logging
import shutil
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import resume
import torch
from fuzz_readers import VALUES, allow, feed
from hypothesis import strategies as st
from transformers.utils.logging import disable_progress_bar

from utils import checkpoint, output_folder, stream_position
from utils.errors import UsageError

STATE_FILES = ["trainer_state.json", "progress_0.json"]
PICKLED = ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"]
KEYS = st.sampled_from(
    ["state", "param_groups", "params", "lr", "betas", "exp_avg", "step", "last_epoch", "_last_lr", "scale", "python"]
    + ["numpy", "cpu", "growth_factor", "_growth_tracker", "lr_lambdas", "base_lrs", 0, 1]
)
TENSORS = st.sampled_from([torch.zeros(0), torch.ones(3), torch.zeros(5056, dtype=torch.uint8), torch.tensor(1.0)])
TREES = st.recursive(
    st.one_of(VALUES, TENSORS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=8,
)
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6), st.binary(max_size=6)), max_size=4)


# ---- a checkpoint to begin with ----
@functools.cache
def whole() -> tuple[Path, object]:
    """(a checkpoint of a tiny model at O2, without a manifest; a trainer that can read it)."""
    disable_progress_bar()
    folder = resume.memory_folder()
    atexit.register(shutil.rmtree, folder)
    options = {**resume.O2, "use_combine_grad": True, "max_steps": 1, "eval_strategy": "no"}
    trainer = resume.trainer_in(folder, **options)
    trainer.train()
    found = folder / "checkpoint-1"
    (found / checkpoint.MANIFEST).unlink()
    return found, trainer


@contextlib.contextmanager
def in_place_of(name: str, content: bytes):
    """The checkpoint with another content of one file, for a while."""
    folder, _ = whole()
    path = folder / name
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        yield folder
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)


def edited(content: bytes, edits: list) -> bytes:
    changed = bytearray(content)
    for place, length, new in edits:
        start = int(place * len(changed))
        changed[start : start + length] = new
    return bytes(changed)


# ---- the readers ----
def read() -> None:
    """What a training reads that goes on from the checkpoint."""
    folder, trainer = whole()
    path = str(folder)
    trainer._load_from_checkpoint(path)
    trainer._init_training_state(1, 1, 1, path, None)
    trainer._load_optimizer_and_scheduler(path)
    trainer._load_scaler(path)
    trainer._load_rng_state(path)
    trainer._take_up_progress()


def read_edited(name: str, edits: list) -> None:
    content = (whole()[0] / name).read_bytes()
    with in_place_of(name, edited(content, edits)):
        allow(read)


def read_json(name: str, content) -> None:
    """content: in place of the file's, or, where both are mappings, put into it."""
    if isinstance(content, dict):
        content = {**json.loads((whole()[0] / name).read_bytes()), **content}
    with in_place_of(name, json.dumps(content).encode()):
        allow(read)


def read_tree(name: str, tree, into: bool) -> None:
    """A file that torch has written, of plain data that is not what belongs there. into: into what belongs there."""
    folder, _ = whole()
    if into and isinstance(tree, dict):
        tree = {**torch.load(folder / name, weights_only=False), **tree}
    passing = folder.parent / "tree"
    torch.save(tree, passing)
    with in_place_of(name, passing.read_bytes()):
        allow(read)


def read_header(header, tail: bytes, length: int | None) -> None:
    """A safetensors file: its header, what follows, and a length of the header that may be wrong."""
    text = json.dumps(header).encode()
    with in_place_of("model.safetensors", struct.pack("<Q", len(text) if length is None else length) + text + tail):
        allow(read)


def read_manifest(content, is_signed: bool) -> None:
    """No manifest may end a search: `damage` tells, and `newest` passes it over."""
    if isinstance(content, dict) and is_signed:
        content = {**content, "checksum": checkpoint._checksum_of(content)}
    with in_place_of(checkpoint.MANIFEST, json.dumps(content).encode()) as folder:
        assert checkpoint.damage(folder) is None or checkpoint.newest(folder.parent, None) is None
        with contextlib.suppress(UsageError):
            checkpoint.check_named(str(folder), 1)


def read_record(content: bytes) -> None:
    """run.json, which says whose folder it is."""
    folder, _ = whole()
    path = folder.parent / output_folder.RUN_FILE
    path.write_bytes(content)
    try:
        output_folder.run_id(folder.parent)
        allow(lambda: output_folder.claim(str(folder.parent), "run_clm.py", {"seed": 7}, False, None))
    finally:
        path.unlink()


def read_stream_position(content: bytes) -> None:
    folder, _ = whole()
    path = folder.parent / "data_state_0.json"
    path.write_bytes(content)
    allow(lambda: stream_position._read(path))


RECORDS = st.fixed_dictionaries({}, optional={
    "run": VALUES, "number": VALUES, "step": VALUES, "processes": VALUES,
    "files": st.one_of(VALUES, st.dictionaries(st.text(max_size=5), st.tuples(st.integers(), st.text(max_size=3)))),
})  # fmt: skip
STATES = st.one_of(
    VALUES,
    st.dictionaries(
        st.sampled_from(
            ["epoch", "global_step", "max_steps", "log_history", "best_model_checkpoint", "stateful_callbacks"]
            + ["best_metric", "best_global_step", "train_batch_size", "total_flos", "loss_since_log", "seconds"]
        ),
        VALUES,
        max_size=3,
    ),
)
TENSOR_RECORDS = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "I64", "X"]), "shape": st.lists(st.integers(-1, 2**62), max_size=3)},
    optional={"data_offsets": st.lists(st.integers(0, 2**62), max_size=3)},
)
HEADERS = st.one_of(VALUES, st.dictionaries(st.sampled_from(["transformer.wte.weight", "a"]), TENSOR_RECORDS))
JSON_BYTES = st.one_of(VALUES.map(lambda value: json.dumps(value).encode()), st.binary(max_size=40))
TARGETS = {
    "edited files": (read_edited, {"name": st.sampled_from([*STATE_FILES, *PICKLED, "model.safetensors"]), "edits": EDITS}),
    "state files": (read_json, {"name": st.sampled_from(STATE_FILES), "content": STATES}),
    "plain data": (read_tree, {"name": st.sampled_from(PICKLED), "tree": TREES, "into": st.booleans()}),
    "safetensors headers": (
        read_header,
        {"header": HEADERS, "tail": st.binary(max_size=16), "length": st.one_of(st.none(), st.integers(0, 2**64 - 1))},
    ),
    "manifests": (read_manifest, {"content": st.one_of(VALUES, RECORDS), "is_signed": st.booleans()}),
    "run.json": (read_record, {"content": JSON_BYTES}),
    "stream positions": (read_stream_position, {"content": JSON_BYTES}),
}  # fmt: skip

if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    feed(TARGETS, __doc__.splitlines()[0])
