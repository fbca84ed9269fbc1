"""How many steps an epoch of a stream takes: its text is read and encoded once, and the count kept for the next run."""

import json
import logging
import math
import os
import tempfile
import time
from pathlib import Path

import datasets
import xxhash

from utils.data_arguments import DataArguments
from utils.errors import UsageError
from utils.main_process import told_by_main
from utils.stream_windows import Cutter, text_chunks
from utils.streaming import Reader, Stream, byte_counts
from utils.tokenization import StreamEncoder, describe
from utils.training_arguments import LanguageModelingArguments

logger = logging.getLogger(__name__)

TELL_SECONDS = 10


def steps(
    stream: Stream,
    encode: StreamEncoder,
    cut: Cutter,
    data: DataArguments,
    args: LanguageModelingArguments,
    cache_dir: str | None = None,
) -> int:
    """The optimizer steps of --num_train_epochs. The main process counts, for all of them.

    cut: of blocks or lines. Raises UsageError if the text makes no sample.
    """
    units = told_by_main(lambda: _units(stream, encode, cut, cache_dir))
    if data.max_train_samples is not None:
        units = min(units, data.max_train_samples * cut.unit)
    # Blocks go on from epoch to epoch, so that of them there may be a part of one.
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    count = math.ceil(args.num_train_epochs * units / (cut.unit * batch))
    logger.info("train: %.1f samples an epoch, %d steps for %g epochs", units / cut.unit, count, args.num_train_epochs)
    return count


def _units(stream: Stream, encode: StreamEncoder, cut: Cutter, cache_dir: str | None) -> int:
    """The tokens of an epoch; of lines, the lines."""
    if any(source.fingerprint is None for source in stream.sources):
        return _count(stream, encode, cut)
    file = _file(stream, encode, cut, cache_dir)
    try:
        return int(json.loads(file.read_text())["units"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    units = _count(stream, encode, cut)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as part:
            json.dump({"units": units}, part)
        os.replace(part.name, file)
    except OSError as error:
        logger.warning("--cache_dir: the length of the stream cannot be kept in %s (%s)", file.parent, error.strerror)
    return units


def _count(stream: Stream, encode: StreamEncoder, cut: Cutter) -> int:
    logger.info("the steps of an epoch are not known: the text is read once to count them; --max_steps N spares that")
    units, size, begin = 0, 0, time.perf_counter()
    told = begin
    for documents, _, is_last in text_chunks(Reader(stream)):
        units += cut.count(encode(documents).counts)
        size += int(byte_counts(documents).sum())
        if time.perf_counter() - told > TELL_SECONDS:
            told = time.perf_counter()
            logger.info("counted %.0f MB, %.1f MB/s", size / 1e6, size / 1e6 / (told - begin))
        if is_last:
            break
    if units == 0:
        raise UsageError("the streamed text holds no token: all its documents are empty; name another text")
    return units


def _file(stream: Stream, encode: StreamEncoder, cut: Cutter, cache_dir: str | None) -> Path:
    parts = {
        "text": [(source.fingerprint, source.column) for source in stream.sources],
        "split": (stream.first, stream.last),
        "tokenizer": describe(encode.tokenizer) or datasets.fingerprint.Hasher.hash(encode.tokenizer),
        "max_length": encode.max_length,
        "counted": cut.kind if cut.kind == "lines" else "tokens",
    }
    key = xxhash.xxh3_128_hexdigest(json.dumps(parts, ensure_ascii=False).encode(errors="surrogatepass"))
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "stream_lengths", f"{key}.json")
