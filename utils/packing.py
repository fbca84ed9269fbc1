"""Token ids to blocks of equal length: all documents end to end, cut every block_size tokens."""

import logging

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from utils.data_arguments import DataArguments
from utils.document_packing import DocumentBlocks, first_position
from utils.errors import UsageError
from utils.token_cache import Tokens
from utils.tokenization import check_room, tokenize_all
from utils.training_arguments import LanguageModelingArguments

logger = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 1024


def choose_block_size(
    asked: int | None,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    flag: str = "--block_size",
) -> int:
    """The number of tokens in a block: what was asked for, else what tokenizer and model can take.

    Where the tokenizer takes more than the model, or knows no limit, it is the model's positions, at most 1024.
    Raises UsageError for a block that is longer than the model has positions.
    """
    positions = position_count(config)
    if asked is not None:
        if positions is not None and asked > positions:
            raise UsageError(f"{flag} {asked}: the model has {positions} positions; give {positions} or less")
        if asked > tokenizer.model_max_length:
            logger.warning("%s %d: the tokenizer says %d at most; using that", flag, asked, tokenizer.model_max_length)
        return int(min(asked, tokenizer.model_max_length))
    longest = positions or DEFAULT_BLOCK_SIZE
    if tokenizer.model_max_length > longest:
        longest = min(DEFAULT_BLOCK_SIZE, longest)
        logger.info("sequences of %d tokens; %s changes that", longest, flag)
        return longest
    return int(tokenizer.model_max_length)


def position_count(config: PreTrainedConfig) -> int | None:
    """How many tokens the model has positions for; None where they are relative and without end."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions < 1:  # XLNet says -1
        return None
    return positions - first_position(config)


def make_samples(
    text: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    data: DataArguments,
    args: LanguageModelingArguments,
    cache_dir: str | None = None,
    line_by_line: bool = False,
) -> "tuple[dict[str, Blocks | DocumentBlocks | Lines], dict[str, float]]":
    """Each split of `text` as --packing says in blocks of `length` tokens or, line by line, in samples of at most so many;
    and the `figures` of the training split.

    Raises UsageError for a split that has no text, or less than one block.
    """
    flag = "--block_size" if hasattr(data, "block_size") else "--max_seq_length"
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples}
    if line_by_line:
        check_room(length, tokenizer)
    tokens = tokenize_all(text, tokenizer, data, args, cache_dir, length if line_by_line else None)
    cut_every = None
    if line_by_line:
        samples = {split: lines(tokens[split], split, limits[split]) for split in tokens}
    elif data.packing == "documents":
        samples = {split: whole_documents(tokens[split], length, split, limits[split]) for split in tokens}
    else:
        keep = data.keep_remainder
        samples = {split: pack(tokens[split], length, split, limits[split], flag, keep) for split in tokens}
        cut_every = length
    found = figures(tokens.get("train"), cut_every)
    if data.keep_remainder and found:
        found["data_dropped_tokens"] -= remainder(tokens["train"], length, flag)
    return samples, found


class Blocks(torch.utils.data.Dataset):
    """Blocks of token ids. Item i is {"input_ids": an int64 array of block_size ids}.

    ids: of any integer type, (blocks, block_size). remainder: of the same type, the last block, which is shorter.
    """

    def __init__(self, ids: np.ndarray, remainder: np.ndarray | None = None):
        self.ids = ids
        self.remainder = remainder

    def __len__(self) -> int:
        return len(self.ids) + (self.remainder is not None)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        ids = self.ids[index] if self.remainder is None or index != len(self.ids) else self.remainder
        return {"input_ids": ids.astype(np.int64)}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each block, int64."""
        lengths = np.full(len(self), self.ids.shape[1])
        if self.remainder is not None:
            lengths[-1] = len(self.remainder)
        return lengths

    def __getitems__(self, indices: list[int]) -> list[dict[str, np.ndarray]]:
        """The items of a batch, read from the file at once: torch's DataLoader asks for this where it is there."""
        if self.remainder is not None and len(self.ids) in indices:
            return [self[index] for index in indices]
        return [{"input_ids": block} for block in self.ids[indices].astype(np.int64)]


