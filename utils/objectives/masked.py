"""Masked language modeling (BERT, arXiv:1810.04805): some tokens are hidden, and predicted from all the others.

The head runs on the predicted positions only. They are gathered to a fixed number of rows, so that shapes do not change
from step to step, and a batch that has more goes on in further chunks of fixed size: no target is ever dropped.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers.models import WordPiece
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils import document_packing
from utils.objectives.predicted_rows import IGNORED

# The first module of each family's head: what it is given is what the head computes for.
HEADS = {
    "albert": "predictions",
    "bert": "cls",
    "camembert": "lm_head",
    "distilbert": "vocab_transform",
    "roberta": "lm_head",
    "xlm-roberta": "lm_head",
}


@dataclass(frozen=True)
class MaskingLaw:
    """Which tokens are predicted, and what stands in their place: BERT's law, which is transformers'.

    Every token that is not special is predicted with `probability`; of those 80 % show the mask, 10 % a token drawn from
    the whole vocabulary and 10 % themselves. By words, each word is drawn with `probability`, and with it all its tokens.
    """

    probability: float
    mask_id: int
    vocabulary: int
    is_special: np.ndarray  # bool, by token id
    starts_word: np.ndarray | None = None  # bool, by token id; None: tokens are drawn one by one

    def apply(self, ids: np.ndarray, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """`input_ids`, what the model sees, and `labels`, -100 where nothing is predicted: int64, shape (length,)."""
        ids = np.asarray(ids, dtype=np.int64)
        if self.starts_word is None:
            predicted = draw.random(len(ids)) < self.probability
        else:
            words = np.cumsum(self.starts_word[ids])
            predicted = (draw.random(len(ids) + 1) < self.probability)[words]
        predicted &= ~self.is_special[ids]
        fate = draw.random(len(ids))
        random_ids = draw.integers(0, self.vocabulary, len(ids))
        seen = np.where(predicted & (fate < 0.8), self.mask_id, ids)
        seen = np.where(predicted & (fate >= 0.8) & (fate < 0.9), random_ids, seen)
        labels = np.where(predicted, ids, IGNORED)
        return {"input_ids": seen, "labels": labels}


def masking_law(tokenizer: PreTrainedTokenizerBase, probability: float, whole_words: bool = False) -> MaskingLaw:
    """The law for a tokenizer, which must have a mask token."""
    assert tokenizer.mask_token_id is not None, "checked by tokenization.check_mask_token"
    is_special = np.zeros(len(tokenizer), dtype=bool)
    # The unknown is a word of the text that the vocabulary lacks: it may be predicted.
    is_special[[index for index in tokenizer.all_special_ids if index != tokenizer.unk_token_id]] = True
    starts = word_starts(tokenizer) if whole_words else None
    return MaskingLaw(probability, tokenizer.mask_token_id, len(tokenizer), is_special, starts)


def word_starts(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """For each token id, whether the token begins a word: bool of shape (vocabulary,).

    WordPiece marks what continues a word (##), SentencePiece and byte-level BPE what follows a space (U+2581; Ġ, and
    Ċ or ĉ for line break and tab). Special tokens are words of their own.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    marks = ("\u2581",) if any(token.startswith("\u2581") for token in tokens) else ("Ġ", "Ċ", "ĉ")
    if isinstance(tokenizer.backend_tokenizer.model, WordPiece):
        starts = np.array([not token.startswith("##") for token in tokens])
    else:
        starts = np.array([token.startswith(marks) for token in tokens])
    starts[tokenizer.all_special_ids] = True
    return starts


