"""Causal language modeling: each token from those before it (GPT, GPT-2)."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, masking_utils

from utils import chunked_head, document_packing
from utils.objectives import predicted_rows
from utils.packing import position_count
from utils.trial import on_trial


def collate(blocks: list[dict]) -> dict[str, torch.Tensor]:
    """Batches blocks of token ids: `input_ids` and equal `labels`, int64 of shape (batch, block_size).

    Blocks are full, so there is no attention mask: a mask of ones changes no number, but its test stalls an NPU.
    """
    input_ids = torch.from_numpy(np.stack([block["input_ids"] for block in blocks]).astype(np.int64, copy=False))
    return {"input_ids": input_ids, "labels": input_ids.clone()}


@dataclass(frozen=True)
class DocumentCollator:
    """Batches blocks of whole documents, filled up to `length` tokens with `pad_id`.

    Besides what document_packing.collate gives: `input_ids`, and `labels` that are -100 where nothing is predicted, at
    each document's first token and where a block is not full; int64 of shape (batch, length). varlen: of
    document_packing.collate.
    """

    length: int
    pad_id: int = 0
    varlen: bool = False

    def __call__(self, blocks: list[dict]) -> dict[str, torch.Tensor]:
        batch = document_packing.collate(blocks, self.length, self.varlen)
        input_ids = np.full((len(blocks), self.length), self.pad_id, dtype=np.int64)
        for row, block in enumerate(blocks):
            input_ids[row, : len(block["input_ids"])] = block["input_ids"]
        batch["input_ids"] = torch.from_numpy(input_ids)
        is_target = (batch["position_ids"] > 0) & (batch["documents"] != document_packing.FILLER)
        return batch | {"labels": torch.where(is_target, batch["input_ids"], predicted_rows.IGNORED)}


@dataclass(frozen=True)
class PaddedCollator:
    """Batches blocks as `collate` does, the last one, which is shorter, filled up to `length` tokens with `pad_id`.

    Its labels are -100 there. No token sees what is behind it, so there is no attention mask.
    """

    length: int
    pad_id: int = 0

    def __call__(self, blocks: list[dict]) -> dict[str, torch.Tensor]:
        input_ids = torch.full((len(blocks), self.length), self.pad_id, dtype=torch.int64)
        labels = torch.full_like(input_ids, predicted_rows.IGNORED)
        for row, block in enumerate(blocks):
            ids = torch.as_tensor(block["input_ids"], dtype=torch.int64)
            input_ids[row, : len(ids)] = labels[row, : len(ids)] = ids
        return {"input_ids": input_ids, "labels": labels}


def expect_whole_blocks() -> None:
    """Spares GPT-2 the search for several sequences in one block: the host would wait for its answer in every forward
    pass. Without position ids in the batch there are none."""
    masking_utils.find_packed_sequence_indices = lambda position_ids: None


@torch.no_grad()
def predict_in_chunks(model: PreTrainedModel, label_smoothing: float = 0.0) -> bool:
    """chunked_head.give_sums for a causal model; returns False, and changes nothing, where its results would be others.

    A few tokens show that: some models do more with their logits than the head alone does, such as scaling them.
    """
    if getattr(model.config, "output_router_logits", False):
        return False  # the loss of the experts' balance is added to one that the model computes itself
    count = min(4, position_count(model.config) or 4)
    tokens = torch.arange(count).unsqueeze(0) % model.config.vocab_size

    def fits() -> bool:
        try:
            return torch.allclose(model(input_ids=tokens, targets=tokens).logits, expected, rtol=1e-3)
        except (RuntimeError, TypeError, ValueError, IndexError):  # what a model does with logits of another shape
            return False

    with on_trial(model):
        expected = token_sums(model(input_ids=tokens).logits, tokens)
        return chunked_head.give_sums(model, shift=True, label_smoothing=label_smoothing, fits=fits)


def token_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """predicted_rows.token_sums after the shift: position i predicts label i + 1. logits (batch, length, vocabulary)."""
    return predicted_rows.token_sums(logits[:, :-1], labels[:, 1:])
