"""Trains a tokenizer of a model family's own kind on a corpus."""

from collections.abc import Iterator

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as AnyTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from utils.errors import UsageError, one_line
from utils.streaming import FirstDocuments, Stream

BATCH = 1000
STREAMED_DOCUMENTS = 100_000  # what is read of a stream
CLASSIFIERS = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def train(text: Dataset | Stream, model_type: str, vocab_size: int) -> AnyTokenizer:
    """A tokenizer of the kind that `model_type` was published with, trained on the column `text`.

    bert, distilbert: WordPiece, lower case. albert, xlnet: Unigram, with each one's special tokens at their positions.
    roberta and other masked models: byte-level BPE with RoBERTa's special tokens. Any other: of GPT-2's kind.
    Byte-level BPE comes out the same each time; the trainers of WordPiece and Unigram walk through hash tables and number
    their tokens anew in each process, so a run that resumes takes the tokenizer that it saved.

    vocab_size: at most so many tokens; a small corpus has fewer. Raises UsageError if it cannot hold the alphabet.
    """
    if isinstance(text, Stream):
        text = text.take(STREAMED_DOCUMENTS)
    makers = {
        "bert": train_wordpiece,
        "distilbert": train_wordpiece,
        "albert": train_albert_unigram,
        "xlnet": train_xlnet_unigram,
    }
    otherwise = train_roberta_bpe if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else train_byte_level_bpe
    try:
        tokenizer = makers.get(model_type, otherwise)(text, vocab_size)
    except Exception as error:  # tokenizers raises bare ones
        raise UsageError(f"--vocab_size {vocab_size}: {one_line(error)}") from error
    if len(tokenizer) > vocab_size:
        raise UsageError(
            f"--vocab_size {vocab_size}: the characters of this text alone are {len(tokenizer)} tokens; give more"
        )
    return tokenizer


def train_byte_level_bpe(text: Dataset | Stream, vocab_size: int, end_of_text: str = "<|endoftext|>") -> AnyTokenizer:
    """Byte-level BPE of GPT-2's kind. `end_of_text` begins, ends and stands for the unknown, as in GPT-2."""
    tokenizer = _trained_byte_level_bpe(text, vocab_size, [end_of_text])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return GPT2TokenizerFast(
        tokenizer_object=tokenizer, bos_token=end_of_text, eos_token=end_of_text, unk_token=end_of_text
    )


def train_roberta_bpe(text: Dataset | Stream, vocab_size: int) -> AnyTokenizer:
    """Byte-level BPE with <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> 4; a sequence is <s> text </s>."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = _trained_byte_level_bpe(text, vocab_size, special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return _wrap(
        tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def train_wordpiece(text: Dataset | Stream, vocab_size: int) -> AnyTokenizer:
    """WordPiece of BERT's uncased kind: [PAD] 0 [UNK] 1 [CLS] 2 [SEP] 3 [MASK] 4; a sequence is [CLS] text [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(_batches(text), trainer)
    _classify(tokenizer, cls_id=2, sep_id=3)
    return _wrap(tokenizer, pad_token="[PAD]", unk_token="[UNK]", **CLASSIFIERS)


def train_albert_unigram(text: Dataset | Stream, vocab_size: int) -> AnyTokenizer:
    """Unigram of ALBERT's kind, lower case: <pad> 0 <unk> 1 [CLS] 2 [SEP] 3 [MASK] 4; a sequence is [CLS] text [SEP]."""
    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = _trained_unigram(text, vocab_size, special, lowercase=True)
    _classify(tokenizer, cls_id=2, sep_id=3)
    names = {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "<pad>", "unk_token": "<unk>"}
    return _wrap(tokenizer, **names, **CLASSIFIERS)


def train_xlnet_unigram(text: Dataset | Stream, vocab_size: int) -> AnyTokenizer:
    """Unigram of XLNet's kind: <unk> 0 <s> 1 </s> 2 <cls> 3 <sep> 4 <pad> 5 <mask> 6 <eod> 7 <eop> 8.

    A sequence is text <sep> <cls>, and padding stands at its left.
    """
    special = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"]
    tokenizer = _trained_unigram(text, vocab_size, special, lowercase=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A:0 <sep>:0 <cls>:2",
        pair="$A:0 <sep>:0 $B:1 <sep>:1 <cls>:2",
        special_tokens=[("<sep>", 4), ("<cls>", 3)],
    )
    return _wrap(
        tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<cls>",
        sep_token="<sep>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="left",
    )


def _trained_byte_level_bpe(text: Dataset | Stream, vocab_size: int, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_batches(text), trainer)
    return tokenizer


def _trained_unigram(text: Dataset | Stream, vocab_size: int, special: list[str], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    steps = [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Lowercase()] if lowercase else steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_batches(text), trainer)
    return tokenizer


def _classify(tokenizer: Tokenizer, cls_id: int, sep_id: int) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls_id), ("[SEP]", sep_id)],
    )


def _wrap(tokenizer: Tokenizer, **names: str) -> AnyTokenizer:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _batches(text: Dataset | FirstDocuments) -> Iterator[list[str]]:
    for batch in text.iter(batch_size=BATCH):
        yield [document for document in batch["text"] if document]
