"""Text to token ids."""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
import tokenizers
import xxhash
from datasets import Dataset
from datasets.fingerprint import Hasher
from datasets.utils import tqdm
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from utils import cached_words, fast_encoding, token_cache
from utils.data_arguments import DataArguments
from utils.errors import UsageError
from utils.token_cache import Tokens, Totals, Writer, cached
from utils.training_arguments import LanguageModelingArguments

logger = logging.getLogger(__name__)

ROWS = 4000  # read at once
CHUNK_BYTES = 2_000_000  # encoded at once
SAMPLE_DOCUMENTS = 16
# A character that str.strip leaves, in the words of RE2.
NOT_BLANK = r"[^\t-\r\x1c-\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"


def tokenize_all(
    text: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    args: LanguageModelingArguments,
    cache_dir: str | None = None,
    max_length: int | None = None,
) -> dict[str, Tokens]:
    """`tokenize` for every split; each node's main process first, the others then find what it cached."""
    tokens = {}
    for split, documents in text.items():
        with args.main_process_first(desc="tokenizing"):
            # One process makes it anew, the others find that.
            overwrite = data.overwrite_cache and args.local_process_index == 0
            threads = data.preprocessing_num_workers
            tokens[split] = tokenize(
                documents,
                tokenizer,
                cache_dir,
                overwrite,
                max_length,
                threads,
                end_of_text(tokenizer, data.append_eos),
            )
    return tokens


def tokenize(
    text: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | None = None,
    overwrite: bool = False,
    max_length: int | None = None,
    threads: int | None = None,
    append: int | None = None,
) -> Tokens:
    """Each document's token ids, special tokens as the tokenizer adds them.

    cache_dir: where they are kept, in its folder `tokens`; by default with the data under HF_HOME. overwrite: make them
    anew. max_length: what is beyond so many tokens of a document is cut off, and blank documents are left out.
    threads: by default one for each core that the process may use. append: the token that ends each document; a blank one,
    which holds white space at most, has its tokens and no end.
    """
    description = describe(tokenizer)
    folder = os.path.join(cache_dir or datasets.config.HF_DATASETS_CACHE, "tokens")
    dtype = np.min_scalar_type(max(tokenizer.get_vocab().values()))

    def build(writer: Writer) -> Totals:
        cores = threads or len(os.sched_getaffinity(0))
        return _write_all(text, tokenizer, description, max_length, cores, writer, append)

    return cached(folder, cache_key(text, tokenizer, description, max_length, append), dtype, build, overwrite)


def describe(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The content of the tokenizer's tokenizer.json; None if it is of another library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    # What the last call has left there; the next one sets both anew.
    backend.no_truncation()
    backend.no_padding()
    return backend.to_str()


def cache_key(
    text: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    description: str | None,
    max_length: int | None,
    append: int | None = None,
) -> str:
    """32 hexadecimal digits of all that the ids depend on.

    The fingerprint that `datasets` keeps of a dataset stands for its text; it follows the time of files.
    """
    parts = {
        "layout": token_cache.LAYOUT,
        "text": text._fingerprint,
        "tokenizer": description or Hasher.hash(tokenizer),
        "kind": type(tokenizer).__name__,
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
        "library": tokenizers.__version__,
        "max_length": max_length,
        "truncation_side": tokenizer.truncation_side if max_length is not None else None,
    }
    if append is not None:
        parts["append"] = append
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, ensure_ascii=False).encode(errors="surrogatepass"))


