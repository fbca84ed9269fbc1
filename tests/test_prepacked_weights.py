"""utils/prepacked_weights.py against the same layers and models with their weights as they are."""

import copy
import functools

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from utils import chunked_head, device, prepacked_weights, tiled_loss
from utils.prepacked_weights import prepacked

CAPABILITY = torch.backends.cpu.get_cpu_capability()
pytestmark = pytest.mark.skipif(
    CAPABILITY not in ("AVX2", "AVX512"), reason="this processor has no kernels for packed weights"
)


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(prepacked_weights, "GAINS_ON", (CAPABILITY,))
    monkeypatch.setattr(prepacked_weights, "LEAST", 1)
    monkeypatch.setattr(prepacked_weights, "ENOUGH_ROWS", 28)


def operators(function) -> list[str]:
    """The names of the products that `function` runs."""
    with torch.profiler.profile() as profile:
        function()
    return [event.name for event in profile.events() if event.name in ("mkldnn::_linear_pointwise", "aten::addmm")]


@pytest.mark.parametrize("layer", [nn.Linear(24, 40), nn.Linear(24, 40, bias=False), Conv1D(40, 24)])
def test_a_layer_gives_the_same_once_it_has_seen_enough_rows(layer):
    rows = torch.randn(2, 7, 24)
    nn.init.normal_(layer.weight)
    with torch.no_grad():
        expected = layer(rows)
        with prepacked(layer, (Conv1D,)) as count:
            assert count == 1
            assert torch.equal(layer(rows), expected)
            assert operators(lambda: layer(rows)) == ["mkldnn::_linear_pointwise"]
            torch.testing.assert_close(layer(rows), expected, rtol=1e-5, atol=1e-5)
        assert "forward" not in vars(layer)
        layer.weight.mul_(2)
        with prepacked(layer, (Conv1D,)):
            layer(rows)
            doubled = layer(rows) - (0 if layer.bias is None else layer.bias)
        undoubled = expected - (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(doubled, 2 * undoubled, rtol=1e-5, atol=1e-5)


def test_rows_of_all_uses_count():
    layer = nn.Linear(8, 8)
    with torch.no_grad(), prepacked(layer):
        for rows, products in ((1, ["aten::addmm"]), (26, ["aten::addmm"]), (1, ["mkldnn::_linear_pointwise"])):
            assert operators(functools.partial(layer, torch.randn(rows, 8))) == products
    with torch.no_grad(), prepacked(layer):
        assert operators(lambda: layer(torch.randn(4, 7, 8))) == ["mkldnn::_linear_pointwise"]


def test_what_cannot_be_packed_is_as_it_was():
    half, own = nn.Linear(8, 8).half(), nn.Linear(8, 8)
    own.forward = lambda rows: rows
    with prepacked(nn.ModuleList([half, own, nn.LayerNorm(8), Conv1D(8, 8)])) as count:
        assert count == 0
    assert own(3) == 3


@pytest.mark.parametrize("way", ["gradients", "autocast"])
def test_gradients_and_autocast_have_the_plain_layer(way):
    layer, rows = nn.Linear(8, 8), torch.randn(3, 8)
    with prepacked(layer) as count, torch.set_grad_enabled(way == "gradients"):
        assert count == 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
            for _ in range(3):
                found = layer(rows)
    assert found.requires_grad == (way == "gradients")
    assert found.dtype == (torch.bfloat16 if way == "autocast" else torch.float32)


def test_a_small_weight_is_not_worth_it(monkeypatch):
    monkeypatch.setattr(prepacked_weights, "LEAST", 65)
    with prepacked(nn.Linear(8, 8)) as count:
        assert count == 0


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_that_gives_sums_has_its_tiles_packed(bias, monkeypatch):
    monkeypatch.setattr(tiled_loss, "COLUMNS_WITHOUT_GRADIENTS", 20)
    model = tiny.gpt2().eval()
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(tiny.VOCABULARY))
    expected_of = copy.deepcopy(model)
    assert chunked_head.give_sums(model, shift=True) and chunked_head.give_sums(expected_of, shift=True)
    ids = torch.stack(tiny.batches(2)).flatten(0, 1)
    with torch.no_grad():
        expected = expected_of(input_ids=ids, targets=ids).logits
        with prepacked(model, (Conv1D,)) as count:
            assert count == 2 * 4 + 1
            for _ in range(3):
                torch.testing.assert_close(model(input_ids=ids, targets=ids).logits, expected, rtol=1e-5, atol=1e-6)
            packed = operators(lambda: model(input_ids=ids, targets=ids))
            assert packed == ["mkldnn::_linear_pointwise"] * (2 * 4 + 5)
            assert len(model.lm_head.prepacked.copies) == 5
        assert model.lm_head.prepacked is None
        assert torch.equal(model(input_ids=ids, targets=ids).logits, expected)


def trainer_in(folder):
    """A trainer of a tiny GPT-2 that evaluates after each second of six steps."""
    from utils.objectives import causal
    from utils.trainer import LanguageModelingTrainer
    from utils.training_arguments import LanguageModelingArguments

    args = LanguageModelingArguments(
        output_dir=str(folder), max_steps=6, eval_strategy="steps", eval_steps=2, learning_rate=1e-2,
        per_device_train_batch_size=4, per_device_eval_batch_size=2, use_cpu=True, report_to="none", save_strategy="no",
        use_combine_grad=True, disable_tqdm=True,
    )  # fmt: skip
    samples = [{"input_ids": ids.numpy()} for batch in tiny.batches(4) for ids in batch]
    model = tiny.gpt2()
    in_chunks = causal.predict_in_chunks(model)
    return LanguageModelingTrainer(
        model=model, args=args, train_dataset=samples, eval_dataset=samples, data_collator=causal.collate,
        head_gives_sums=in_chunks, token_sums=causal.token_sums,
    )  # fmt: skip


@pytest.fixture
def packings(monkeypatch) -> list:
    """One entry for each evaluation that has packed weights."""
    found, prepacked_for = [], prepacked_weights.prepacked
    monkeypatch.setattr(
        prepacked_weights, "prepacked", lambda model, transposed: found.append(1) or prepacked_for(model, transposed)
    )
    return found


def test_evaluations_within_training_see_its_weights(tmp_path, monkeypatch, packings):
    """Three evaluations, each by the weights of its step; where memory is short, by weights as they are."""

    def losses(free: int) -> list[float]:
        monkeypatch.setattr(device, "memory", lambda on: {"free": free, "total": free, "peak": 0})
        trainer = trainer_in(tmp_path / str(free))
        trainer.train()
        return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]

    packed = losses(free=2**30)
    assert len(packings) == 3
    plain = losses(free=2**10)
    assert len(packings) == 3
    assert len(packed) == 3 and packed[2] < 0.95 * packed[0]
    assert packed == pytest.approx(plain, rel=1e-6)


def test_each_process_of_the_host_needs_room(tmp_path, monkeypatch, packings):
    trainer = trainer_in(tmp_path)
    room = 6 * trainer.model.get_memory_footprint(return_buffers=False)
    monkeypatch.setattr(device, "memory", lambda on: {"free": room, "total": room, "peak": 0})
    for processes, packs in (("1", 1), ("2", 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        packings.clear()
        trainer.evaluate()
        assert len(packings) == packs


def test_where_packing_gains_nothing_weights_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(prepacked_weights, "GAINS_ON", ())
    with prepacked(tiny.gpt2(), (Conv1D,)) as count:
        assert count == 0
