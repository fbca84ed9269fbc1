"""Where text comes from: the hub, files, a folder saved by `datasets`, a stream; and the validation split."""

import contextlib
import dataclasses
import functools
import glob
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import datasets
import pandas
from datasets import Dataset, DatasetDict
from datasets.fingerprint import Hasher

from utils import modelscope, stream_shards, streaming
from utils.compressed_files import SUFFIXES, decompressed_copy
from utils.data_arguments import DataArguments
from utils.errors import UsageError, one_line
from utils.file_diagnosis import check_short_rows, check_start, check_surrogates, diagnose, is_tsv
from utils.file_kinds import BUILDERS
from utils.hub import dataset_name, explain
from utils.main_process import told_by_main
from utils.streaming import Stream

logger = logging.getLogger(__name__)

Text: TypeAlias = Dataset | Stream


def load_text(
    data: DataArguments,
    needed: list[str],
    cache_dir: str | None = None,
    token: str | None = None,
    seed: int = 0,
) -> dict[str, Text]:
    """{"train": ..., "validation": ...}, each with the one column `text`, of what `data` names.

    needed: the splits that the run uses; one of them missing, or empty, is an error. Where there is no validation
    split, the first `validation_split_percentage` of the training text is taken for it, as transformers' scripts do.
    seed: of the draws from several files (--data_mix).

    Of a stream, the main process finds out what there is, for all. Raises UsageError, naming flag or file and the remedy.
    """
    if data.streaming and data.hub != "modelscope":  # which each process has in a folder of its own
        return told_by_main(functools.partial(_load_text, data, needed, cache_dir, token, seed))
    return _load_text(data, needed, cache_dir, token, seed)


def _load_text(
    data: DataArguments, needed: list[str], cache_dir: str | None = None, token: str | None = None, seed: int = 0
) -> dict[str, Text]:
    if data.data_mix:
        return _load_mix(data, needed, cache_dir, token, seed)
    if data.dataset_name is not None:
        splits = _load_dataset(data, cache_dir, token)
    else:
        splits = _load_files(data, cache_dir)
    if "validation" not in splits and "train" in splits:
        splits = _split_validation(splits, data)
    for name in needed:
        if name not in splits:
            source = f"--dataset_name {data.dataset_name}" if data.dataset_name else "--validation_file"
            flag = "--do_train" if name == "train" else "--do_eval"
            raise UsageError(f"{flag}: {source} has no {name} text; its splits are {', '.join(splits) or 'none'}")
    return {name: _text_column(splits[name], data, name) for name in needed}


# ---- sources ----
def _load_mix(
    data: DataArguments, needed: list[str], cache_dir: str | None, token: str | None, seed: int
) -> dict[str, Text]:
    """Each file's training text, drawn from by weight; a file that is read through begins again until all have been."""
    shares = data.mixed_files()
    parts = [
        _load_text(dataclasses.replace(data, data_mix=None, train_file=[file]), needed, cache_dir, token)
        for file in shares
    ]
    if data.streaming:
        return _stream_mix(parts, list(shares.values()), data)
    texts = {}
    if "train" in needed:
        texts["train"] = datasets.interleave_datasets(
            [part["train"] for part in parts],
            probabilities=list(shares.values()),
            seed=seed,
            stopping_strategy="all_exhausted",
        )
    if "validation" in needed:
        own = [part["validation"] for part in parts]
        texts["validation"] = own[0] if data.validation_file else datasets.concatenate_datasets(own)
    return texts


def _stream_mix(parts: list[dict[str, Stream]], weights: list[float], data: DataArguments) -> dict[str, Stream]:
    texts = {}
    for split in parts[0]:
        texts[split] = dataclasses.replace(parts[0][split], sources=[part[split].sources[0] for part in parts])
    if "train" in texts:
        texts["train"] = dataclasses.replace(texts["train"], weights=weights)
    if data.validation_file and "validation" in texts:
        texts["validation"] = parts[0]["validation"]
    return texts