def _write_all(
    text: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    description: str | None,
    max_length: int | None,
    threads: int,
    writer: Writer,
    append: int | None = None,
) -> Totals:
    """Encodes all documents, several chunks at a time, and writes them in their order."""
    begin = time.perf_counter()
    first = ["" if document is None else document for document in text[:SAMPLE_DOCUMENTS]["text"]]
    described = json.loads(description) if description else None
    encode = fast_encoding.choose(tokenizer, described, first, max_length)
    totals = Totals()
    size = 0
    waiting: deque = deque()
    bar = tqdm(total=len(text), unit=" documents", desc="Tokenizing")
    with bar, ThreadPoolExecutor(threads) as pool:

        def write_first() -> None:
            nonlocal size
            documents, bytes_read, future, ends = waiting.popleft()
            encoded = future.result()
            if append is None:
                writer.append(encoded.ids, encoded.counts)
            else:
                writer.append(*fast_encoding.end_documents(encoded.ids, encoded.counts, ends, append))
            totals.cut_off += encoded.cut_off
            size += bytes_read
            bar.set_postfix_str(f"{size / 1e6 / (time.perf_counter() - begin):.1f} MB/s", refresh=False)
            bar.update(documents)

        for chunk in chunks(text):
            documents, bytes_read = len(chunk), int(cached_words.buffers(chunk)[1][-1])
            ends = None
            if max_length is not None or append is not None:
                is_text = pa.compute.match_substring_regex(chunk, NOT_BLANK)
                chunk = chunk.filter(is_text) if max_length is not None else chunk
                ends = is_text.to_numpy(zero_copy_only=False)
            waiting.append((documents, bytes_read, pool.submit(encode, chunk), ends))
            if len(waiting) > 2 * threads:
                write_first()
        while waiting:
            write_first()
    totals.seconds = time.perf_counter() - begin
    return totals


def chunks(text: Dataset, size: int = CHUNK_BYTES) -> Iterator[pa.StringArray]:
    """The documents in order, in arrays of about `size` bytes, "" for none; one that is longer has its own array."""
    collected: list[pa.StringArray] = []
    missing = size
    for table in text.with_format("arrow").iter(batch_size=ROWS):
        for column in table.column("text").cast(pa.string()).chunks:
            if column.null_count:
                column = column.fill_null("")
            offsets = cached_words.buffers(column)[1]
            start = 0
            while start < len(column):
                # As many documents as fit, one at least.
                stop = int(np.searchsorted(offsets, offsets[start] + missing, side="right")) - 1
                stop = min(max(stop, start + 1), len(column))
                collected.append(column[start:stop])
                missing -= int(offsets[stop] - offsets[start])
                if missing <= 0 or stop < len(column):
                    yield pa.concat_arrays(collected)
                    collected, missing = [], size
                start = stop
    if collected:
        yield pa.concat_arrays(collected)


class StreamEncoder:
    """Encodes documents of a stream as `tokenize` does those of a dataset. A process that gets one makes its own of it.

    first_documents: what the ways to encode are tried on. max_length: as in `tokenize`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, first_documents: list[str], max_length: int | None = None):
        self.tokenizer = tokenizer
        self.first_documents = first_documents
        self.max_length = max_length
        self.encode = self._choose()

    def _choose(self) -> Callable[[pa.StringArray], fast_encoding.Encoded]:
        description = describe(self.tokenizer)
        return fast_encoding.choose(
            self.tokenizer, json.loads(description) if description else None, self.first_documents, self.max_length
        )

    def __call__(self, documents: pa.StringArray) -> fast_encoding.Encoded:
        """documents: null for none, which has no token."""
        documents = documents.fill_null("")
        if self.max_length is not None:
            documents = documents.filter(pa.compute.match_substring_regex(documents, NOT_BLANK))
        return self.encode(documents)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "encode"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.encode = self._choose()


def end_of_text(tokenizer: PreTrainedTokenizerBase, wanted: bool) -> int | None:
    """The id that ends a document if that is `wanted`. Raises UsageError where there is none or one is there already."""
    if not wanted:
        return None
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "--append_eos: the tokenizer has no end-of-text token; drop the flag, or name another tokenizer"
        )
    last = tokenizer("a", verbose=False)["input_ids"][-1]
    if last in tokenizer.all_special_ids:
        raise UsageError(
            f"--append_eos: this tokenizer ends each document already, with {tokenizer.convert_ids_to_tokens(last)}; drop "
            "the flag"
        )
    return tokenizer.eos_token_id


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
