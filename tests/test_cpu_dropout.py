"""utils/cpu_dropout.py against torch's dropout and transformers' SDPA."""

import copy

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, BertConfig, BertForMaskedLM, DistilBertConfig, RobertaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from utils import cpu_dropout

LEAST = cpu_dropout.LEAST


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch):
    monkeypatch.setattr(cpu_dropout, "LEAST", 1)


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def bert(dropout: float = 0.1) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(**SIZES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    ).train()


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_law_is_dropouts(probability):
    torch.manual_seed(0)
    kept, scale = cpu_dropout.draw(torch.Size([400, 1003]), probability)
    deviation = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(kept.float().mean() - (1 - probability)) < 4 * deviation + 2**-16
    assert scale == pytest.approx(1 / (1 - probability), rel=2**-14)
    # Neighbours come of one number: what is kept of one must say nothing of the next.
    pairs = kept.flatten()[:-1].float() - kept.float().mean(), kept.flatten()[1:].float() - kept.float().mean()
    assert abs((pairs[0] * pairs[1]).mean()) < 4 * probability * (1 - probability) / kept.numel() ** 0.5
    for lane in range(4):  # the sign bit of each quarter is drawn too
        assert abs(kept.flatten()[lane::4].float().mean() - (1 - probability)) < 8 * deviation + 2**-16


def test_values_are_zero_or_scaled_and_gradients_likewise():
    torch.manual_seed(0)
    values = torch.randn(64, 33, requires_grad=True)
    dropped = cpu_dropout.FewBitsDropout(0.25)(values)
    kept = dropped != 0
    torch.testing.assert_close(dropped, values * kept / 0.75)
    dropped.sum().backward()
    torch.testing.assert_close(values.grad, kept / 0.75)
    assert 0.6 < kept.float().mean() < 0.9


def test_a_seed_repeats_it_and_the_generator_moves_on():
    dropout, values = cpu_dropout.FewBitsDropout(0.5), torch.ones(100)
    torch.manual_seed(3)
    first, second = dropout(values), dropout(values)
    torch.manual_seed(3)
    assert torch.equal(dropout(values), first) and not torch.equal(first, second)


def test_evaluation_drops_nothing():
    values = torch.randn(10)
    assert torch.equal(cpu_dropout.FewBitsDropout(0.5).eval()(values), values)
    assert torch.equal(cpu_dropout.FewBitsDropout(0.0)(values), values)
    assert not cpu_dropout.FewBitsDropout(1.0)(values).any()


def test_small_tensors_have_torchs_draws(monkeypatch):
    """Bit for bit: transformers' numbers at a seed, where its draws take no time."""
    monkeypatch.setattr(cpu_dropout, "LEAST", LEAST)
    values, module = torch.randn(2, 8, 64, 16), nn.Module()
    for call, stock in (
        (lambda: cpu_dropout.FewBitsDropout(0.3)(values), lambda: nn.Dropout(0.3)(values)),
        (
            lambda: cpu_dropout.attention(module, values, values, values, None, dropout=0.3)[0],
            lambda: sdpa_attention_forward(module, values, values, values, None, dropout=0.3)[0],
        ),
    ):
        torch.manual_seed(1)
        ours = call()
        torch.manual_seed(1)
        assert torch.equal(ours, stock())
    large = torch.ones(LEAST)
    torch.manual_seed(1)
    ours = cpu_dropout.FewBitsDropout(0.3)(large)
    torch.manual_seed(1)
    assert not torch.equal(ours, nn.Dropout(0.3)(large))


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_attention_is_sdpas_with_the_weights_that_are_kept(mask):
    """Without dropout (of a probability too small to be drawn) losses and gradients are SDPA's to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 3, 7, 4, generator=generator).requires_grad_() for _ in range(3)]
    sees = torch.rand(2, 1, 7, 7, generator=generator) < 0.7
    sees |= torch.eye(7, dtype=torch.bool)
    given = {"bool": sees, "float": torch.where(sees, 0.0, torch.finfo(torch.float32).min)}.get(mask)
    module = nn.Module()
    module.is_causal = mask == "causal"
    ours, _ = cpu_dropout.attention(module, *parts, given, dropout=1e-9, scaling=0.3)
    stock, _ = sdpa_attention_forward(module, *parts, given, dropout=0.0, scaling=0.3)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)
    weight = torch.randn(ours.shape, generator=generator)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), parts),
        torch.autograd.grad((stock * weight).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_attention_drops_weights_not_values():
    """One position to see: its weight is 1, so what comes out is its value, scaled, or nothing."""
    torch.manual_seed(0)
    value = torch.ones(1, 1, 1, 4).expand(64, 8, 1, 4)
    module = nn.Module()
    module.is_causal = False
    out, _ = cpu_dropout.attention(module, value, value, value, None, dropout=0.5)
    assert set(out.unique().tolist()) == {0.0, 2.0} and 0.3 < (out > 0).float().mean() < 0.7
    assert (out.amin(-1) == out.amax(-1)).all()


@pytest.mark.parametrize("config", [AlbertConfig, BertConfig, DistilBertConfig, RobertaConfig])
def test_models_have_all_of_it_and_evaluate_as_before(config):
    from transformers import AutoModelForMaskedLM

    sizes = {**SIZES, "embedding_size": 16, "attention_probs_dropout_prob": 0.1} if config is AlbertConfig else SIZES
    if config is DistilBertConfig:
        sizes = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config(**sizes))
    stock = copy.deepcopy(model)
    assert cpu_dropout.draw_few_bits(model, "cpu") > 0
    assert not [child for child in model.modules() if type(child) is nn.Dropout]
    assert model.state_dict().keys() == stock.state_dict().keys()
    batch = {"input_ids": torch.randint(5, 50, (2, 12)), "attention_mask": torch.tensor([[1] * 12, [1] * 8 + [0] * 4])}
    model.eval(), stock.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits[0], stock(**batch).logits[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(**batch).logits[1, :8], stock(**batch).logits[1, :8], rtol=1e-5, atol=1e-6)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


def test_the_mean_of_many_draws_is_the_model_without_dropout():
    """Of the attention's output, which is linear in what is dropped: to four standard errors."""
    torch.manual_seed(0)
    parts = [torch.randn(1, 2, 6, 4) for _ in range(3)]
    module = nn.Module()
    module.is_causal = False
    many = [part.expand(4000, -1, -1, -1) for part in parts]
    ours, _ = cpu_dropout.attention(module, *many, None, dropout=0.3)
    expected, _ = sdpa_attention_forward(module, *parts, None)
    error = ours.std(0) / 4000**0.5
    assert ((ours.mean(0) - expected[0]).abs() < 5 * error + 1e-6).all()


def test_what_is_not_on_a_cpu_is_left_alone():
    model = bert()
    assert cpu_dropout.draw_few_bits(model, "cuda") == 0
    assert model.config._attn_implementation == "sdpa"


def test_the_saved_configuration_knows_nothing_of_it(tmp_path):
    model = bert()
    cpu_dropout.draw_few_bits(model, "cpu")
    model.save_pretrained(tmp_path)
    assert cpu_dropout.ATTENTION not in (tmp_path / "config.json").read_text()
    assert BertForMaskedLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
