"""XLNet's attention (arXiv:1906.08237) for the predicted rows only.

The layers stay transformers'. They are handed who sees whom in another form, and an attention core of the same result that
computes less: the query stream attends from its R predicted positions instead of all L, its relative positions are
gathered; the content stream's are shifted without a copy; and the last layer's content, which nobody reads, is left out.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn

HIDDEN = -3e4  # added to a score: far below any, and within float16


class View(NamedTuple):
    """Who sees whom, for one stream.

    bias: (batch, 1, rows, L), HIDDEN where the row must not see the position and 0 elsewhere.
    relative: int64 (batch, 1, rows, L), which of the 2L relative positions it is from row to position; None where the
        rows are all L positions in turn.
    """

    bias: torch.Tensor
    relative: torch.Tensor | None = None


def relative_attention(
    module: nn.Module,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position_keys: torch.Tensor,
    seg_mat: None = None,
    attn_mask: View | None = None,
    output_attentions: bool = False,
) -> torch.Tensor:
    """What XLNetRelativeAttention.rel_attn_core returns: (rows, batch, heads, size).

    queries: (rows, batch, heads, size). keys, values: (L, batch, heads, size). position_keys: (2L, batch, heads, size).
    """
    assert seg_mat is None and not output_attentions, "our batches have one segment, and nobody reads attentions"
    assert attn_mask is not None
    rows, length = len(queries), len(keys)
    if rows == 0:
        return queries
    # (batch, heads, rows, size), and size before length in what is multiplied with it.
    to_content = ((queries + module.r_w_bias) * module.scale).permute(1, 2, 0, 3)
    to_position = ((queries + module.r_r_bias) * module.scale).permute(1, 2, 0, 3)
    scores = to_content @ keys.permute(1, 2, 3, 0)
    by_position = to_position @ position_keys.permute(1, 2, 3, 0)
    if attn_mask.relative is None:
        # Row i reads the columns L - i on: read as (2L, L), all rows shift when the first is left out.
        batch, heads, _, span = by_position.shape
        by_position = by_position.reshape(batch, heads, span, rows)[:, :, 1:]
        by_position = by_position.reshape(batch, heads, rows, span - 1)[..., :length]
    else:
        by_position = by_position.gather(3, attn_mask.relative.expand_as(scores))
    scores = scores.add_(by_position).add_(attn_mask.bias)
    weights = module.dropout(scores.softmax(dim=-1))
    return (weights @ values.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)


def predict_only_targets(model: nn.Module) -> None:
    """Lets XLNet compute for the positions that a batch names as `predicted_positions`, int64 of shape (batch, rows).

    A row that is not needed may name any position. The batch's `target_mapping` then only tells how many rows there are.
    """
    layers = model.transformer.layer
    now = {}  # of the batch in hand: made before the first layer, read by all

    def take_positions(_: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        now["positions"] = named.pop("predicted_positions")
        return arguments, named

    def look(layer: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        content, *others = arguments
        if layer is layers[0]:
            now["content"], now["query"] = views(named["attn_mask_h"], named["attn_mask_g"], now["positions"])
        if layer is layers[-1]:
            # Keys and values are still made of all content: it comes as the memory of a content of no positions.
            named["mems"], content = content, content[:0]
        named |= {"attn_mask_h": now["content"], "attn_mask_g": now["query"], "target_mapping": None}
        return (content, *others), named

    model.register_forward_pre_hook(take_positions, with_kwargs=True)
    for layer in layers:
        layer.register_forward_pre_hook(look, with_kwargs=True)
        layer.rel_attn.rel_attn_core = functools.partial(relative_attention, layer.rel_attn)


def views(content_mask: torch.Tensor, query_mask: torch.Tensor, positions: torch.Tensor) -> tuple[View, View]:
    """The content and the query stream's view.

    content_mask, query_mask: (L, L, batch, 1), 1 where position i must not see j, as XLNet makes them of a batch's
    perm_mask and attention_mask. positions: int64 (batch, rows).
    """
    length = len(query_mask)
    # (batch, 1, L, L)
    content, query = (mask.permute(2, 3, 0, 1) * HIDDEN for mask in (content_mask, query_mask))
    rows = positions[:, None, :, None]
    of_rows = query.gather(2, rows.expand(-1, -1, -1, length))
    relative = length - rows + torch.arange(length, device=positions.device)
    return View(content.contiguous()), View(of_rows, relative)


def leave_out_segments(model: nn.Module) -> None:
    """Excludes what only token types would use from training: without a gradient each of them would cut the flat buffers."""
    for layer in model.transformer.layer:
        layer.rel_attn.seg_embed.requires_grad_(False)
        layer.rel_attn.r_s_bias.requires_grad_(False)


def follow_half_weights(model: nn.Module) -> None:
    """Lets XLNet's layers run in half precision (O2, O3): positions and `target_mapping` take the type of the weights.

    XLNet makes its relative positions in float32, whatever its weights are, and multiplies them with those.
    """

    def cast(layer: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        dtype = layer.rel_attn.r.dtype
        for name in ("r", "target_mapping"):
            if named.get(name) is not None:
                named[name] = named[name].to(dtype)
        return arguments, named

    for layer in model.transformer.layer:
        layer.register_forward_pre_hook(cast, with_kwargs=True)
