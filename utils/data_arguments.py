"""Flags about text: where it comes from, how it is cut, and what is to be predicted of it."""

from dataclasses import dataclass, field

from utils.errors import UsageError


@dataclass
class DataArguments:
    """Where text comes from and how it is cut."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset's name on the hub (wikitext), or a folder saved by `datasets`."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "The dataset's configuration, e.g. wikitext-2-raw-v1."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Training text: txt, csv, tsv, json, jsonl or parquet, also .gz or .zst; several, or a glob."
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Validation text, as train_file. Default: a part of the training text."}
    )
    data_mix: list[str] | None = field(
        default=None,
        metadata={
            "help": "Training text drawn from several files: FILE=WEIGHT ..., weights in any unit. Each draw takes the next "
            "document of a file that is chosen by weight; an epoch ends when all have been read through."
        },
    )
    text_column: str | None = field(
        default=None, metadata={"help": "The column that holds the text. Default: `text`, else the first one."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N blocks only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first N blocks only."})
    packing: str = field(
        default="blocks",
        metadata={
            "help": "blocks: all documents end to end, cut where a block is full. documents: whole documents in blocks, "
            "each of which sees itself alone; in text files a blank line ends a document.",
            "choices": ["blocks", "documents"],
        },
    )
    append_eos: bool = field(
        default=False,
        metadata={"help": "End each document that is not blank with the tokenizer's end-of-text token."},
    )
    keep_remainder: bool = field(
        default=False,
        metadata={"help": "With packing blocks: keep the last block of a split, which is shorter, and pad it."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the text while training, never all of it. From the hub it needs --max_steps."},
    )
    shuffle_buffer_size: int = field(
        default=1000,
        metadata={
            "help": "With --streaming: how many blocks each process, or each of its DataLoader workers, holds and shuffles "
            "at a time. 1: the text's own order."
        },
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again, even if the result is cached."})
    validation_split_percentage: int | None = field(
        default=5, metadata={"help": "How much of the training text validates, where there is no validation text."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep the line breaks of text files."})
    full_head: bool = field(
        default=False,
        metadata={
            "help": "Compute the logits of all positions at once, as transformers does: slower, and more memory."
        },
    )

    def __post_init__(self) -> None:
        self.hub = "huggingface"  # --hub, which is a flag of the model; by arguments.parse_run
        files = self.train_file or self.validation_file or self.data_mix
        if self.data_mix is not None and (self.train_file or self.dataset_name):
            other = f"--train_file {self.train_file[0]}" if self.train_file else f"--dataset_name {self.dataset_name}"
            raise UsageError(f"--data_mix and {other}: give one source")
        self.mixed_files()
        if self.dataset_name is None and not files:
            raise UsageError("no text: add --train_file FILE, or --dataset_name NAME for a dataset on the hub")
        if self.dataset_name is not None and files:
            raise UsageError(
                f"--dataset_name {self.dataset_name} and --train_file/--validation_file {files[0]}: give one source"
            )
        percentage = self.validation_split_percentage
        if percentage is not None and not 0 < percentage < 100:
            raise UsageError(f"--validation_split_percentage {percentage}: give a whole number from 1 to 99")
        if self.packing == "documents" and self.keep_remainder:
            raise UsageError("--keep_remainder: --packing documents leaves no remainder; drop the flag")
        for name in ("append_eos", "keep_remainder"):
            if getattr(self, name) and self.streaming:
                raise UsageError(f"--{name} does not work with --streaming; leave one of them out")
        names = ("max_train_samples", "max_eval_samples", "preprocessing_num_workers", "shuffle_buffer_size")
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value}: give 1 or more, or leave it out")

    def mixed_files(self) -> dict[str, float]:
        """The files of --data_mix and their shares, which sum up to 1; none without it. Raises UsageError."""
        weights: dict[str, float] = {}
        for part in self.data_mix or []:
            file, _, number = part.rpartition("=")
            try:
                weight = float(number)
            except ValueError:
                weight = 0.0
            if not file or not 0 < weight < float("inf"):
                raise UsageError(f"--data_mix {part}: give FILE=WEIGHT with a weight above 0, such as texts.txt=2")
            if file in weights:
                raise UsageError(f"--data_mix {part}: {file} is named twice")
            weights[file] = weight
        return {file: weight / sum(weights.values()) for file, weight in weights.items()}


@dataclass
class CausalDataArguments(DataArguments):
    """Text for run_clm.py."""

    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens in a block. Default: what the tokenizer says, else the model's positions, at most 1024."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None and self.block_size < 2:
            raise UsageError(
                f"--block_size {self.block_size}: a block has a token and its successor at least, give 2 or more"
            )


@dataclass
class SequenceDataArguments(DataArguments):
    """Text whose masked or permuted tokens are predicted, a sequence at a time."""

    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Tokens in a sequence, special ones included. Default: what tokenizer and model can take."},
    )
    line_by_line: bool = field(
        default=False, metadata={"help": "Each line of the text is a sequence of its own, instead of all end to end."}
    )
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "With line_by_line: pad all to max_seq_length, not to the longest line of the batch."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_seq_length is not None and self.max_seq_length < 2:
            raise UsageError(f"--max_seq_length {self.max_seq_length}: give 2 or more")
        if self.pad_to_max_length and not self.line_by_line:
            raise UsageError("--pad_to_max_length: pads lines; add --line_by_line, or leave it out")
        if self.packing == "documents" and self.line_by_line:
            raise UsageError("--packing documents does not work with --line_by_line; leave one of them out")
        if self.keep_remainder and self.line_by_line:
            raise UsageError("--keep_remainder: --line_by_line leaves no remainder; drop the flag")

    @property
    def has_equal_lengths(self) -> bool:
        """Whether all batches have one length."""
        return not self.line_by_line or self.pads_to_length

    @property
    def pads_to_length(self) -> bool:
        """Whether shorter samples are filled up to max_seq_length, so that all batches have one shape."""
        return self.pad_to_max_length or self.packing == "documents" or self.keep_remainder


@dataclass
class MaskedDataArguments(SequenceDataArguments):
    """Text for run_mlm.py."""

    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are predicted."})
    whole_word_mask: bool = field(default=False, metadata={"help": "Predict all tokens of a word or none."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("--mlm_probability", self.mlm_probability)


@dataclass
class PermutedDataArguments(SequenceDataArguments):
    """Text for run_plm.py."""

    max_seq_length: int | None = field(default=512, metadata={"help": "Tokens in a sequence, special ones included."})
    plm_probability: float = field(
        default=1 / 6, metadata={"help": "Length of a predicted span by the length of its surroundings."}
    )
    max_span_length: int = field(default=5, metadata={"help": "The longest span that is predicted."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("--plm_probability", self.plm_probability)
        if self.max_span_length < 1:
            raise UsageError(f"--max_span_length {self.max_span_length}: give 1 or more")
        for_any_length = type(self).max_span_length  # the default
        if self.max_seq_length is not None and self.max_span_length > max(for_any_length, self.max_seq_length):
            raise UsageError(
                f"--max_span_length {self.max_span_length}: more than the {self.max_seq_length} tokens of a sequence; give less"
            )
        if self.max_seq_length is not None and self.plm_probability * self.max_seq_length < 1:
            raise UsageError(
                f"--plm_probability {self.plm_probability}: less than one of {self.max_seq_length} tokens would be "
                "predicted; give more, or a longer --max_seq_length"
            )


def _check_share(flag: str, value: float) -> None:
    if not 0 < value < 1:
        raise UsageError(f"{flag} {value}: give a number above 0 and below 1, such as 0.15")
