"""Tiny models of the masked families, with new weights."""

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


def both(dropout: float) -> dict:
    return {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}


def bert(dropout: float):
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **SIZES, **both(dropout)))


def roberta(dropout: float):
    return RobertaForMaskedLM(RobertaConfig(vocab_size=VOCABULARY, **SIZES, **both(dropout)))


def albert(dropout: float):
    return AlbertForMaskedLM(AlbertConfig(vocab_size=VOCABULARY, embedding_size=16, **SIZES, **both(dropout)))


def distilbert(dropout: float):
    return DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=32,
            n_layers=2,
            n_heads=2,
            hidden_dim=64,
            dropout=dropout,
            attention_dropout=dropout,
        )
    )


MASKED = {"bert": bert, "roberta": roberta, "albert": albert, "distilbert": distilbert}


def make(name: str, seed: int = 0, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return MASKED[name](dropout)
