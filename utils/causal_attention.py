"""Causal attention with dropout on a CPU, by blocks of queries that see no key behind them.

torch's SDPA has no kernel for this: with dropout it makes, and keeps for backward, all weights of all heads, of which half
are zero because a token sees none that follow. Here a block's weights are made from the keys up to its end, and made again in
backward, as FlashAttention does (arXiv:2205.14135), which keeps a byte for each weight: whether it was dropped.
This module knows torch only.
"""

import math
from collections.abc import Callable

import torch

ROWS = 128  # of a block


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    draw: Callable[[torch.Size], tuple[torch.Tensor, float]],
) -> torch.Tensor:
    """softmax(query @ key.T * scaling), where a row sees no later position, with dropout, @ value.

    query, key, value: (batch, heads, L, size) of one floating-point type, as is the result. draw: gives, for weights of a
    shape, which are kept (bool) and what those are multiplied with. Gradients are first-order only.
    """
    parts = (part.flatten(0, 1) for part in (query, key, value))
    return _Attention.apply(*parts, scaling, draw).unflatten(0, query.shape[:2])


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + ROWS, length)) for start in range(0, length, ROWS)]


def _weights(scaled_query: torch.Tensor, key: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """What positions start to stop give to those up to stop: (batch * heads, stop - start, stop)."""
    scores = torch.bmm(scaled_query[:, start:stop], key[:, :stop].transpose(1, 2))
    rows = stop - start
    scores[:, :, start:] += torch.full((rows, rows), -math.inf, dtype=scores.dtype, device=scores.device).triu_(1)
    return scores.softmax(dim=-1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scaling, draw):
        scaled = query * scaling
        out = torch.empty_like(value)
        kept_of_blocks, scale = [], 1.0
        for start, stop in _blocks(query.shape[1]):
            weights = _weights(scaled, key, start, stop)
            kept, scale = draw(weights.shape)
            kept_of_blocks.append(kept)
            out[:, start:stop] = torch.bmm(weights.mul_(kept), value[:, :stop])
        out *= scale
        ctx.save_for_backward(scaled, key, value, out, *kept_of_blocks)
        ctx.scaling, ctx.scale = scaling, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        scaled, key, value, out, *kept_of_blocks = ctx.saved_tensors
        d_query = torch.empty_like(scaled)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        # A softmax's gradient takes from each weight's the row's mean of them, which is this product (section 3.1 there).
        means = (gradient * out).sum(dim=-1, keepdim=True)
        of_kept = gradient * ctx.scale
        for (start, stop), kept in zip(_blocks(scaled.shape[1]), kept_of_blocks, strict=True):
            weights = _weights(scaled, key, start, stop)
            some = of_kept[:, start:stop]
            d_scores = torch.bmm(some, value[:, :stop].transpose(1, 2)).mul_(kept)
            d_scores.sub_(means[:, start:stop]).mul_(weights)
            d_value[:, :stop] += torch.bmm(weights.mul_(kept).transpose(1, 2), some)
            d_query[:, start:stop] = torch.bmm(d_scores, key[:, :stop])
            d_key[:, :stop] += torch.bmm(d_scores.transpose(1, 2), scaled[:, start:stop])
        return d_query.mul_(ctx.scaling), d_key, d_value, None, None
