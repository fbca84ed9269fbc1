"""Every way of encoding has the tokenizer's own ids, on any text; what a fast way does not know goes a slower one.

Needs ../shared/data for the released tokenizers and texts; where it is absent, tokenizers trained here stand in.
"""

import itertools
import json
import logging

import numpy as np
import pyarrow as pa
import pytest
from commands import SHARED
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import info_once

from utils import cached_words, fast_encoding, joined_words, tokenizer_training
from utils.byte_level_bpe import ByteLevelBPE, Unlike, byte_characters
from utils.fast_encoding import DocumentEncoder, Framed, OwnEncoder, Plain, TiktokenOrOwn, WordEncoder
from utils.tokenization import describe

RELEASED = ["gpt2", "bert-base-uncased", "xlnet-base-cased", "albert-base-v2", "openai-gpt"]
TRAINED = ["gpt2", "roberta", "bert", "albert", "xlnet"]
DATA = SHARED / "data"
needs_shared = pytest.mark.skipif(not DATA.is_dir(), reason="needs the texts in ../shared/data")

# Spaces, what may join them, what is special somewhere, and anything else.
AWKWARD = st.sampled_from(
    [" ", "  ", "\n", "\r\n", "\t", "\u3000", "\xa0", "\u0600", "\u0301", "\u200d", "\ufeff", "\x00", "\x85", "\u02d8", "\u00a8"]
    + ["'s", "'", "``", "''", "é", "e\u0301", "ﬁ", "Σ", "İ", "你", "好", "한", "가", "ß", "я", "😀", "\U0001f3fb", "12", "x", "the", "The(1)", ".5'll", "''t", "#a-b", "~"]
    + ["<|endoftext|>", "[MASK]", "[CLS]", "<mask>", "<sep>", "<unk>", "<s>", "</s>", "##", "\u2581", "<|\x00 between two texts \x00|>"]
)  # fmt: skip
DOCUMENT = st.lists(AWKWARD | st.text(max_size=4), max_size=14).map("".join)


@pytest.fixture(scope="module")
def tokenizers_here(corpus):
    text = Dataset.from_dict({"text": [*(corpus / "train.txt").read_text().splitlines(), "Grüße 你好 😀 über я"]})
    found = {f"trained {kind}": tokenizer_training.train(text, kind, 600) for kind in TRAINED}
    if DATA.is_dir():
        found |= {name: AutoTokenizer.from_pretrained(DATA / "tokenizers" / name) for name in RELEASED}
    return found


@pytest.fixture(scope="module")
def encoders(tokenizers_here):
    return {name: choose(tokenizer) for name, tokenizer in tokenizers_here.items()}


def choose(tokenizer, samples=(), max_length=None):
    info_once.cache_clear()  # it remembers what other tests made it say
    description = describe(tokenizer)
    return fast_encoding.choose(tokenizer, description and json.loads(description), list(samples), max_length)


def split(encoded) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(encoded.ids, np.cumsum(encoded.counts))[:-1]]


def assert_same(encoder, tokenizer, documents: list[str]) -> None:
    found = split(encoder(pa.array(documents, pa.string())))
    expected = [tokenizer(document, verbose=False)["input_ids"] for document in documents]
    for document, ours, own in zip(documents, found, expected, strict=True):
        assert ours == own, document


# ---- the same ids ----
@settings(max_examples=250, deadline=None)
@given(documents=st.lists(DOCUMENT, min_size=1, max_size=4))
@example(documents=["a ", " b", "", "", "  ", " "])
@example(documents=["x  <mask>  y", "a\u0600 \u0301b", "\u02d8 \u02d8a \u02d8", "word \n word\n \n word "])
def test_any_text_has_the_tokenizers_own_ids(encoders, tokenizers_here, documents):
    for name, encoder in encoders.items():
        assert isinstance(encoder, Framed), name
        assert_same(encoder, tokenizers_here[name], documents)


def test_each_kind_takes_its_fast_way(encoders):
    for name, encoder in encoders.items():
        assert isinstance(encoder.content, WordEncoder), name
        by_tiktoken = isinstance(encoder.content.encode.encode, TiktokenOrOwn)
        assert by_tiktoken == (name in ("gpt2", "trained gpt2", "trained roberta")), name


