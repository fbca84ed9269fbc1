"""Dropout on a CPU from sixteen random bits an element.

torch's CPU generator makes a number of 64 bits for each element, on one thread, which for the attention weights of a model
of real size takes a tenth of a training step. A quarter of that number does, from a quicker generator. The law is
dropout's, the draws are others than stock transformers'; small tensors, whose draws take no time, have torch's.
What is remembered for backward is a byte an element in place of four.
"""

import functools
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from utils import causal_attention

LEVELS = 2**16
LEAST = 2**18  # elements of a tensor that is not left to torch
ATTENTION = "sdpa_cpu_dropout"  # the name by which transformers calls `attention`


def draw_few_bits(model: nn.Module, device_type: str) -> int:
    """Lets `model`, on a CPU, drop by this module; returns how many nn.Dropout it has replaced.

    Attention follows where it is SDPA. Probabilities are rounded to multiples of 2**-16. Nothing that is saved changes.
    """
    if device_type != "cpu":
        return 0
    replaced = 0
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, FewBitsDropout(child.p))
                replaced += 1
    if model.config._attn_implementation == "sdpa":
        model.config._attn_implementation = ATTENTION
    return replaced


class FewBitsDropout(nn.Dropout):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        few_bits = self.training and 0 < self.p < 1 and values.device.type == "cpu" and values.numel() >= LEAST
        if not few_bits or torch.compiler.is_compiling():
            return functional.dropout(values, self.p, self.training)
        kept, scale = draw(values.shape, self.p)
        return Keep.apply(values, kept) * scale


def draw(shape: torch.Size, probability: float) -> tuple[torch.Tensor, float]:
    """(what is kept, bool of this shape; what that is multiplied with). torch's generator of the CPU gives the seed."""
    count = math.prod(shape)
    dropped = round(probability * LEVELS)
    bits = np.random.SFC64(int(torch.randint(2**63 - 1, ()))).random_raw(math.ceil(count / 4)).view(np.int16)
    kept = torch.from_numpy(bits)[:count] >= dropped - LEVELS // 2
    return kept.view(shape), LEVELS / (LEVELS - dropped)


class Keep(torch.autograd.Function):
    """values where `kept`, else 0."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(kept)
        return values * kept

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (kept,) = ctx.saved_tensors
        return gradient * kept, None


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **named,
) -> tuple[torch.Tensor, None]:
    """Of transformers' AttentionInterface; as sdpa_attention_forward, which does all that is not float32 with dropout.

    query, key, value: (batch, heads, L, size). attention_mask: bool, true where a row sees a position, or float, added.
    Returns (batch, L, heads, size).
    """
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    few_bits = 0 < dropout < 1 and query.device.type == "cpu" and query.dtype == torch.float32
    large = math.prod(query.shape[:3]) * key.shape[2] >= LEAST
    alike = key.shape[1] == query.shape[1] and (key.shape[2] == query.shape[2] or not causal)
    if not few_bits or not large or not alike or torch.compiler.is_compiling():
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **named,
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if causal:
        attended = causal_attention.attend(query, key, value, scaling, functools.partial(draw, probability=dropout))
        return attended.transpose(1, 2).contiguous(), None
    scores = (query * scaling) @ key.transpose(2, 3)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    kept, scale = draw(scores.shape, dropout)
    weights = Keep.apply(scores.softmax(dim=-1), kept)
    return (weights @ (value * scale)).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
