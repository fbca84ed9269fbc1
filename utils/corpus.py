"""Where text comes from: the hub, files, a folder saved by `datasets`, a stream; and the validation split."""

import glob
import logging
import os
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, IterableDataset

from utils.arguments import DataArguments
from utils.errors import UsageError, one_line
from utils.file_diagnosis import diagnose, open_decompressed
from utils.hub import dataset_name, explain

logger = logging.getLogger(__name__)

BUILDERS = {
    ".txt": "text",
    ".text": "text",
    ".raw": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".zst")

Text = Dataset | IterableDataset


def load_text(
    data: DataArguments,
    needed: list[str],
    cache_dir: str | None = None,
    token: str | None = None,
) -> dict[str, Text]:
    """{"train": ..., "validation": ...}, each with the one column `text`, of what `data` names.

    needed: the splits that the run uses; one of them missing, or empty, is an error. Where there is no validation
    split, the first `validation_split_percentage` of the training text is taken for it, as transformers' scripts do.

    Raises UsageError, naming flag or file and the remedy.
    """
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
def _load_dataset(data: DataArguments, cache_dir: str | None, token: str | None) -> dict[str, Text]:
    name = data.dataset_name
    try:
        if _is_saved(name):
            saved = datasets.load_from_disk(name)
            saved = saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
            return {split: part.to_iterable_dataset() if data.streaming else part for split, part in saved.items()}
        if not os.path.exists(name):
            name = dataset_name(name)
        loaded = datasets.load_dataset(
            name, data.dataset_config_name, cache_dir=cache_dir, token=token, streaming=data.streaming
        )
        return dict(loaded)
    except Exception as error:
        if isinstance(error, ValueError) and "Config name is missing" in str(error):
            raise UsageError(
                f"--dataset_name {data.dataset_name}: add --dataset_config_name; {one_line(error)[:300]}"
            ) from error
        if isinstance(error, ValueError) and "BuilderConfig" in str(error):
            raise UsageError(f"--dataset_config_name {data.dataset_config_name}: {one_line(error)[:300]}") from error
        raise explain(error, "--dataset_name", data.dataset_name) from error


def _is_saved(name: str) -> bool:
    return any(os.path.exists(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json"))


def _load_files(data: DataArguments, cache_dir: str | None) -> dict[str, Text]:
    named = {"train": ("--train_file", data.train_file), "validation": ("--validation_file", data.validation_file)}
    files = {split: find_files(flag, given) for split, (flag, given) in named.items() if given}
    return {split: _read_files(split_files, data, split, cache_dir) for split, split_files in files.items()}


def _read_files(files: list[str], data: DataArguments, split: str, cache_dir: str | None) -> Text:
    builder = builder_of(files[0])
    others = [file for file in files if builder_of(file) != builder or _is_tsv(file) != _is_tsv(files[0])]
    if others:
        raise UsageError(f"--{split}_file: {files[0]} and {others[0]} are of different kinds; convert one of them")
    options: dict = {"keep_linebreaks": data.keep_linebreaks} if builder == "text" else {}
    if _is_tsv(files[0]):
        options["sep"] = "\t"
    try:
        return datasets.load_dataset(
            builder, data_files={split: files}, split=split, cache_dir=cache_dir, streaming=data.streaming, **options
        )
    except Exception as error:
        # The loader's own message tells neither file nor line; looking for the place costs time only now.
        for file in files:
            diagnose(file, builder)
        raise UsageError(f"--{split}_file {files[0]}: cannot be read as {builder}: {_innermost(error)}") from error


def find_files(flag: str, given: list[str]) -> list[str]:
    """The files that names and globs stand for, in the order given and each glob sorted. Raises UsageError."""
    files = []
    for name in given:
        path = os.path.expanduser(name)
        found = sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.exists(path) else [path]
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
            raise UsageError(f"{flag} {file}: no such file")
        if not os.access(file, os.R_OK):
            raise UsageError(f"{flag} {file}: may not be read; check its permissions")
        if os.path.getsize(file) == 0:
            raise UsageError(f"{flag} {file}: is empty")
        if builder_of(file) == "text":
            _refuse_binary(file)
    return files


def builder_of(file: str) -> str:
    """The reader of `datasets` for a file, by its name without .gz or .zst. Raises UsageError."""
    path = Path(file)
    suffix = (Path(path.stem) if path.suffix in COMPRESSED else path).suffix.lower()
    if suffix not in BUILDERS:
        raise UsageError(
            f"{file}: unknown kind {suffix or 'of file'!r}; known are {' '.join(BUILDERS)}, with .gz or .zst behind"
        )
    return BUILDERS[suffix]


def _is_tsv(file: str) -> bool:
    return ".tsv" in Path(file).suffixes


def _refuse_binary(file: str) -> None:
    try:
        with open_decompressed(file) as stream:
            start = stream.read(1 << 16)
    except Exception as error:
        raise UsageError(f"{file}: is not a whole compressed file: {one_line(error)}") from error
    if b"\0" in start:
        raise UsageError(f"{file}: is binary, not text (a zero byte at byte offset {start.index(0)}); give UTF-8 text")


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)[:300]


# ---- splits and columns ----
def _split_validation(splits: dict[str, Text], data: DataArguments) -> dict[str, Text]:
    percentage = data.validation_split_percentage or 0
    train = splits["train"]
    if isinstance(train, IterableDataset):
        # A stream has no length: of every hundred documents, the first few validate.
        return {
            **splits,
            "train": train.filter(lambda _, index: index % 100 >= percentage, with_indices=True),
            "validation": train.filter(lambda _, index: index % 100 < percentage, with_indices=True),
        }
    # datasets' own rounding of "train[:5%]", so that both splits are those of transformers' scripts.
    boundary = round(len(train) * percentage / 100)
    return {
        **splits,
        "train": train.select(range(boundary, len(train))),
        "validation": train.select(range(boundary)),
    }


def _text_column(text: Text, data: DataArguments, split: str) -> Text:
    if isinstance(text, IterableDataset):
        columns = text.column_names or list(next(iter(text), {}))
    else:
        columns = text.column_names
        if len(text) == 0:
            raise UsageError(_empty_message(data, split))
    if data.text_column is not None and data.text_column not in columns:
        raise UsageError(
            f"--text_column {data.text_column}: no such column; the {split} text has {', '.join(columns)}"
        )
    column = data.text_column or ("text" if "text" in columns else columns[0])
    features = text.features
    if features is not None and getattr(features[column], "dtype", None) not in ("string", "large_string"):
        raise UsageError(
            f"--text_column {column}: holds {getattr(features[column], 'dtype', features[column])}, not text; the {split} "
            f"text has columns {', '.join(columns)}"
        )
    text = text.remove_columns([name for name in columns if name != column])
    return text if column == "text" else text.rename_column(column, "text")


def _empty_message(data: DataArguments, split: str) -> str:
    if split == "validation" and data.validation_file is None and data.dataset_name is None:
        return (
            f"--validation_split_percentage {data.validation_split_percentage}: leaves no validation text of so short a "
            "training text; give --validation_file or a greater percentage"
        )
    source = data.dataset_name or (data.train_file if split == "train" else data.validation_file)
    return f"the {split} text of {source} is empty"
