"""utils/flops.py: what a model needs, beside a hand's formula and torch's own counter."""

import pytest
import tiny
import tiny_xlnet
import torch
from families import MASKED, make
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel, PreTrainedModel

from utils.flops import count_model_flops
from utils.objectives import masked


def openai_gpt():
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=96, n_embd=32, n_head=2, n_layer=2, n_positions=32))


FAMILIES = {
    "gpt2": tiny.gpt2,
    "openai-gpt": openai_gpt,
    "xlnet": tiny_xlnet.xlnet,
    **{name: lambda name=name: make(name) for name in MASKED},
}


@pytest.mark.parametrize("length", [512, 1024])
def test_gpt2_has_the_flops_of_palms_appendix_b(length):
    """6 N + 12 L H Q T a token, N without the embeddings that only look up."""
    config = GPT2Config()
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    layers, width = config.n_layer, config.n_embd
    parameters = 12 * layers * width**2 + config.vocab_size * width
    by_hand = (6 * parameters + 12 * layers * width * length) * length
    assert count_model_flops(model)(1, length) == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_real_pass_needs_what_two_short_ones_tell(family):
    """torch's counter on real tensors: another length and three samples."""
    model = FAMILIES[family]().eval()
    model.config._attn_implementation = "eager"  # the counter does not know what SDPA does on a CPU
    flops = count_model_flops(model)
    length, batch = 22, 3
    inputs = {"input_ids": torch.ones(batch, length, dtype=torch.int64)}
    if family == "xlnet":
        inputs |= {"perm_mask": torch.zeros(batch, length, length)}
        inputs |= {"target_mapping": torch.eye(length).expand(batch, -1, -1)}
    with FlopCounterMode(display=False) as counter:
        model(**inputs)["logits"].sum().backward()
    assert counter.get_total_flops() == flops(batch, length)


def test_a_head_that_computes_less_lowers_nothing():
    model = make("bert")
    before = count_model_flops(model)
    masked.predict_only_masked(model)
    assert count_model_flops(model) == before


def test_counting_changes_neither_model_nor_random_numbers():
    model = tiny.gpt2()
    state, attention = torch.get_rng_state(), model.config._attn_implementation
    count_model_flops(model)
    assert torch.equal(torch.get_rng_state(), state) and model.config._attn_implementation == attention


def test_a_model_that_looks_at_values_has_no_mfu(caplog):
    class Looks(PreTrainedModel):
        config_class = GPT2Config

        def forward(self, input_ids, attention_mask):
            return input_ids[0, 0].item()

    with caplog.at_level("INFO", logger="utils.flops"):
        assert count_model_flops(Looks(GPT2Config())) is None
    assert "FLOPs of Looks cannot be counted" in caplog.text