@needs_shared
def test_the_shared_texts_have_the_tokenizers_own_ids(encoders, tokenizers_here):
    documents = (DATA / "wikitext-2-raw-v1" / "wiki.test.raw").read_text("utf-8").splitlines(keepends=True)[:1500]
    for name in ("c4_demo.jsonl", "state_union.jsonl"):
        documents += [json.loads(line)["text"] for line in (DATA / name).read_text("utf-8").splitlines()[:12]]
    for name in RELEASED:
        found = encoders[name](pa.array(documents, pa.string()))
        rows = tokenizers_here[name](documents, verbose=False)["input_ids"]
        assert found.ids.tolist() == [token for row in rows for token in row], name
        assert found.counts.tolist() == [len(row) for row in rows], name


def pair_merges() -> tuple[Tokenizer, ByteLevelBPE]:
    """A vocabulary of all pairs of bytes: where a text is split shows in the ids."""
    characters = byte_characters()
    merges = [(characters[first], characters[second]) for first in range(256) for second in range(256)]
    tokens = [*(characters[byte] for byte in range(256)), *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer, ByteLevelBPE(json.loads(tokenizer.to_str()))


@pytest.fixture(scope="module")
def pairs():
    own, _ = pair_merges()
    return own, WordEncoder(OwnEncoder(own), json.loads(own.to_str()))


@settings(max_examples=300, deadline=None)
@given(documents=st.lists(st.lists(AWKWARD | st.just(" "), max_size=9).map("".join), min_size=1, max_size=4))
@example(documents=["a   b", "a  \n b \u3000 c", " \u0301a \xa0b", "a ", " b"])
def test_cuts_are_where_the_tokenizer_splits(pairs, documents):
    own, encode = pairs
    ids, counts = encode(pa.array(documents, pa.string()))
    expected = [own.encode(document).ids for document in documents]
    assert ids.tolist() == [token for row in expected for token in row] and counts.tolist() == list(map(len, expected))


# Each kind of ASCII, an apostrophe and what it may be followed by.
KINDS_IN_A_ROW = ["".join(row) for row in itertools.product("as1.-' ", repeat=5)]


def test_cuts_within_words_are_where_the_tokenizer_splits(pairs):
    own, encode = pairs
    ids, counts = encode(pa.array(KINDS_IN_A_ROW, pa.string()))
    expected = [found.ids for found in own.encode_batch_fast(KINDS_IN_A_ROW)]
    assert counts.tolist() == list(map(len, expected)) and ids.tolist() == list(itertools.chain(*expected))


def test_cuts_within_words_have_the_tokenizers_own_ids(encoders, tokenizers_here):
    for name, encoder in encoders.items():
        found = encoder(pa.array(KINDS_IN_A_ROW[::5], pa.string()))
        rows = tokenizers_here[name](KINDS_IN_A_ROW[::5], verbose=False)["input_ids"]
        assert split(found) == rows, name


def test_both_libraries_split_at_every_character_alike():
    """They have regular expressions of their own, with Unicode tables of their own."""
    own, fast = pair_merges()
    # Of the planes without a character, and of those for private use, some.
    points = [point for point in range(0x110000) if point < 0x20000 or 0xE0000 <= point < 0xE0200 or point % 97 == 0]
    probes = [
        f"a{c}a1{c}1!{c}! {c} {c}{c}\n{c}\n'{c}s{c}'s  {c}  \n"
        for c in (chr(point) for point in points if not 0xD800 <= point < 0xE000)
    ]
    for start in range(0, len(probes), 256):
        text = "".join(probes[start : start + 256])
        assert fast.encode([text])[0].tolist() == own.encode(text).ids, f"from {ascii(probes[start])}"


def test_every_character_beside_a_cut(tokenizers_here, encoders):
    """Before and behind spaces, in words and alone, for one of each kind of pre-tokenizer."""
    points = [*range(0x700), *range(0x2000, 0x2100), *range(0x3000, 0x3100), *range(0x700, 0xAC00, 23)]
    probes = [f"a {c}b {c} b{c} a{c}  {c} x" for c in map(chr, points)]
    for name in ("trained gpt2", "trained bert", "trained xlnet", *(RELEASED if DATA.is_dir() else [])):
        found = split(encoders[name](pa.array(probes, pa.string())))
        rows = tokenizers_here[name](probes, verbose=False)["input_ids"]
        assert [probe for probe, ours, own in zip(probes, found, rows, strict=True) if ours != own] == [], name


@pytest.mark.parametrize("text", ["\n" * 1_000_000 + "x", " " * 300_000, "a" * 300_000, "ab\n" * 100_000])
def test_texts_that_are_hard_on_regular_expressions(text, tokenizers_here, encoders):
    assert_same(encoders["trained gpt2"], tokenizers_here["trained gpt2"], [text, "b"])


# ---- merges that tiktoken would do otherwise ----
def bpe_of(merges: list[tuple[str, str]]) -> Tokenizer:
    characters = byte_characters()
    tokens = list(dict.fromkeys([*characters.values(), *(left + right for left, right in merges)]))
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


@st.composite
def merge_lists(draw) -> list[tuple[str, str]]:
    tokens, merges = ["a", "b"], []
    for _ in range(draw(st.integers(1, 9))):
        merge = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if merge not in merges:
            merges.append(merge)
            tokens.append("".join(merge))
    return merges


@settings(max_examples=400, deadline=None)
@given(merges=merge_lists(), texts=st.lists(st.text("ab", max_size=14), min_size=1, max_size=8))
@example(merges=[("b", "b"), ("a", "b"), ("ab", "b")], texts=["abb"])
def test_merges_are_refused_or_done_alike(merges, texts):
    tokenizer = bpe_of(merges)
    try:
        fast = ByteLevelBPE(json.loads(tokenizer.to_str()))
    except Unlike:
        return
    ids, counts = fast.encode(texts)
    own = [tokenizer.encode(text).ids for text in texts]
    assert ids.tolist() == [token for row in own for token in row] and counts.tolist() == list(map(len, own))


def test_merges_that_differ_are_refused():
    for merges in ([("b", "b"), ("a", "b"), ("ab", "b")], [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "ba")]):
        with pytest.raises(Unlike, match="merges"):
            ByteLevelBPE(json.loads(bpe_of(merges).to_str()))


