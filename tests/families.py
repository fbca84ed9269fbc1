"""Tiny models of the masked families, with new weights and no dropout."""

import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

VOCABULARY = 120
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert():
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **SIZES, **NO_DROPOUT))


def roberta():
    return RobertaForMaskedLM(RobertaConfig(vocab_size=VOCABULARY, **SIZES, **NO_DROPOUT))


def albert():
    return AlbertForMaskedLM(AlbertConfig(vocab_size=VOCABULARY, embedding_size=16, **SIZES, **NO_DROPOUT))


def distilbert():
    return DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=2, hidden_dim=64, dropout=0.0, attention_dropout=0.0
        )
    )


MASKED = {"bert": bert, "roberta": roberta, "albert": albert, "distilbert": distilbert}


def make(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return MASKED[name]()
