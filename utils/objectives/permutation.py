"""Permutation language modeling (XLNet, arXiv:1906.08237): tokens predicted one after another in a random order.

The law of what is predicted, and of who sees whom, is that of transformers' DataCollatorForPermutationLanguageModeling.
Unlike it, the model is asked for the predicted positions only: its query stream and head run on a fixed number of rows,
so that shapes do not change from step to step.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from utils.objectives.predicted_rows import IGNORED

ROW_MULTIPLE = 8  # what matrix units of accelerators like


@dataclass(frozen=True)
class PermutationLaw:
    """Which tokens are predicted, and in which order; see draw_predicted, draw_order and visibility.

    is_functional: bool, by token id: special and padding tokens, which are never predicted. full_head: ask the model for
    all positions, as transformers does, not for the predicted ones only.
    """

    plm_probability: float
    max_span_length: int
    mask_id: int
    is_functional: np.ndarray
    full_head: bool = False

    def apply(self, ids: np.ndarray, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """A sample of L tokens, for PermutationCollator:

        input_ids: int64 (L,), the mask in place of each predicted token.
        perm_mask: bool (L, L), True where i must not see j.
        positions: int64 (rows,), the predicted ones in ascending order, then zeros.
        labels: int64 (rows,), their tokens, then -100.

        rows is capacity(L, ...), or the next multiple of 8 that holds all. With full_head it is L, positions are 0 to
        L - 1, and the labels of those that are not predicted are -100.
        """
        ids = np.asarray(ids, dtype=np.int64)
        predicted = draw_predicted(len(ids), self.plm_probability, self.max_span_length, draw)
        order = draw_order(len(ids), draw)
        functional = self.is_functional[ids]
        predicted &= ~functional
        if self.full_head:
            positions, labels = np.arange(len(ids)), np.where(predicted, ids, IGNORED)
        else:
            found = np.flatnonzero(predicted)
            count = capacity(len(ids), self.plm_probability, self.max_span_length)
            count += _round_up(max(0, len(found) - count))
            positions = np.pad(found, (0, count - len(found)))
            labels = np.pad(ids[found], (0, count - len(found)), constant_values=IGNORED)
        return {
            "input_ids": np.where(predicted, self.mask_id, ids),
            "perm_mask": visibility(predicted, functional, order),
            "positions": positions,
            "labels": labels,
        }


def permutation_law(
    tokenizer: PreTrainedTokenizerBase, plm_probability: float, max_span_length: int, full_head: bool = False
) -> PermutationLaw:
    """The law for a tokenizer, which must have a mask token."""
    assert tokenizer.mask_token_id is not None, "checked by tokenization.check_mask_token"
    is_functional = np.zeros(len(tokenizer), dtype=bool)
    is_functional[tokenizer.all_special_ids] = True
    return PermutationLaw(plm_probability, max_span_length, tokenizer.mask_token_id, is_functional, full_head)


def draw_predicted(length: int, plm_probability: float, max_span_length: int, draw: np.random.Generator) -> np.ndarray:
    """Which positions lie in a span to predict: bool (length,).

    The sequence is cut into contexts, each with one span: of 1 to max_span_length tokens, in a context
    1 / plm_probability times as long, at a place drawn within it. What lies beyond the sequence is cut off.
    """
    # Contexts of the least length fill the sequence with this many; how many are needed is not known before.
    most = -(-length // int(1 / plm_probability))
    spans = draw.integers(1, max_span_length + 1, most)
    contexts = (spans / plm_probability).astype(np.int64)
    begins = np.cumsum(contexts) - contexts
    starts = begins + draw.integers(0, contexts - spans + 1)
    is_within = begins < length
    # Spans do not overlap: +1 where one starts and -1 where one ends sum up to 1 within.
    starts, ends = (np.minimum(edges[is_within], length) for edges in (starts, starts + spans))
    steps = np.bincount(starts, minlength=length + 1) - np.bincount(ends, minlength=length + 1)
    return np.cumsum(steps[:length]) > 0


def draw_order(length: int, draw: np.random.Generator) -> np.ndarray:
    """Each position's place in the factorization order: int32 (length,), a permutation.

    The first half comes before the second, and both have the same permutation: what a model keeps as memory for the next
    sequence is the first half. An odd sequence's last position comes last (transformers refuses odd lengths).
    """
    half = draw.permutation(length // 2)
    return np.concatenate([half, half + length // 2, np.arange(length // 2 * 2, length)]).astype(np.int32)


def visibility(predicted: np.ndarray, functional: np.ndarray, order: np.ndarray) -> np.ndarray:
    """perm_mask: bool (length, length), True where position i must not see position j.

    Only predicted positions hide, from themselves and from all that come no later in the order; tokens of the context,
    neither predicted nor functional, come before all, so that they see no predicted one. Functional tokens (special and
    padding) keep their place, yet are visible to all. So one may see a predicted token and show what it saw to an earlier
    one: nothing leaks only because the model sees the mask there, not the token.
    """
    place = np.where(predicted | functional, order, -1)
    return (place[:, None] <= place[None, :]) & predicted[None, :]


def capacity(length: int, plm_probability: float, max_span_length: int) -> int:
    """The rows that hold whatever draw_predicted can draw for `length` tokens; a multiple of 8.

    All contexts but the last lie within length - 1 tokens, and no span has a larger share of its context than the
    densest. The last adds max_span_length at most.
    """
    densest = max((length - 1) * span // int(span / plm_probability) for span in range(1, max_span_length + 1))
    return _round_up(min(length, densest + max_span_length))


def _round_up(count: int) -> int:
    return -(-count // ROW_MULTIPLE) * ROW_MULTIPLE


@dataclass(frozen=True)
class PermutationCollator:
    """Batches samples of a PermutationLaw.

    pad_id, pad_to: how shorter samples are filled up on the right, to `pad_to` tokens or to the longest of the batch,
    rounded up to a multiple of 8; no position sees that, and nothing is predicted from it.
    """

    pad_id: int = 0
    pad_to: int | None = None
    full_head: bool = False

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """Of B samples of L tokens with R rows to predict:

        input_ids: int64 (B, L).
        perm_mask: float32 (B, L, L), 1 where i must not see j, which a token of another document is not seen by either.
        target_mapping: float32 (B, R, L), a one for the position of each row; rows that are not needed are zero. With
            full_head the identity, and R = L.
        predicted_positions: int64 (B, R), without full_head: the position of each row, 0 for those not needed.
        labels: int64 (B, R), -100 where there is nothing to predict.
        attention_mask: float32 (B, L), only if a sample is padded.

        R is the most of the samples', so it is a fixed number unless one has more to predict than its capacity.
        """
        batch = len(samples)
        lengths = np.array([len(sample["input_ids"]) for sample in samples])
        length = int(lengths.max())
        if self.pad_to is not None or lengths.min() < length:
            length = self.pad_to or _round_up(length)
        is_padded = lengths.min() < length
        count = length if self.full_head else max(len(sample["positions"]) for sample in samples)
        input_ids = np.full((batch, length), self.pad_id, dtype=np.int64)
        perm_mask = np.zeros((batch, length, length), dtype=bool)
        positions = np.zeros((batch, count), dtype=np.int64)
        labels = np.full((batch, count), IGNORED, dtype=np.int64)
        for row, sample in enumerate(samples):
            size, targets = len(sample["input_ids"]), len(sample["positions"])
            input_ids[row, :size] = sample["input_ids"]
            perm_mask[row, :size, :size] = sample["perm_mask"]
            if "documents" in sample:
                documents = sample["documents"]
                perm_mask[row, :size, :size] |= documents[:, None] != documents
            positions[row, :targets] = sample["positions"]
            labels[row, :targets] = sample["labels"]
        if self.full_head:
            target_mapping = np.tile(np.eye(length, dtype=np.float32), (batch, 1, 1))
        else:
            target_mapping = np.zeros((batch, count, length), dtype=np.float32)
            # A one in an unneeded row would add its query to that of position 0.
            np.put_along_axis(target_mapping, positions[..., None], (labels != IGNORED)[..., None], axis=2)
        arrays = {
            "input_ids": input_ids,
            "perm_mask": perm_mask.astype(np.float32),
            "target_mapping": target_mapping,
            "labels": labels,
        }
        if not self.full_head:
            arrays["predicted_positions"] = positions
        if is_padded:
            arrays["attention_mask"] = (np.arange(length) < lengths[:, None]).astype(np.float32)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