# ---- many words at a time ----
class Counted:
    """Encodes as `encode` does, and notes what."""

    def __init__(self, encode):
        self.encode = encode
        self.texts: list[str] = []

    def __call__(self, texts: list[str]):
        self.texts += texts
        return self.encode(texts)


@pytest.mark.parametrize("kind", ["bert", "xlnet", "albert"])
def test_words_are_joined_and_all_else_is_not(kind, tokenizers_here):
    tokenizer = tokenizers_here[f"trained {kind}"]
    backend, mask = tokenizer.backend_tokenizer, tokenizer.mask_token
    alone = Counted(OwnEncoder(backend))
    encode = joined_words.joined_words(backend, json.loads(describe(tokenizer)), alone)
    words = [" the", "The", " 12", ",", "~", "a" * 200] * 100
    others = ["", " ", " é", "a b", "\n", "你", "\u2581", "\u2581a"]
    for texts, not_joined in ((words, []), (others, others), (["a", *others, " the"], others), ([], [])):
        alone.texts.clear()
        found, expected = encode(texts), OwnEncoder(backend)(texts)
        assert found[0].tolist() == expected[0].tolist() and found[1].tolist() == expected[1].tolist()
        assert alone.texts == not_joined
    # In one of two groups there are a text that is an added token, and one that holds it within a word.
    texts = [mask, f"a{mask}b", *words]
    found, expected = encode(texts), OwnEncoder(backend)(texts)
    assert found[0].tolist() == expected[0].tolist() and found[1].tolist() == expected[1].tolist()


def test_words_are_not_joined_where_a_normalizer_takes_them_apart(tokenizers_here):
    tokenizer = tokenizers_here["trained xlnet"]
    for pattern, content in ((":-)", ""), (":-)", " "), ("~", "x y")):
        steps = [normalizers.Replace(pattern, content), tokenizer.backend_tokenizer.normalizer]
        other = change(tokenizer, normalizer=normalizers.Sequence(steps))
        assert_same(choose(other), other, [":-) a:-)b :-)", "~ a~b", "word"])


