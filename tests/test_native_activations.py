"""utils/native_activations.py against transformers' activations."""

import copy

import families
import pytest
import tiny
import torch
from torch import nn
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel
from transformers.activations import ACT2FN

from utils.native_activations import use_native_activations


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_accurate", "gelu_python", "gelu_python_tanh"])
def test_function_and_derivative_are_the_same(name):
    model = nn.Sequential(ACT2FN[name])
    native = copy.deepcopy(model)
    assert use_native_activations(native) == 1
    x = torch.linspace(-8, 8, 4001, requires_grad=True)
    for function in (lambda net: net(x), lambda net: torch.autograd.grad(net(x).sum(), x)[0]):
        torch.testing.assert_close(
            function(native), function(model), rtol=0, atol=2e-6
        )  # beyond x = -5 transformers' own form loses digits
    exact = x.detach().double()
    assert (native(exact) - model(exact)).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["gelu", "gelu_10", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu", "mish"])
def test_others_stay_what_they_are(name):
    model = nn.Sequential(ACT2FN[name])
    assert use_native_activations(model) == 0
    assert type(model[0]) is type(ACT2FN[name])


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=2)).eval()


@pytest.mark.parametrize(
    ("make", "replaced"),
    [(tiny.gpt2, 2), (gpt, 2), (lambda: families.make("albert"), 2), (lambda: families.make("roberta"), 0)],
    ids=["gpt2", "openai-gpt", "albert", "roberta"],
)
def test_a_models_loss_and_gradients_are_the_same_and_so_is_its_config(make, replaced):
    """ALBERT's layers are one, and its head has another."""
    stock = make()
    native = copy.deepcopy(stock)
    assert use_native_activations(native) == replaced
    assert native.config.to_dict() == stock.config.to_dict()
    assert native.state_dict().keys() == stock.state_dict().keys()
    [ids] = tiny.batches(1)
    losses = [tiny.backward(model, ids) for model in (native, stock)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    pairs = [
        (p.grad, q.grad) for p, q in zip(native.parameters(), stock.parameters(), strict=True) if q.grad is not None
    ]
    largest = max(gradient.abs().max().item() for _, gradient in pairs)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * largest)
