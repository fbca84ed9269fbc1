"""Between two logs a training step reads nothing on the host, whatever is trained: the host runs ahead of the device."""

import pytest
import test_compilation as objectives
import torch
from host_reads import HostReads, MethodReads, Watch
from test_trainer import trainer_for

FLAGS = {
    "default": {},
    "combined": {"use_combine_grad": True},
    "O2-bf16": {"bf16": True, "fp16_opt_level": "O2"},
    "O2-bf16-combined": objectives.O2,
    "accumulating": {"use_combine_grad": True, "gradient_accumulation_steps": 2},
}
# A number that was launched a step before, and copied to pinned memory since then: nothing waits for it.
LATE = "_local_scalar_dense at device.py:get"
# Numbers that no device has ever had: the epoch that tokens are drawn for, and the order of samples.
ON_THE_HOST = ("dynamic_masking.py:__getitem__", "data_loader.py:__iter__")


def reads(folder, make, **flags) -> list[str]:
    watch = Watch(2, 5)
    objectives.train(folder, make, [watch], logging_steps=100, disable_tqdm=False, **flags)
    assert watch.reads.operators > 300
    return watch.reads.places


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(
    "make", [objectives.gpt2, objectives.roberta, objectives.xlnet], ids=lambda make: make.__name__
)
def test_a_step_reads_nothing(tmp_path, make, flags):
    found = reads(tmp_path, make, **FLAGS[flags])
    late = [read for read in found if read == LATE]
    assert [read for read in found if read != LATE and not read.endswith(ON_THE_HOST)] == []
    assert len(late) <= 3


@pytest.mark.parametrize("combined", [True, False])
def test_a_dynamic_loss_scale_is_read_once_a_step(tmp_path, combined):
    found = reads(tmp_path, objectives.gpt2, fp16=True, fp16_opt_level="O2", use_combine_grad=combined)
    assert len(found) == 3, found


def test_every_way_of_reading_is_seen():
    ones = torch.ones(3)
    ways = [
        lambda: ones.sum().item(),
        lambda: bool(ones.sum() > 0),
        lambda: float(ones[0]),
        lambda: ones.nonzero(),
        lambda: ones[ones > 0],
        lambda: torch.equal(ones, ones),
        lambda: ones.tolist(),
        lambda: ones.numpy(),
        lambda: ones.cpu(),
    ]
    for way in ways:
        reads = HostReads()
        with reads, MethodReads(reads.places):
            way()
        assert reads.places, way


def test_a_step_that_reads_is_seen(tmp_path):
    class Reading(objectives.LanguageModelingTrainer):
        def training_step(self, *arguments, **named):
            loss = super().training_step(*arguments, **named)
            return loss * (1 if loss.item() > 0 else 2)

    watch = Watch(2, 5)
    trainer_for(tmp_path, callbacks=[watch], kind=Reading, logging_steps=100).train()
    assert watch.reads.places.count("_local_scalar_dense at test_host_reads.py:training_step") == 3
