"""Copies in host memory: what they hold, when they hold it, and what they share."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from torch import nn

from utils.host_snapshot import ALIGNMENT, HostSnapshot

CPU = torch.device("cpu")


@pytest.fixture
def snapshot() -> HostSnapshot:
    return HostSnapshot(CPU)


def numbers() -> list[torch.Tensor]:
    """One of each kind that a state has: types, a scalar, an empty one, and one that is not contiguous."""
    return [
        torch.arange(10.0), torch.arange(6).view(2, 3), torch.randn(3, 5).t(), torch.tensor(4.0), torch.zeros(0, 7),
        torch.arange(3, dtype=torch.bfloat16), torch.arange(5, dtype=torch.float16), torch.tensor([True, False]),
    ]  # fmt: skip


def test_copies_are_equal_and_their_own(snapshot):
    tensors = numbers()
    copies = snapshot.take(tensors)
    snapshot.fill()
    wanted = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(copies, wanted, strict=True))
    assert all(copy.data_ptr() % ALIGNMENT == 0 for copy in copies if copy.numel())


def test_no_copy_reaches_into_another(snapshot):
    copies = snapshot.take(numbers())
    snapshot.fill()
    for number, copy in enumerate(copies):
        copy.fill_(number % 2)
    assert all((copy == number % 2).all() for number, copy in enumerate(copies))


def test_memory_is_kept_while_sizes_stay(snapshot):
    first = snapshot.take([torch.zeros(100), torch.zeros(7)])
    again = snapshot.take([torch.ones(100), torch.ones(7)])
    snapshot.fill()
    assert [a.data_ptr() for a in first] == [b.data_ptr() for b in again] and first[0].sum() == 100
    [other] = snapshot.take([torch.ones(300)])
    snapshot.fill()
    assert other.sum() == 300


def test_content_comes_with_fill_and_once(snapshot):
    tensor = torch.ones(4)
    [copy] = snapshot.take([tensor])
    copy.zero_()
    tensor.mul_(3)
    snapshot.fill()
    assert copy.sum() == 12
    tensor.mul_(3)
    snapshot.fill()
    assert copy.sum() == 12


def test_what_a_parameter_was_is_copied_whatever_takes_its_place(snapshot):
    """O2 shows its masters in place of the weights while a model is saved, and no longer when the copy is made."""
    parameter = nn.Parameter(torch.ones(4))
    [copy] = snapshot.take([parameter])
    parameter.data = torch.zeros(4)
    snapshot.fill()
    assert copy.sum() == 4 and not copy.requires_grad


def test_a_thread_fills_while_this_one_goes_on(snapshot):
    may_begin = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(may_begin.wait)
        [copy] = snapshot.take([torch.ones(4)])
        copy.zero_()
        filled = snapshot.fill_in(thread)
        assert not filled.done() and copy.sum() == 0
        may_begin.set()
        filled.result()
        assert copy.sum() == 4


def test_a_tree_keeps_its_form(snapshot):
    tree = {"state": {3: {"step": torch.tensor(2.0), "moments": [torch.ones(2), (torch.zeros(3),)]}}, "lr": 0.1}
    found = snapshot.take_tree(tree)
    snapshot.fill()
    tree["state"][3]["moments"][0].zero_()
    tree["lr"] = 0.2
    state = found["state"][3]
    assert found["lr"] == 0.1 and state["step"] == 2 and state["moments"][0].tolist() == [1, 1]
    assert isinstance(state["moments"][1], tuple) and state["moments"][1][0].tolist() == [0, 0, 0]


def test_a_model_keeps_what_it_shares(snapshot):
    model = tiny.gpt2()
    model.register_buffer("seen", torch.ones(2))
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    copy = snapshot.take_model(model)
    places = {buffer.untyped_storage().data_ptr() for buffer in snapshot.buffers.values()}
    assert {value.untyped_storage().data_ptr() for value in copy.state_dict().values()} == places
    snapshot.fill()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    found = copy.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert copy.lm_head.weight is copy.transformer.wte.weight
    size = sum(buffer.numel() for buffer in snapshot.buffers.values())
    assert size < sum(weights.numel() for weights in model.parameters()) * 1.1, "shared weights are copied once"