def _load_dataset(data: DataArguments, cache_dir: str | None, token: str | None) -> dict[str, Text]:
    assert data.dataset_name is not None
    name = os.path.expanduser(data.dataset_name)
    if os.path.isfile(name):
        raise UsageError(f"--dataset_name {name}: is a file; give it to --train_file")
    try:
        if _is_saved(name):
            saved = datasets.load_from_disk(name)
            saved = saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
            return {split: _stream(part, data) if data.streaming else part for split, part in saved.items()}
        if not os.path.exists(name):
            on_modelscope = data.hub == "modelscope"
            name = (
                modelscope.dataset_folder("--dataset_name", name, cache_dir) if on_modelscope else dataset_name(name)
            )
        loaded = datasets.load_dataset(
            name, data.dataset_config_name, cache_dir=cache_dir, token=token, streaming=data.streaming
        )
        return {split: _stream(part, data) if data.streaming else part for split, part in loaded.items()}
    except UsageError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and "Config name is missing" in str(error):
            raise UsageError(
                f"--dataset_name {data.dataset_name}: add --dataset_config_name; {one_line(error)[:300]}"
            ) from error
        if isinstance(error, ValueError) and "BuilderConfig" in str(error):
            raise UsageError(f"--dataset_config_name {data.dataset_config_name}: {one_line(error)[:300]}") from error
        raise explain(error, "--dataset_name", data.dataset_name) from error


def _stream(text: datasets.Dataset | datasets.IterableDataset, data: DataArguments) -> Stream:
    told = functools.partial(explain, flag="--dataset_name", name=str(data.dataset_name))
    # Of a data set on the hub nothing says beforehand whether it is what it was.
    fingerprint = text._fingerprint if isinstance(text, Dataset) else None
    return Stream([streaming.Source(stream_shards.shards_of(text, told), fingerprint=fingerprint)])


