"""The kinds of files that text comes in, by their suffix: the reader of `datasets` for each."""

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
