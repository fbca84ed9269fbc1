"""Checks of the simulated NPU itself, run in one process by test_simulator.py: a process can have only one such device.

    PYTHONPATH=tests/npu/simulator:tests:tests/npu python tests/npu/simulator_checks.py

prints {name: null, or the traceback of what failed} as JSON. The machine has two devices.
"""

import io
import json
import sys
import traceback

import torch
import torch_npu
from torch.nn import functional

NPU = torch.device("npu:0")


def raises(words: str, call) -> None:
    try:
        call()
    except RuntimeError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"did not raise: {words}")


def record(work) -> list:
    torch_npu._device.start_recording("")
    work()
    return [(r.phase, r.name, r.tensors, r.place) for r in torch_npu._device.stop_recording()]


def check_it_says_that_it_is_simulated():
    assert "simulated" in torch_npu.__version__ and "Simulated" in torch.npu.get_device_name()


def check_torch_finds_it():
    assert torch.accelerator.current_accelerator() == torch.device("npu")
    assert torch.npu.is_available() and torch.npu.device_count() == 2
    assert torch.zeros(2, device="npu").device == NPU
    with torch.npu.device(1):
        assert torch.zeros(2, device="npu").device == torch.device("npu:1")
    raises("does not exist", lambda: torch.npu.set_device(2))


def check_results_are_the_cpus():
    first, second = torch.randn(5, 7), torch.randn(7, 3)
    assert torch.equal((first.to(NPU) @ second.to(NPU)).cpu(), first @ second)
    assert torch.equal(first.to(NPU).t()[2:].contiguous().softmax(-1).cpu(), first.t()[2:].softmax(-1))


def check_views_share_memory():
    tensor = torch.zeros(4, 6, device=NPU)
    tensor.view(24)[6:].add_(1)
    tensor.t()[0].fill_(5)
    assert tensor.cpu().tolist() == [[5, 0, 0, 0, 0, 0]] + [[5, 1, 1, 1, 1, 1]] * 3


def check_tied_weights_stay_tied():
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False))
    model[1].weight = model[0].weight
    parameter = model[0].weight
    model.to("npu")
    assert model[1].weight is model[0].weight is parameter
    model(torch.tensor([1, 2], device=NPU)).sum().backward()
    assert parameter.grad.device == NPU


def check_tensors_of_two_devices_do_not_meet():
    here, there, host = torch.ones(3, device=NPU), torch.ones(3, device="npu:1"), torch.ones(3)
    raises("one device", lambda: here + there)
    raises("one device", lambda: here + host)
    raises("one device", lambda: host.to(NPU).add_(host))
    raises("one device", lambda: torch.stack([here[0], host[0]]))
    raises("one device", lambda: functional.embedding(torch.tensor([1]), torch.ones(3, 2, device=NPU)))
    raises("one device", lambda: torch._foreach_add_([here, here], [here, host]))
    assert (here + torch.tensor(1.0)).sum().item() == 6  # numbers may come from the host
    assert here[torch.tensor([0, 2])].sum().item() == 2  # and so may indices


def check_each_device_has_its_own_random_numbers():
    host = torch.get_rng_state()
    torch.npu.manual_seed_all(3)
    first = torch.rand(4, device=NPU)
    assert torch.equal(torch.get_rng_state(), host)
    state = torch.npu.get_rng_state()
    second = functional.dropout(torch.ones(50, device=NPU))
    torch.npu.set_rng_state(state)
    assert torch.equal(functional.dropout(torch.ones(50, device=NPU)), second)
    assert torch.equal(torch.rand(4, device="npu:1").cpu(), first.cpu())  # seeded alike, drawn from apart
    assert not torch.equal(torch.rand(4, device=NPU), first)
    torch.manual_seed(3)  # seeds all devices
    assert torch.equal(torch.rand(4, device=NPU), first)
    generator = torch.Generator(device="npu").manual_seed(3)
    assert torch.equal(torch.rand(4, device=NPU, generator=generator), first)
    # torch itself refuses it here, with its own words.
    raises("generator", lambda: torch.rand(4, device=NPU, generator=torch.Generator()))


