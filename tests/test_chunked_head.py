"""utils/chunked_head.py: models of all families with their loss in chunks, against transformers' own loss on whole logits."""

import copy

import families
import pytest
import tiny
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

from utils import chunked_head, chunked_loss
from utils.objectives import causal, predicted_rows

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=2))


def llama() -> nn.Module:
    """Its head has a weight of its own."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=tiny.VOCABULARY, num_key_value_heads=2, **SIZES))


CAUSAL = {"gpt2": tiny.gpt2, "openai-gpt": gpt, "llama": llama}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(chunked_loss.CHUNK_BYTES, "cpu", 4 * tiny.VOCABULARY * 16)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(model: nn.Module, stock: nn.Module) -> None:
    expected = gradients(stock)
    assert gradients(model).keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_has_transformers_loss_gradients_and_evaluation(name):
    stock = CAUSAL[name]().eval()
    model = copy.deepcopy(stock)
    assert causal.predict_in_chunks(model) and not model.training
    [ids] = tiny.batches(1, length=32)
    labels = ids.clone()
    labels[1, 5:9] = -100
    targets = (labels[:, 1:] != -100).sum()

    expected = stock(input_ids=ids, labels=labels, use_cache=False)
    expected.loss.backward()
    model.train()
    for module in model.modules():  # its training's only other trait
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss = model(input_ids=ids, targets=labels).logits / targets
    loss.backward()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert_same_gradients(model, stock)

    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids, targets=labels).logits, causal.token_sums(expected.logits, labels), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("name", families.MASKED)
def test_a_masked_model_has_the_loss_and_gradients_of_whole_logits(name):
    stock = families.make(name)
    model = copy.deepcopy(stock)
    assert chunked_head.give_sums(model, label_smoothing=0.1)
    ids = torch.randint(5, families.VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(32) % 3 == 0, ids, predicted_rows.IGNORED)
    expected = predicted_rows.loss_sum(stock(input_ids=ids).logits, labels, 0.1)
    loss = model(input_ids=ids, targets=labels).logits
    expected.backward()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(model, stock)


def test_without_targets_a_model_gives_its_logits_and_generates(tmp_path):
    stock = tiny.gpt2().eval()
    model = copy.deepcopy(stock)
    assert causal.predict_in_chunks(model)
    [ids] = tiny.batches(1)
    with torch.no_grad():
        model(input_ids=ids, targets=ids)
        assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)
    generate = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **generate), stock.generate(ids, **generate))

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == stock.state_dict().keys()
    assert torch.equal(loaded(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_a_model_that_does_more_with_its_logits_keeps_them():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=tiny.VOCABULARY, head_dim=16, num_key_value_heads=2, final_logit_softcapping=0.01, **SIZES
    )
    model = Gemma2ForCausalLM(config).train()
    [ids] = tiny.batches(1)
    before = model(input_ids=ids).logits
    assert not causal.predict_in_chunks(model) and model.training
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not model._forward_pre_hooks and "forward" not in vars(model.lm_head)


def test_experts_whose_balance_counts_in_the_loss_keep_transformers_loss():
    config = MixtralConfig(
        vocab_size=tiny.VOCABULARY, num_key_value_heads=2, num_local_experts=2, output_router_logits=True, **SIZES
    )
    assert not causal.predict_in_chunks(MixtralForCausalLM(config))
    config.output_router_logits = False
    assert causal.predict_in_chunks(MixtralForCausalLM(config))


def test_an_attention_that_runs_on_a_device_only_does_not_keep_the_head_whole():
    model = tiny.gpt2()
    model.config._attn_implementation = "flash_attention_2"
    assert causal.predict_in_chunks(model)
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("positions", [2, 3])
def test_a_model_of_few_positions(positions):
    config = GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=32, n_head=2, n_layer=1, n_positions=positions)
    assert causal.predict_in_chunks(GPT2LMHeadModel(config))


def test_another_head_than_a_plain_linear_layer_is_left_alone():
    class Scaled(nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model = tiny.gpt2()
    model.lm_head = Scaled(32, tiny.VOCABULARY)
    assert not chunked_head.give_sums(model)
    assert not model._forward_pre_hooks
