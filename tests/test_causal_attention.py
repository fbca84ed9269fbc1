"""utils/causal_attention.py against torch's SDPA, and against attention spelt out where weights are dropped."""

import copy

import pytest
import torch
from torch.nn import functional

from tests import tiny
from utils import causal_attention, cpu_dropout


@pytest.fixture(autouse=True)
def blocks_of_four(monkeypatch):
    monkeypatch.setattr(causal_attention, "ROWS", 4)


def parts(length: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 5, dtype=dtype, generator=generator).requires_grad_() for _ in range(3)]


def keep_all(shape: torch.Size) -> tuple[torch.Tensor, float]:
    return torch.ones(shape, dtype=torch.bool), 1.0


class DrawnBefore:
    """A draw for each block, cut from one for all weights of the batch and its heads."""

    def __init__(self, length: int, probability: float):
        self.kept = torch.rand(6, length, length, generator=torch.Generator().manual_seed(1)) >= probability
        self.scale = 1 / (1 - probability)
        self.rows = 0

    def __call__(self, shape: torch.Size) -> tuple[torch.Tensor, float]:
        start, self.rows = self.rows, self.rows + shape[1]
        return self.kept[:, start : self.rows, : shape[2]].contiguous(), self.scale


@pytest.mark.parametrize("length", [1, 4, 6, 11])
def test_without_dropout_it_is_sdpa(length):
    """Results and gradients to 1e-12 in float64; blocks that do and do not divide the length."""
    given = parts(length)
    ours = causal_attention.attend(*given, 0.3, keep_all)
    stock = functional.scaled_dot_product_attention(*given, is_causal=True, scale=0.3)
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(ours)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((stock * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_what_is_dropped_counts_nowhere():
    """Results and gradients are those of attention spelt out with the same weights dropped, to 1e-12 in float64."""
    given, length = parts(10), 10
    drawn = DrawnBefore(length, 0.4)
    ours = causal_attention.attend(*given, 0.3, drawn)
    query, key, value = given
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    weights = (query @ key.transpose(2, 3) * 0.3).masked_fill(~sees, -torch.inf).softmax(-1)
    stock = (weights * drawn.kept.view(2, 3, length, length) * drawn.scale) @ value
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(ours)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), given),
        torch.autograd.grad((stock * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_differences():
    given = [part[:1, :1].detach().requires_grad_() for part in parts(6)]
    kept = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(2)) >= 0.3

    def attend(*given):
        rows = iter((slice(0, 4), slice(4, 6)))
        return causal_attention.attend(*given, 0.3, lambda shape: (kept[:, next(rows), : shape[2]], 1 / 0.7))

    assert torch.autograd.gradcheck(attend, given)


def test_gpt2_trains_as_with_sdpa(monkeypatch):
    """Without dropout to speak of: loss and gradients of a model, to 1e-6."""
    monkeypatch.setattr(cpu_dropout, "LEAST", 1)
    model = tiny.gpt2(dropout=1e-9).train()
    stock = copy.deepcopy(model)
    cpu_dropout.draw_few_bits(model, "cpu")
    calls = []
    attend = causal_attention.attend
    monkeypatch.setattr(causal_attention, "attend", lambda *given: calls.append(1) or attend(*given))
    ids = torch.randint(0, model.config.vocab_size, (2, 14), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(input_ids=ids, labels=ids).loss, stock(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    ours.backward(), theirs.backward()
    for (name, mine), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)
    assert len(calls) == model.config.n_layer


def test_less_is_kept_for_backward():
    """Of a long sequence: a byte for each weight that is not zero by the mask, not three numbers for each weight."""
    given = parts(64, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        causal_attention.attend(*given, 0.3, keep_all)
    weights = 6 * 64 * 64
    linear = 4 * given[0].numel() * 4
    assert sum(saved.nbytes for saved in kept) <= linear + 0.6 * weights