# ---- falling back ----
def change(tokenizer, **parts) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


ODD_DOCUMENTS = ["Hello  world, ``it's''\n 12 ", "", " x", "<|endoftext|> a", "é ü\u0301 ˘ 你 好"]


@pytest.mark.parametrize(
    ("parts", "way"),
    [
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, DocumentEncoder),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)}, DocumentEncoder),
        ({"normalizer": normalizers.NFKC()}, DocumentEncoder),
        ({"normalizer": normalizers.Prepend("x")}, DocumentEncoder),
        ({"pre_tokenizer": pre_tokenizers.Metaspace()}, DocumentEncoder),
        ({"post_processor": processors.RobertaProcessing(("a", 1), ("b", 2))}, WordEncoder),
    ],
)
def test_an_unknown_part_takes_a_slower_way_and_the_log_says_so(parts, way, tokenizers_here, caplog):
    caplog.set_level(logging.INFO)
    tokenizer = change(tokenizers_here["trained gpt2"], **parts)
    encoder = choose(tokenizer)
    assert isinstance(encoder, Framed) and isinstance(encoder.content, way)
    assert_same(encoder, tokenizer, ODD_DOCUMENTS)
    assert ("document by document, not word by word: its" in caplog.text) == (way is DocumentEncoder)


def test_merges_with_options_keep_their_own_library(tokenizers_here):
    tokenizer = change(tokenizers_here["trained gpt2"])
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["model"]["ignore_merges"] = True
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)))
    encoder = choose(other)
    assert not isinstance(encoder.content.encode.encode, TiktokenOrOwn)
    assert_same(encoder, other, ODD_DOCUMENTS)


def test_added_tokens_that_take_the_spaces_beside_them(tokenizers_here):
    for name in ("trained gpt2", "trained bert", "trained xlnet"):
        tokenizer = change(tokenizers_here[name])
        tokenizer.add_tokens([AddedToken("<m>", lstrip=True, rstrip=True, normalized=False)])
        tokenizer.add_tokens(
            [AddedToken("two words", normalized=False), AddedToken("one", single_word=True, normalized=False)]
        )
        encoder = choose(tokenizer)
        assert isinstance(encoder.content, WordEncoder)
        assert_same(encoder, tokenizer, ["a  <m>  b", "a two words b", "one alone one", "<m>", "two  words <m"])


def test_a_token_looked_for_in_normalized_text_is_not_cut(tokenizers_here):
    tokenizer = change(tokenizers_here["trained bert"])
    tokenizer.add_tokens([AddedToken("new york", normalized=True)])
    encoder = choose(tokenizer)
    assert isinstance(encoder.content, DocumentEncoder)
    assert_same(encoder, tokenizer, ["in New York", "NEW  YORK new york"])


class Backwards(PreTrainedTokenizerFast):
    """A tokenizer with ideas of its own."""

    def __call__(self, text, **options):
        text = text[::-1] if isinstance(text, str) else [row[::-1] for row in text]
        return super().__call__(text, **options)


def test_a_tokenizer_whose_call_does_something_else_is_called(tokenizers_here, caplog):
    caplog.set_level(logging.INFO)
    tokenizer = Backwards(tokenizer_object=tokenizers_here["trained gpt2"].backend_tokenizer)
    encoder = choose(tokenizer)
    assert isinstance(encoder, Plain) and "encodes by itself" in caplog.text
    assert_same(encoder, tokenizer, ODD_DOCUMENTS)


def test_pieces_go_on_when_the_table_is_full(monkeypatch, tokenizers_here):
    monkeypatch.setattr(cached_words, "TABLE_PIECES", 3)
    for name in ("trained gpt2", "trained bert"):
        encoder = choose(tokenizers_here[name])
        for _ in range(3):
            assert_same(encoder, tokenizers_here[name], ["a b c d e f", "the a b"])
        assert len(encoder.content.encode.table.places) < 12
