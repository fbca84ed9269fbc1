"""utils/objectives/relative_attention.py: XLNet's attention for predicted rows equals its own."""

import pytest
import torch
from tiny_xlnet import assert_same_training, batch, dataset, mean_loss, text, xlnet

from utils.objectives import relative_attention


@pytest.mark.parametrize("lengths", [[32], [33], [32, 11, 24, 7]])
def test_layers_compute_predicted_rows_and_the_last_one_no_content(lengths):
    samples = [text(1, length, seed=length)[0] for length in lengths]
    sparse, full = (batch(dataset(samples, full_head=full_head), len(samples)) for full_head in (False, True))
    assert_same_training(sparse, full)
    model = xlnet(sparse)
    seen = []
    for layer in model.transformer.layer:
        layer.ff.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[0]))
    mean_loss(model, sparse)
    length, count = sparse["input_ids"].shape[1], sparse["labels"].shape[1]
    assert seen == [count, length, count, 0]  # of each layer the query, then the content


@pytest.mark.parametrize("rows_are_all", [False, True])
def test_the_attention_core_is_xlnets(rows_are_all):
    """On random queries, keys and views: the value and all gradients, to 1e-6."""
    length, count, heads, size = 9, 4, 2, 16
    attention = xlnet().transformer.layer[0].rel_attn.eval()
    queries, keys, values = torch.randn(3, length, 2, heads, size, dtype=torch.float64)
    attention = attention.double()
    position_keys = torch.randn(2 * length, 2, heads, size, dtype=torch.float64)
    hidden = (torch.rand(length, length, 2, 1) < 0.4).double()
    hidden[:, 0] = 0
    positions = torch.arange(length).expand(2, -1) if rows_are_all else torch.tensor([[1, 4, 7, 8], [0, 3, 3, 6]])
    content, query = relative_attention.views(hidden, hidden, positions)
    given = [tensor.requires_grad_() for tensor in (queries, keys, values, position_keys)]

    stock = attention.rel_attn_core(*given, attn_mask=hidden)
    picked = torch.stack([stock[positions[b], b] for b in range(2)], dim=1)
    asked = torch.stack([queries[positions[b], b] for b in range(2)], dim=1)
    of_rows = relative_attention.relative_attention(attention, asked, *given[1:], attn_mask=query)
    weights = torch.randn_like(of_rows)
    expected = torch.autograd.grad((picked * weights).sum(), given, retain_graph=True)
    for found in (
        of_rows,
        *([relative_attention.relative_attention(attention, *given, attn_mask=content)] * rows_are_all),
    ):
        assert torch.allclose(found, picked, atol=1e-9)
        for one, other in zip(expected, torch.autograd.grad((found * weights).sum(), given), strict=True):
            assert torch.allclose(one, other, atol=1e-9)
    assert of_rows.shape == (length if rows_are_all else count, 2, heads, size)
