"""A tiny XLNet and its batches."""

import numpy as np
import pytest
import torch
from transformers import XLNetConfig, XLNetLMHeadModel

from utils.objectives import dynamic_masking, permutation, predicted_rows, relative_attention
from utils.packing import Blocks

VOCABULARY = 100
MASK, PAD, SPECIAL_IDS = 6, 5, (0, 1, 2, 3, 4, 5, 6)  # XLNet's ids; those from 7 on are words
WORD = 7


def xlnet(inputs: dict | None = None, dropout: float = 0.0) -> XLNetLMHeadModel:
    """A tiny XLNet, its mask embedding and biases drawn as well, so that no gradient is trivially zero.

    It predicts only what `inputs` name as predicted, if they do.
    """
    torch.manual_seed(0)
    model = XLNetLMHeadModel(
        XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=2, d_inner=64, dropout=dropout)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if inputs is not None and "predicted_positions" in inputs:
        relative_attention.predict_only_targets(model)
    return model


def text(count: int = 16, length: int = 32, seed: int = 0, special: bool = True) -> Blocks:
    ids = np.random.default_rng(seed).integers(WORD, VOCABULARY, (count, length))
    if special:
        ids[:, -2:] = 4, 3  # <sep> <cls>
        ids[:, length // 3] = 4
    return Blocks(ids.astype(np.int32))


def law(plm_probability=1 / 6, max_span_length=5, full_head=False, special=SPECIAL_IDS) -> permutation.PermutationLaw:
    is_functional = np.isin(np.arange(VOCABULARY), special)
    return permutation.PermutationLaw(plm_probability, max_span_length, MASK, is_functional, full_head)


def dataset(samples=None, seed: int = 1, **options) -> dynamic_masking.DrawnSamples:
    return dynamic_masking.DrawnSamples(text() if samples is None else samples, law(**options), seed)


def batch(samples: dynamic_masking.DrawnSamples, count: int = 4, **options) -> dict[str, torch.Tensor]:
    collate = permutation.PermutationCollator(PAD, full_head=samples.law.full_head, **options)
    return collate([samples[index] for index in range(count)])


def mean_loss(model: XLNetLMHeadModel, inputs: dict) -> torch.Tensor:
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    return predicted_rows.loss_sum(model(**inputs).logits, labels) / (labels != -100).sum()


def gradients(model: XLNetLMHeadModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(one: dict, other: dict) -> None:
    """The two batches give the same loss and gradients, to 1e-6."""
    models = [xlnet(inputs) for inputs in (one, other)]
    losses = [mean_loss(model, inputs) for model, inputs in zip(models, (one, other), strict=True)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    expected, found = (gradients(model, loss) for model, loss in zip(models, losses, strict=True))
    assert expected.keys() == found.keys()
    assert {"transformer.mask_emb", "transformer.word_embedding.weight", "lm_loss.bias"} <= expected.keys()
    for name in expected:
        assert torch.allclose(expected[name], found[name], atol=1e-6, rtol=1e-5), name
