"""Whole documents packed into blocks: each one attends to itself alone, and its positions begin at 0.

A document longer than a block is cut into pieces, each of which stands for itself. The others are placed by best fit: the
longest first, each into the fullest block that still has room for it (Johnson 1973; for language models
arXiv:2404.10830).
"""

import bisect

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from utils import device
from utils.errors import UsageError
from utils.trial import on_trial

FILLER = -1  # the document's number where a block is not full
# Attention that is told where sequences end, instead of a mask. Documents in a batch are rounded up to a multiple of
# ENDS, so that shapes are few.
VARLEN = ("flash_attention_2", "flash_attention_3")
ENDS = 64
POSITIONS_AFTER_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "roberta-prelayernorm",
    "data2vec-text",
    "ibert",
    "xmod",
)


class DocumentBlocks(torch.utils.data.Dataset):
    """Blocks of whole documents.

    Item i is {"input_ids": the tokens of its documents end to end, "documents": each token's document, 0 for the first in
    the block}, both of shape (at most block_size,).

    ids: all documents end to end, any integer type; it is read block by block. ends: int64, where each document ends.
    Documents without a token are left out.
    """

    def __init__(self, ids: np.ndarray, ends: np.ndarray, block_size: int):
        self.ids = ids
        self.starts, self.ends = pieces(ends, block_size)
        self.blocks = best_fit(self.ends - self.starts, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each block, int64."""
        lengths = self.ends - self.starts
        return np.array([lengths[members].sum() for members in self.blocks], dtype=np.int64)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        members = self.blocks[index]
        parts = [self.ids[self.starts[member] : self.ends[member]] for member in members]
        lengths = [len(part) for part in parts]
        return {"input_ids": np.concatenate(parts), "documents": np.repeat(np.arange(len(parts)), lengths)}


def pieces(ends: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends), int64: of each document, or of its pieces of block_size tokens where it is longer."""
    ends = np.asarray(ends, dtype=np.int64)
    starts = ends - np.diff(ends, prepend=0)
    counts = -(-(ends - starts) // block_size)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.repeat(starts, counts) + (np.arange(len(first)) - first) * block_size
    return begins, np.minimum(begins + block_size, np.repeat(ends, counts))


def best_fit(lengths: np.ndarray, block_size: int) -> list[np.ndarray]:
    """Which pieces each block holds, int64 arrays of their numbers in ascending order; blocks by their first piece.

    lengths: of the pieces, from 1 to block_size tokens.
    """
    assert len(lengths) == 0 or (lengths.min() > 0 and lengths.max() <= block_size)
    rooms: list[int] = []  # that some open block has, ascending
    open_blocks: dict[int, list[list[int]]] = {}  # by room
    blocks: list[list[int]] = []
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            block = open_blocks[room].pop()
            if not open_blocks[room]:
                del open_blocks[room], rooms[place]
        else:
            room, block = block_size, []
            blocks.append(block)
        block.append(piece)
        if room > length:
            if room - length not in open_blocks:
                bisect.insort(rooms, room - length)
            open_blocks.setdefault(room - length, []).append(block)
    return sorted((np.sort(np.array(block)) for block in blocks), key=lambda block: block[0])


def collate(blocks: list[dict], length: int, varlen: bool = False) -> dict[str, torch.Tensor]:
    """`documents`, FILLER where a block is not full, and `position_ids`, from 0 in each: int64 (batch, length).

    varlen: also `cu_seq_lens`, int32: 0, then where each document, and each filling, ends in all blocks end to end; the
    last end again and again up to a multiple of ENDS, as documents without a token.
    """
    documents = np.full((len(blocks), length), FILLER, dtype=np.int64)
    for row, block in enumerate(blocks):
        documents[row, : len(block["documents"])] = block["documents"]
    place = np.arange(length)
    begins = np.ones_like(documents, dtype=bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    position_ids = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    batch = {"documents": torch.from_numpy(documents), "position_ids": torch.from_numpy(position_ids)}
    if varlen:
        starts = np.flatnonzero(begins)
        ends = np.full(-(-len(starts) // ENDS) * ENDS + 1, begins.size, dtype=np.int32)
        ends[: len(starts)] = starts
        batch["cu_seq_lens"] = torch.from_numpy(ends)
    return batch


def visible(documents: torch.Tensor, causal: bool) -> torch.Tensor:
    """Which position (dim 2) sees which (dim 3): bool (batch, 1, length, length). documents: (batch, length)."""
    seen = documents[:, None, :, None] == documents[:, None, None, :]
    return seen.tril() if causal else seen


def first_position(config: PreTrainedConfig) -> int:
    """The position id of a sequence's first token: RoBERTa and its like count from the padding id on."""
    return config.pad_token_id + 1 if config.model_type in POSITIONS_AFTER_PADDING else 0


def keep_documents_apart(model: PreTrainedModel, causal: bool) -> bool:
    """Lets GPT, GPT-2, BERT, RoBERTa, ALBERT, DistilBERT and models like them take the `documents` of a batch: a mask is
    made of them, or FlashAttention is told where they end, on CUDA. Returns whether batches must say so: collate's `varlen`.

    causal: no token sees a later one. XLNet needs nothing: its positions are relative, and its collator puts documents into
    perm_mask. Raises UsageError for an attention that takes neither, and for a model that, as two documents show, computes
    them together otherwise than alone.
    """
    kind = model.config.model_type
    assert kind != "xlnet"
    attention = model.config._attn_implementation
    takes_ends = attention in VARLEN and device.accelerator() != "npu"
    if not takes_ends and attention not in ("sdpa", "eager"):
        raise UsageError(
            f"--packing documents does not work with --attn_implementation {attention} here; leave one of them out"
        )
    first = first_position(model.config)
    now: dict = {}  # of the batch in hand

    def take_documents(_: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        documents = named.pop("documents", None)
        now["mask"] = None
        if documents is not None:
            named["position_ids"] = named["position_ids"] + first
            attention = model.config._attn_implementation
            if attention in VARLEN:
                ends, length = named.pop("cu_seq_lens"), documents.shape[1]
                named |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}
                return arguments, named
            seen = visible(documents, causal)
            if kind == "openai-gpt":
                now["mask"] = additive(seen, model.dtype)
            else:
                named["attention_mask"] = additive(seen, model.dtype) if attention == "eager" else seen
        return arguments, named

    def mask_block(_: nn.Module, arguments: tuple) -> tuple | None:
        # This model makes a mask of its own of two dimensions only.
        return None if now["mask"] is None else (arguments[0], now["mask"], *arguments[2:])

    model.register_forward_pre_hook(take_documents, with_kwargs=True)
    if kind == "openai-gpt":
        for block in model.transformer.h:
            block.register_forward_pre_hook(mask_block)
    if not _are_apart(model):
        raise UsageError(
            f"--packing documents: {kind} does not compute documents of a block as it does each alone; leave the flag out"
        )
    return takes_ends


@torch.no_grad()
def _are_apart(model: PreTrainedModel) -> bool:
    """Whether two short documents have the logits that each has alone, by masks: FlashAttention runs on its device only."""
    if any(weight.is_meta or weight.numel() == 0 for weight in model.parameters()):
        return True  # DeepSpeed has parted the weights: nothing can be computed before it runs
    samples = [{"documents": np.array([0, 0, 0, 1, 1])}]
    words = [word for word in range(min(8, model.config.vocab_size)) if word != model.config.pad_token_id]
    ids = torch.tensor([(5 * words)[:5]])
    try:
        with on_trial(model):
            together = model(input_ids=ids, **collate(samples, 5)).logits
            alone = torch.cat([model(input_ids=part).logits for part in ids.split([3, 2], dim=1)], dim=1)
    except (RuntimeError, TypeError, ValueError, IndexError):  # of a model that takes no such mask or positions
        return False
    tolerance = 1e-4 if alone.dtype in (torch.float32, torch.float64) else 0.05
    return bool((together - alone).abs().max() <= tolerance * alone.abs().max())


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores: 0 where `seen`, else the least number of the type."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
