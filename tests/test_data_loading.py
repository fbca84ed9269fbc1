"""utils/data_loading.py: what a run gets that says nothing of how batches are loaded."""

import json

import pytest
from test_compilation import gpt2, roberta
from test_trainer import arguments

from utils import data_loading


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"non_blocking": True}),
        ({"even_batches": False}, {"even_batches": False, "non_blocking": True}),
        ('{"split_batches": true}', {"split_batches": True, "non_blocking": True}),
        ({"non_blocking": False}, {"non_blocking": False}),
        ('{"non_blocking": false}', '{"non_blocking": false}'),
    ],
)
def test_copies_run_beside_the_computation_unless_told_otherwise(given, expected):
    assert data_loading.copies_beside_computing(given) == expected


def test_a_file_is_read(tmp_path):
    file = tmp_path / "accelerate.json"
    file.write_text(json.dumps({"even_batches": False}))
    assert data_loading.copies_beside_computing(str(file)) == {"even_batches": False, "non_blocking": True}


def test_a_cpu_copies_nothing(tmp_path):
    assert not arguments(tmp_path).accelerator_config.non_blocking


@pytest.mark.parametrize(
    ("accelerator", "cores", "gibibytes", "expected"),
    [
        (False, 64, 64, 0),  # a CPU computes itself
        (True, 16, 64, 2),
        (True, 3, 64, 1),
        (True, 2, 64, 0),
        (True, 1, 64, 0),
        (True, 16, 0.0625, 0),  # a container's default
    ],
)
def test_workers_are_had_where_there_is_room_for_them(accelerator, cores, gibibytes, expected):
    assert data_loading.workers(accelerator, cores, int(gibibytes * 2**30)) == expected


@pytest.mark.parametrize(
    ("given", "expected"), [({}, 2), ({"dataloader_num_workers": 0}, 0), ({"dataloader_num_workers": 1}, 1)]
)
def test_drawn_samples_get_workers_where_none_are_given(given, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(data_loading, "workers", lambda *room: 2)
    args = arguments(tmp_path, **given)
    _, drawn, _ = roberta()
    data_loading.settle(args, drawn)
    assert (args.dataloader_num_workers, args.dataloader_persistent_workers) == (expected, expected == 2)


def test_blocks_are_read_without_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(data_loading, "workers", lambda *room: 2)
    args = arguments(tmp_path)
    _, blocks, _ = gpt2()
    data_loading.settle(args, blocks)
    assert args.dataloader_num_workers == 0