@dataclass(frozen=True)
class MaskedCollator:
    """Batches masked samples.

    law: tells how many predictions to expect. pad_id, pad_to: how shorter samples are filled up, to `pad_to` tokens or
    to the longest of the batch, rounded up to a multiple of 8; an attention mask is made only if one is. full_head: leave the
    labels where they are. varlen: of document_packing.collate.
    """

    law: MaskingLaw
    pad_id: int
    pad_to: int | None = None
    full_head: bool = False
    varlen: bool = False

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """`input_ids` (batch, length) and, with padding, `attention_mask`, or for blocks of whole documents what
        document_packing.collate gives; then either `labels` (batch, length), or
        `predicted_positions` and `labels` (batch, rows), where rows that are not needed have the label -100.
        """
        lengths = [len(sample["input_ids"]) for sample in samples]
        length = max(lengths)
        if self.pad_to is not None or min(lengths) < length:
            length = self.pad_to or math.ceil(length / 8) * 8
        padded = min(lengths) < length
        input_ids = np.full((len(samples), length), self.pad_id, dtype=np.int64)
        labels = np.full((len(samples), length), IGNORED, dtype=np.int64)
        for row, sample in enumerate(samples):
            input_ids[row, : lengths[row]] = sample["input_ids"]
            labels[row, : lengths[row]] = sample["labels"]
        batch = {"input_ids": input_ids}
        if "documents" in samples[0]:
            batch |= document_packing.collate(samples, length, self.varlen)
        elif padded:
            batch["attention_mask"] = (np.arange(length) < np.array(lengths)[:, None]).astype(np.int64)
        if self.full_head:
            batch["labels"] = labels
        else:
            batch["predicted_positions"], batch["labels"] = gather_predicted(labels, *row_numbers(length, self.law))
        return {name: torch.as_tensor(array) for name, array in batch.items()}


def row_numbers(length: int, law: MaskingLaw) -> tuple[int, int]:
    """(rows for the predictions of a sample of `length` tokens, rows of a further chunk), multiples of 8.

    Two standard deviations above the mean leave one sample in 44 for a further chunk.
    """
    mean = length * law.probability
    deviation = math.sqrt(mean * (1 - law.probability))
    if law.starts_word is not None:
        deviation *= 2  # tokens of a word come together: counts scatter more
    chunk = math.ceil(2 * deviation / 8) * 8
    return min(math.ceil((mean + 2 * deviation) / 8) * 8, math.ceil(length / 8) * 8), chunk


def gather_predicted(labels: np.ndarray, rows: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions, labels) of what is predicted, int64 of shape (batch, rows + k * chunk) with the least k that holds all.

    labels: (batch, length) with -100 where nothing is predicted. Rows that are left over have position 0, label -100.
    """
    is_predicted = labels != IGNORED
    most = int(is_predicted.sum(axis=1).max())
    rows += max(0, math.ceil((most - rows) / chunk)) * chunk
    # Predicted positions first, each sample's in their order: a stable sort by whether they are not.
    order = np.argsort(~is_predicted, axis=1, kind="stable")[:, :rows]
    if order.shape[1] < rows:
        order = np.pad(order, ((0, 0), (0, rows - order.shape[1])))
    gathered = np.take_along_axis(labels, order, axis=1)
    counts = is_predicted.sum(axis=1, keepdims=True)
    is_row = np.arange(rows) < counts
    return np.where(is_row, order, 0), np.where(is_row, gathered, IGNORED)


def predict_only_masked(model: nn.Module) -> bool:
    """Lets the model's head see only the positions that a batch names as `predicted_positions`, where it names any.

    The model's logits then have shape (batch, rows, vocabulary). Returns False, and does nothing, for a model whose head
    is not known.
    """
    name = HEADS.get(model.config.model_type)
    if name is None:
        return False

    def take_positions(module: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        module.get_submodule(name).predicted_positions = named.pop("predicted_positions", None)
        return arguments, named

    def gather(head: nn.Module, inputs: tuple) -> tuple | None:
        positions = head.predicted_positions
        if positions is None:
            return None
        hidden, *others = inputs
        return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])), *others

    model.register_forward_pre_hook(take_positions, with_kwargs=True)
    model.get_submodule(name).register_forward_pre_hook(gather)
    return True