class Lines(torch.utils.data.Dataset):
    """Documents of their own length each. Item i is {"input_ids": an int64 array of its ids}.

    ids: of any integer type, all documents end to end. ends: where each of them ends.
    """

    def __init__(self, ids: np.ndarray, ends: np.ndarray):
        self.ids = ids
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample: int64 (samples,)."""
        return np.diff(self.ends, prepend=0)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start, end = (self.ends[index - 1] if index else 0), self.ends[index]
        return {"input_ids": self.ids[start:end].astype(np.int64)}


def figures(tokens: Tokens | None, block_size: int | None = None) -> dict[str, float]:
    """For all_results.json, of a split: data_seconds from text to token ids, when they were made; data_tokens of its text;
    data_dropped_tokens of those, which are in no sample.

    block_size: where the ids are cut, if they are.
    """
    if tokens is None:
        return {}
    remainder = len(tokens.ids) % block_size if block_size else 0
    return {
        "data_seconds": round(tokens.seconds, 3),
        "data_tokens": len(tokens.ids) + tokens.cut_off,
        "data_dropped_tokens": remainder + tokens.cut_off,
    }


def lines(tokens: Tokens, split: str, limit: int | None = None) -> Lines:
    """Each document as a sample; the first `limit` of them. Raises UsageError if there is none."""
    if len(tokens.ids) == 0:
        raise UsageError(f"the {split} text holds no token: all its lines are empty; name another text")
    logger.info(
        "%s: %d lines, %d tokens, %d tokens beyond the length of a sample dropped",
        split,
        len(tokens.ends),
        len(tokens.ids) + tokens.cut_off,
        tokens.cut_off,
    )
    return Lines(tokens.ids, tokens.ends[:limit])


def whole_documents(tokens: Tokens, block_size: int, split: str, limit: int | None = None) -> DocumentBlocks:
    """All documents in blocks, none of them cut unless it is longer than a block; the first `limit` blocks.

    Raises UsageError if there is no token.
    """
    if len(tokens.ids) == 0:
        raise UsageError(f"the {split} text holds no token: all its documents are empty; name another text")
    blocks = DocumentBlocks(tokens.ids, tokens.ends, block_size)
    logger.info(
        "%s: %d documents, %d tokens, %d blocks of up to %d, %.1f %% full, no token dropped",
        split,
        len(tokens.ends),
        len(tokens.ids),
        len(blocks),
        block_size,
        100 * len(tokens.ids) / (len(blocks) * block_size),
    )
    blocks.blocks = blocks.blocks[:limit]
    return blocks


def pack(
    tokens: Tokens,
    block_size: int,
    split: str,
    limit: int | None = None,
    flag: str = "--block_size",
    keep_remainder: bool = False,
) -> Blocks:
    """All token ids in blocks, the first `limit` of them.

    flag: what block_size is called on the command line. Only the remainder at the very end is dropped, and counted in the
    log; transformers' group_texts drops one for every 1,000 documents. keep_remainder: it is the last block, shorter than
    the others. Raises UsageError if there is not one block.
    """
    if len(tokens.ids) == 0:
        raise UsageError(f"the {split} text holds no token: all its documents are empty; name another text")
    count = len(tokens.ids) // block_size
    rest = remainder(tokens, block_size, flag) if keep_remainder else 0
    if count == 0 and rest == 0:
        raise _too_short(flag, block_size, split, len(tokens.ids))
    logger.info(
        "%s: %d documents, %d tokens, %d blocks of %d%s, %d tokens dropped at the end",
        split,
        len(tokens.ends),
        len(tokens.ids),
        count,
        block_size,
        f" and one of {rest}" if rest else "",
        len(tokens.ids) - count * block_size - rest,
    )
    blocks = tokens.ids[: count * block_size].reshape(count, block_size)[:limit]
    is_last = rest > 0 and (limit is None or limit > count)
    return Blocks(blocks, tokens.ids[count * block_size :] if is_last else None)


def remainder(tokens: Tokens, block_size: int, flag: str) -> int:
    """Tokens behind the last whole block that can be a block. A causal model (--block_size) learns nothing from one alone."""
    rest = len(tokens.ids) % block_size
    return 0 if rest == 1 and flag == "--block_size" else rest


def _too_short(flag: str, block_size: int, split: str, tokens: int) -> UsageError:
    remedy = f"give {tokens} or less, or more text" if tokens > 1 else "give more text"
    return UsageError(f"{flag} {block_size}: the {split} text has {tokens} tokens only, less than one block; {remedy}")