def check_checkpointing_draws_the_same_random_numbers_again():
    masks = []

    def work(tensor):
        masks.append(functional.dropout(torch.ones(64, device=NPU)))
        return tensor * masks[-1]

    tensor = torch.ones(64, device=NPU, requires_grad=True)
    torch.utils.checkpoint.checkpoint(work, tensor, use_reentrant=False).sum().backward()
    assert len(masks) == 2 and torch.equal(masks[0], masks[1])


def check_autocast_takes_torchs_lists():
    tensor = torch.ones(4, 4, device=NPU)
    with torch.autocast("npu", dtype=torch.float16):
        product = tensor @ tensor
        assert product.dtype == torch.float16 and product.softmax(-1).dtype == torch.float32


def check_saving_and_loading():
    file = io.BytesIO()
    torch.save(torch.arange(4, device="npu:1"), file)
    for location, device in ((None, "npu:1"), ("npu:0", "npu:0"), ("cpu", "cpu")):
        file.seek(0)
        loaded = torch.load(file, map_location=location)
        assert loaded.device == torch.device(device) and loaded.tolist() == [0, 1, 2, 3]


def check_pinned_memory_is_remembered():
    tensor = torch.ones(3)
    assert not tensor.is_pinned() and tensor.pin_memory().is_pinned() and tensor.pin_memory()[1:].is_pinned()


def check_memory_is_counted():
    before = torch.npu.memory_allocated()
    torch.npu.reset_peak_memory_stats()
    tensor = torch.ones(1000, device=NPU)
    assert torch.npu.memory_allocated() - before == 4000
    del tensor
    assert torch.npu.memory_allocated() == before and torch.npu.max_memory_allocated() - before == 4000


def check_records_show_what_does_not_suit_an_npu():
    """Each finding of fitness.py can be made: a record that cannot show a fault proves nothing."""
    import fitness

    tensor, index = torch.rand(4, 4, device=NPU), torch.tensor([0, 1], device=NPU)
    good = record(lambda: (tensor @ tensor).add_(1).gather(1, index.expand(4, 2)).view(8).detach()[1:])
    assert [name for _, name, *_ in good] == ["mm", "add_.Tensor", "gather"]
    assert fitness.outside_native(good) == fitness.data_dependent(good) == fitness.host_waits(good) == []
    assert good[0][2] == ["npu Float[4, 4]"] * 2

    assert fitness.outside_native(record(lambda: torch.special.bessel_j0(tensor))) == ["special_bessel_j0.out"]
    for work in (lambda: tensor[tensor > 0], lambda: tensor.nonzero(), lambda: tensor.masked_select(tensor > 0)):
        assert len(fitness.data_dependent(record(work))) == 1
    mask = tensor > 0
    assert len(fitness.data_dependent(record(lambda: tensor.clone().index_put_((mask,), tensor.sum())))) == 1
    assert fitness.data_dependent(record(lambda: tensor[index])) == []
    for work in (
        lambda: tensor.sum().item(),
        lambda: tensor.cpu(),
        lambda: torch.equal(tensor, tensor),
        lambda: bool((tensor > 2).any()),
        lambda: torch.npu.synchronize(),
    ):
        [wait] = fitness.host_waits(record(work))
        assert "simulator_checks.py" in wait, wait
    assert fitness.shapes(record(lambda: tensor + 1)) != fitness.shapes(record(lambda: tensor[:2] + 1))


def check_operators_torch_would_take_apart_are_whole_where_the_device_has_them():
    import fitness

    tensors = [torch.ones(2, device=NPU), torch.ones(3, device=NPU)]
    assert [name for _, name, *_ in record(lambda: torch._foreach_add_(tensors, 1.0))] == ["_foreach_add_.Scalar"]
    # This one it has not: torch multiplies one by one.
    assert "_foreach_mul_.Tensor" not in fitness.native_operators()
    two = torch.tensor(2.0, device=NPU)
    assert [name for _, name, *_ in record(lambda: torch._foreach_mul_(tensors, two))] == ["mul_.Tensor"] * 2


if __name__ == "__main__":
    outcome: dict[str, str | None] = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                outcome[name] = None
            except Exception:
                outcome[name] = traceback.format_exc()
    json.dump(outcome, sys.stdout)
