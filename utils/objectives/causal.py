"""Causal language modeling: each token from those before it (GPT, GPT-2)."""

import torch
from transformers import masking_utils

from utils.objectives import rows


def collate(blocks: list[dict]) -> dict[str, torch.Tensor]:
    """Batches blocks of token ids: `input_ids` and equal `labels`, int64 of shape (batch, block_size).

    Blocks are full, so there is no attention mask: a mask of ones changes no number, but its test stalls an NPU.
    """
    input_ids = torch.stack([torch.as_tensor(block["input_ids"], dtype=torch.int64) for block in blocks])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def expect_whole_blocks() -> None:
    """Spares GPT-2 the search for several sequences in one block: the host would wait for its answer in every forward
    pass. Without position ids in the batch there are none."""
    masking_utils.find_packed_sequence_indices = lambda position_ids: None


def token_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """rows.token_sums after the shift: position i predicts label i + 1. logits (batch, length, vocabulary)."""
    return rows.token_sums(logits[:, :-1], labels[:, 1:])
