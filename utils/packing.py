"""Token ids to blocks of equal length: all documents end to end, cut every block_size tokens."""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from utils.errors import UsageError

logger = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 1024


def choose_block_size(asked: int | None, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int:
    """The number of tokens in a block: what was asked for, else what tokenizer and model can take.

    Where the tokenizer takes more than the model, or knows no limit, it is the model's positions, at most 1024.
    Raises UsageError for a block that is longer than the model has positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions < 1:  # XLNet says -1: its positions are relative
        positions = None
    if asked is not None:
        if positions is not None and asked > positions:
            raise UsageError(f"--block_size {asked}: the model has {positions} positions; give {positions} or less")
        if asked > tokenizer.model_max_length:
            logger.warning(
                "--block_size %d: the tokenizer says %d at most; using that", asked, tokenizer.model_max_length
            )
        return int(min(asked, tokenizer.model_max_length))
    longest = positions or DEFAULT_BLOCK_SIZE
    if tokenizer.model_max_length > longest:
        longest = min(DEFAULT_BLOCK_SIZE, longest)
        logger.info("block_size is %d; --block_size changes it", longest)
        return longest
    return int(tokenizer.model_max_length)


class Blocks(torch.utils.data.Dataset):
    """Blocks of token ids. Item i is {"input_ids": an array of block_size ids}."""

    def __init__(self, ids: np.ndarray):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"input_ids": self.ids[index]}

    def head(self, count: int | None) -> "Blocks":
        """The first `count` blocks; all of them for None."""
        return self if count is None else Blocks(self.ids[:count])


def pack(tokenized: Dataset, block_size: int, split: str) -> Blocks:
    """All token ids of `tokenized` in blocks; only the remainder at the very end is dropped, and counted in the log.

    transformers' group_texts drops a remainder for every 1,000 documents. Raises UsageError if there is not one block.
    """
    column = tokenized.with_format("arrow")[:].column("input_ids")
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    ids = np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.int32)
    if len(ids) == 0:
        raise UsageError(f"the {split} text holds no token: all its documents are empty; name another text")
    count = len(ids) // block_size
    if count == 0:
        raise _too_short(block_size, split, len(ids))
    logger.info(
        "%s: %d documents, %d tokens, %d blocks of %d, %d tokens dropped at the end",
        split,
        len(tokenized),
        len(ids),
        count,
        block_size,
        len(ids) - count * block_size,
    )
    return Blocks(ids[: count * block_size].reshape(count, block_size))


def _too_short(block_size: int, split: str, tokens: int) -> UsageError:
    remedy = f"give {tokens} or less, or more text" if tokens > 1 else "give more text"
    return UsageError(
        f"--block_size {block_size}: the {split} text has {tokens} tokens only, less than one block; {remedy}"
    )


class StreamedBlocks(torch.utils.data.IterableDataset):
    """Blocks of a stream of token ids, cut while it is read; a remainder goes on into the next block.

    Iterating raises UsageError if there is not one block.
    """

    def __init__(self, tokenized: IterableDataset, block_size: int, count: int | None = None):
        self.tokenized = tokenized
        self.block_size = block_size
        self.count = count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        made = 0
        rest = np.zeros(0, dtype=np.int32)
        for row in self.tokenized:
            rest = np.concatenate([rest, np.asarray(row["input_ids"], dtype=np.int32)])
            whole = len(rest) // self.block_size
            for block in rest[: whole * self.block_size].reshape(whole, self.block_size):
                if self.count is not None and made == self.count:
                    return
                made += 1
                yield {"input_ids": block}
            rest = rest[whole * self.block_size :]
        # Of several workers of a DataLoader, one may have no file to read.
        if made == 0 and torch.utils.data.get_worker_info() is None:
            raise _too_short(self.block_size, "streamed", len(rest))

    def set_epoch(self, epoch: int) -> None:
        self.tokenized.set_epoch(epoch)
