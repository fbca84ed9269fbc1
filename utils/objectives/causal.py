"""Causal language modeling: each token from those before it (GPT, GPT-2)."""

import torch
from torch.nn import functional

IGNORED = -100


def collate(blocks: list[dict]) -> dict[str, torch.Tensor]:
    """Batches blocks of token ids: `input_ids` and equal `labels`, int64 of shape (batch, block_size).

    Blocks are full, so there is no attention mask: a mask of ones changes no number, but its test stalls an NPU.
    """
    input_ids = torch.stack([torch.as_tensor(block["input_ids"], dtype=torch.int64) for block in blocks])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def token_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Correct predictions, targets and negative log-likelihood (nats) of each sample: float32 of shape (batch, 3).

    logits: (batch, length, vocabulary). labels: (batch, length), shifted here: position i predicts label i + 1.
    Positions labelled -100 are no targets and count nowhere.
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    is_target = labels != IGNORED
    correct = (logits.argmax(dim=-1) == labels) & is_target
    losses = functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return torch.stack([correct.sum(1).float(), is_target.sum(1).float(), losses.sum(1)], dim=1)
