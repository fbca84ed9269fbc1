"""Text to token ids."""

import logging

from datasets import Dataset, Features, IterableDataset, Sequence, Value
from transformers import PreTrainedTokenizerBase

from utils.arguments import LanguageModelingArguments
from utils.data_arguments import DataArguments
from utils.errors import UsageError

logger = logging.getLogger(__name__)

BATCH = 1000


def documents_of(batch: dict) -> list[str]:
    """The documents of a batch, "" for none. Raises UsageError for one that is no text: a stream's type is not known."""
    documents = ["" if document is None else document for document in batch["text"]]
    for document in documents:
        if not isinstance(document, str):
            raise UsageError(f"--text_column: a document is {str(document)[:50]!r}, not text; name a column of text")
    return documents


def tokenize_all(
    text: dict[str, Dataset | IterableDataset],
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    args: LanguageModelingArguments,
    max_length: int | None = None,
) -> dict[str, Dataset | IterableDataset]:
    """`tokenize` for every split; the main process first, the others then find its cached result."""
    tokens = {}
    for split, documents in text.items():
        with args.main_process_first(desc="tokenizing"):
            tokens[split] = tokenize(
                documents, tokenizer, data.preprocessing_num_workers, not data.overwrite_cache, max_length
            )
    return tokens


def tokenize(
    text: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    processes: int | None = None,
    use_cache: bool = True,
    max_length: int | None = None,
) -> Dataset | IterableDataset:
    """The column `input_ids` (int32) of each document's token ids, special tokens as the tokenizer adds them.

    max_length: what is beyond so many tokens of a document is cut off, and blank documents are left out.
    """

    def encode(batch: dict) -> dict:
        # verbose=False: a document longer than the model is cut into blocks later, there is nothing to warn of.
        documents, options = documents_of(batch), {}
        if max_length is not None:
            documents = [document for document in documents if document.strip()]
            options = {"truncation": True, "max_length": max_length}
        if not documents:
            return {"input_ids": []}
        return {"input_ids": tokenizer(documents, return_attention_mask=False, verbose=False, **options)["input_ids"]}

    if isinstance(text, IterableDataset):
        return text.map(encode, batched=True, batch_size=BATCH, remove_columns=["text"])
    return text.map(
        encode,
        batched=True,
        batch_size=BATCH,
        remove_columns=["text"],
        features=Features({"input_ids": Sequence(Value("int32"))}),
        num_proc=processes,
        load_from_cache_file=use_cache,
        desc="Running tokenizer on dataset",
    )


def check_room(max_length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UsageError if the special tokens of a sequence leave no room for text."""
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise UsageError(
            f"--max_seq_length {max_length}: the special tokens alone are {special}; give {special + 1} or more"
        )


def check_mask_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UsageError if the tokenizer cannot hide a token."""
    if tokenizer.mask_token_id is None:
        raise UsageError(
            "--tokenizer_name: the tokenizer has no mask token, with which tokens to be predicted are hidden; name the "
            "model's own tokenizer"
        )