def _is_saved(name: str) -> bool:
    return any(os.path.exists(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json"))


def _load_files(data: DataArguments, cache_dir: str | None) -> dict[str, Text]:
    named = {"train": ("--train_file", data.train_file), "validation": ("--validation_file", data.validation_file)}
    files = {split: find_files(flag, given) for split, (flag, given) in named.items() if given}
    return {split: _read_files(split_files, data, split, cache_dir) for split, split_files in files.items()}


def _read_files(files: list[str], data: DataArguments, split: str, cache_dir: str | None) -> Text:
    builder = builder_of(files[0])
    others = [file for file in files if builder_of(file) != builder or is_tsv(file) != is_tsv(files[0])]
    if others:
        raise UsageError(f"--{split}_file: {files[0]} and {others[0]} are of different kinds; convert one of them")
    options: dict = {"cache_dir": cache_dir}
    if builder == "text":
        options["keep_linebreaks"] = data.keep_linebreaks
        options["sample_by"] = "paragraph" if data.packing == "documents" else "line"
    if builder == "csv":
        # Without index_col, a first row longer than the header moves every column by one, in silence.
        options |= {"sep": "\t" if is_tsv(files[0]) else ",", "index_col": False}
    told = functools.partial(_explain, files=files, builder=builder, split=split)
    if data.streaming:
        return _stream_files(files, builder, split, options, told)
    try:
        text = _load(files, builder, split, options)
        _check_loaded(text, files, builder, _choose_column(text.column_names, data, split))
        return text
    except UsageError:
        raise
    except Exception as error:
        raise told(error) from error


def _stream_files(files: list[str], builder: str, split: str, options: dict, told: stream_shards.Explain) -> Stream:
    if options.get("sample_by") == "line" and not any(file.endswith(SUFFIXES) for file in files):
        shards: Sequence[stream_shards.Shard] = stream_shards.shards_of_lines(files, options["keep_linebreaks"], told)
    else:
        for file in files if builder == "json" else []:
            check_surrogates(file)
        try:
            shards = stream_shards.shards_of(_load(files, builder, split, {**options, "streaming": True}), told)
        except Exception as error:
            raise told(error) from error
    states = [(os.path.abspath(file), os.path.getsize(file), os.stat(file).st_mtime_ns) for file in files]
    fingerprint = Hasher.hash([states, sorted(options.items(), key=str)])
    return Stream([streaming.Source(shards, fingerprint=fingerprint)])


def _load(files: list[str], builder: str, split: str, options: dict) -> Dataset | datasets.IterableDataset:
    if builder == "parquet":
        # Parquet is read from its end, which a compressed stream does not know.
        folder = os.path.join(options["cache_dir"] or datasets.config.HF_DATASETS_CACHE, "decompressed")
        files = [decompressed_copy(file, folder) for file in files]
    with _strict():
        names = [glob.escape(file) for file in files]
        return datasets.load_dataset(builder, data_files={split: names}, split=split, **options)


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    """Makes an error of pandas' warning that it drops the columns beyond a header."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        yield


def _check_loaded(text: Dataset, files: list[str], builder: str, column: str) -> None:
    """Finds what the readers of `datasets` let pass."""
    if builder == "json":
        text.data.column(column).validate(full=True)  # that it is UTF-8
        for file in files:
            check_surrogates(file)
    if builder == "csv" and text.data.column(column).null_count:
        for file in files:
            check_short_rows(file, column)


def _explain(error: Exception, files: list[str], builder: str, split: str) -> UsageError:
    """What to tell about an error while files were read."""
    # The loader's own message tells neither file nor line; looking for the place costs time only now.
    for file in files:
        try:
            diagnose(file, builder)
        except UsageError as found:
            return found
        except Exception:
            logger.debug("%s: not diagnosed", file, exc_info=True)
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    what = one_line(error)[:300].rstrip(".")
    if isinstance(error, OSError) and error.filename and str(error.filename) not in files:
        return UsageError(
            f"{error.filename}: {error.strerror}; this is the cache of what is read: name another folder by --cache_dir or HF_HOME"
        )
    if "corresponds to no data" in what or isinstance(error, pandas.errors.EmptyDataError):
        return _no_row(files, split)
    others = f" or one of {len(files) - 1} more" if len(files) > 1 else ""
    return UsageError(
        f"--{split}_file: {files[0]}{others} cannot be read as {builder}: {what}; mend it or leave it out"
    )


def _no_row(files: list[str], split: str) -> UsageError:
    return UsageError(f"--{split}_file {files[0]}: holds no row of text; name another file")


def find_files(flag: str, given: list[str]) -> list[str]:
    """The files that names and globs stand for, in the order given and each glob sorted. Raises UsageError."""
    files = []
    for name in given:
        path = os.path.expanduser(name)
        if "**" in path:
            _check_links(flag, name, path)
        found = (
            sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not os.path.exists(path) else [path]
        )
        if not found:
            raise UsageError(f"{flag} {name}: matches no file")
        files += found
    for file in files:
        if os.path.isdir(file):
            raise UsageError(
                f"{flag} {file}: is a folder; name files or a glob such as {os.path.join(file, '*.txt')}, or give a folder "
                "saved by `datasets` to --dataset_name"
            )
        if not os.path.exists(file):
            remedy = "; addresses are not read, download it first" if "://" in file else ""
            raise UsageError(f"{flag} {file}: no such file{remedy}")
        if not os.access(file, os.R_OK):
            raise UsageError(f"{flag} {file}: may not be read; check its permissions")
        if os.path.getsize(file) == 0:
            raise UsageError(f"{flag} {file}: is empty")
        check_start(file, builder_of(file))
    return files


def _check_links(flag: str, name: str, pattern: str) -> None:
    """Raises UsageError for a link below a `**` that leads back up: glob would follow it again and again."""
    for top in glob.glob(pattern.partition("**")[0] or "."):
        for folder, subfolders, _ in os.walk(top, followlinks=True):
            here = os.path.realpath(folder)
            for link in (os.path.join(folder, entry) for entry in subfolders):
                if os.path.islink(link) and os.path.commonpath([here, os.path.realpath(link)]) == os.path.realpath(
                    link
                ):
                    raise UsageError(
                        f"{flag} {name}: {link} is a link to a folder that it lies in; remove it, or name files"
                    )


def builder_of(file: str) -> str:
    """The reader of `datasets` for a file, by its name without .gz or .zst. Raises UsageError."""
    path = Path(file)
    suffix = (Path(path.stem) if path.suffix in SUFFIXES else path).suffix.lower()
    if suffix not in BUILDERS:
        raise UsageError(
            f"{file}: unknown kind of file, {suffix or 'without a suffix'}; known are {' '.join(BUILDERS)}, also with .gz or .zst behind; rename or convert it"
        )
    return BUILDERS[suffix]


# ---- splits and columns ----
def _split_validation(splits: dict[str, Text], data: DataArguments) -> dict[str, Text]:
    percentage = data.validation_split_percentage or 0
    train = splits["train"]
    if isinstance(train, Stream):
        train, validation = train.split(percentage)
        return {**splits, "train": train, "validation": validation}
    # datasets' own rounding of "train[:5%]", so that both splits are those of transformers' scripts.
    boundary = round(len(train) * percentage / 100)
    return {
        **splits,
        "train": _rows(train, boundary, len(train)),
        "validation": _rows(train, 0, boundary),
    }


def _rows(text: Dataset, start: int, end: int) -> Dataset:
    return text.select(range(start, end) if start < end else [])  # an empty range is refused


def _text_column(text: Text, data: DataArguments, split: str) -> Text:
    if isinstance(text, Stream):
        return _streamed_column(text, data, split)
    columns = text.column_names
    if len(text) == 0:
        raise UsageError(_empty_message(data, split))
    column = _choose_column(columns, data, split)
    kind = getattr(text.features[column], "dtype", text.features[column])
    if kind not in ("string", "large_string"):
        raise _no_text(column, kind, columns, split)
    text = text.remove_columns([name for name in columns if name != column])
    return text if column == "text" else text.rename_column(column, "text")


def _streamed_column(text: Stream, data: DataArguments, split: str) -> Stream:
    row = text.first_row()
    if row is None:
        raise _no_row(*_files_of(data, split)) if not data.dataset_name else UsageError(_empty_message(data, split))
    column = _choose_column(list(row), data, split)
    if not isinstance(row[column], str | None):
        raise _no_text(column, type(row[column]).__name__, list(row), split)
    text = dataclasses.replace(text, sources=[dataclasses.replace(text.sources[0], column=column)])
    if next(iter(text), None) is None:
        raise UsageError(_empty_message(data, split))
    return text


def _files_of(data: DataArguments, split: str) -> tuple[list[str], str]:
    """(the files, by which flag) that a split comes from."""
    return (
        (data.validation_file, split)
        if split == "validation" and data.validation_file
        else (data.train_file or [], "train")
    )


def _no_text(column: str, kind: str, columns: list[str], split: str) -> UsageError:
    return UsageError(
        f"--text_column {column}: holds {kind}, not text; the {split} text has columns {', '.join(columns)}"
    )


def _choose_column(columns: list[str], data: DataArguments, split: str) -> str:
    if data.text_column is not None and data.text_column not in columns:
        raise UsageError(
            f"--text_column {data.text_column}: no such column; the {split} text has {', '.join(columns)}"
        )
    return data.text_column or ("text" if "text" in columns else columns[0])


def _empty_message(data: DataArguments, split: str) -> str:
    if data.validation_file is None and data.dataset_name is None:
        shortage, remedy = "short a training text", " or another percentage"
        if data.packing == "documents":
            shortage = "few documents, which are parted by blank lines in a text file"
            remedy = ", or leave out --packing documents"
        return (
            f"--validation_split_percentage {data.validation_split_percentage}: leaves no {split} text of so {shortage}; give "
            f"--validation_file{remedy}"
        )
    source = f"--dataset_name {data.dataset_name}" if data.dataset_name else f"--{split}_file"
    return f"{source}: its {split} text is empty; name another"
