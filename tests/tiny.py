"""Small models and batches for tests that run in this process."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY = 96


def gpt2(
    layers: int = 2, width: int = 32, dropout: float = 0.0, seed: int = 0, vocabulary: int = VOCABULARY
) -> GPT2LMHeadModel:
    """A GPT-2 with new weights; every parameter's size is a multiple of 16, as in the released models."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_embd=width,
            n_head=2,
            n_layer=layers,
            n_positions=32,
            resid_pdrop=dropout,
            attn_pdrop=dropout,
            embd_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def batches(count: int, size: int = 4, length: int = 16, seed: int = 1) -> list[torch.Tensor]:
    """Token ids with something to learn: each row counts upwards from a random start."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, VOCABULARY, (count, size, 1), generator=generator)
    return list((starts + torch.arange(length)) % VOCABULARY)


def groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict]:
    """Parameter groups as Trainer makes them: weight decay for matrices, none for biases and norms."""
    decayed = [p for p in model.parameters() if p.dim() > 1 and p.requires_grad]
    others = [p for p in model.parameters() if p.dim() <= 1 and p.requires_grad]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def backward(model: nn.Module, ids: torch.Tensor) -> float:
    """The loss of a batch; leaves its gradients."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item()
