"""utils/document_packing.py: whole documents in blocks, each computed as if it were alone."""

import itertools

import families
import numpy as np
import pytest
import tiny
import tiny_xlnet
import torch
from commands import TINY_GPT2, losses, results, run_script
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    modeling_flash_attention_utils,
)

from utils import document_packing
from utils.errors import UsageError
from utils.objectives import causal, dynamic_masking, masked, permutation, predicted_rows, relative_attention

LENGTH = 24
LENGTHS = [9, 5, 7, 24, 11, 3, 13, 60, 2]


# ---- which documents a block holds ----
@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 80))
def test_each_piece_is_in_one_block_and_no_two_blocks_would_fit_into_one(lengths, block_size):
    lengths = np.array(lengths, dtype=np.int64)
    blocks = document_packing.best_fit(lengths, block_size)
    assert sorted(piece for block in blocks for piece in block) == list(range(len(lengths)))
    filled = sorted(int(lengths[block].sum()) for block in blocks)
    assert all(total <= block_size for total in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > block_size
    assert [block[0] for block in blocks] == sorted(block[0] for block in blocks)


def test_each_piece_goes_where_the_least_room_is_left():
    blocks = document_packing.best_fit(np.array([6, 7, 3, 4, 2]), 10)
    assert [block.tolist() for block in blocks] == [[0, 3], [1, 2], [4]]


@given(st.lists(st.integers(0, 70), max_size=40), st.integers(1, 30))
def test_pieces_are_the_documents_in_order(lengths, block_size):
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    starts, stops = document_packing.pieces(ends, block_size)
    covered = [token for start, stop in zip(starts, stops, strict=True) for token in range(start, stop)]
    assert covered == list(range(sum(lengths)))
    assert ((stops - starts) > 0).all() and ((stops - starts) <= block_size).all()
    assert len(starts) == sum(-(-length // block_size) for length in lengths)


def blocks(vocabulary: int, first: int = 5) -> document_packing.DocumentBlocks:
    ids = np.random.default_rng(0).integers(first, vocabulary, sum(LENGTHS)).astype(np.uint16)
    ids[np.cumsum(LENGTHS) - 1] = 4  # the special token with which a document ends
    return document_packing.DocumentBlocks(ids, np.cumsum(LENGTHS), LENGTH)


def test_no_token_is_lost_and_blocks_are_nearly_full():
    packed = blocks(1000)
    found = np.concatenate([packed[index]["input_ids"] for index in range(len(packed))])
    assert sorted(found) == sorted(packed.ids)
    assert len(packed) == -(-sum(LENGTHS) // LENGTH)
    sample = packed[1]
    assert len(sample["documents"]) == len(sample["input_ids"]) <= LENGTH


def test_positions_begin_anew_in_each_document_and_what_fills_up_belongs_to_none():
    samples = [{"documents": np.array([0, 0, 0, 1, 1])}, {"documents": np.array([0, 1, 2])}]
    batch = document_packing.collate(samples, 6)
    assert batch["documents"].tolist() == [[0, 0, 0, 1, 1, -1], [0, 1, 2, -1, -1, -1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 0, 1, 2]]
    ends = document_packing.collate(samples, 6, varlen=True)["cu_seq_lens"]
    assert ends.dtype == torch.int32 and len(ends) == document_packing.ENDS + 1
    assert ends[:8].tolist() == [0, 3, 5, 6, 7, 8, 9, 12] and set(ends[8:].tolist()) == {12}


# ---- the loss of each document is that of the document alone ----
def plain_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False, **_
):
    """What FlashAttention's varlen kernel computes, (tokens, heads, size), in plain torch."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q[-1] == len(q)
    edges = cu_seqlens_q.tolist()
    assert max(end - start for start, end in itertools.pairwise(edges)) <= max_seqlen_q == max_seqlen_k
    parts = [
        functional.scaled_dot_product_attention(
            *(tensor[start:end].transpose(0, 1) for tensor in (q, k, v)), is_causal=causal, scale=softmax_scale
        ).transpose(0, 1)
        for start, end in itertools.pairwise(edges)
        if end > start
    ]
    return torch.cat(parts)


def use(model: torch.nn.Module, attention: str, monkeypatch) -> torch.nn.Module:
    """The model with that attention; FlashAttention's kernel, which runs on CUDA alone, is `plain_varlen`."""
    if attention == "flash_attention_2":
        kernels = (None, plain_varlen, None, None, None)
        monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: kernels)
        monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)  # again after the test
        model = model.double()  # of float32, which the kernel does not take, transformers would make another type
    model.config._attn_implementation = attention
    return model


def openai_gpt() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 32, "vocab_size": tiny.VOCABULARY}
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0))


def apart(batch_of_one: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The places of each of its documents."""
    documents = batch_of_one["documents"][0]
    return [torch.nonzero(documents == number)[:, 0] for number in range(int(documents.max()) + 1)]


def compare(model: torch.nn.Module, alone: torch.Tensor, packed: torch.Tensor) -> None:
    """The two losses and their gradients are equal, to 1e-6 of the loss and 1e-5 of the gradients."""
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    pairs = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (alone, packed)]
    for one, other in zip(*pairs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "make, attention",
    [*itertools.product([tiny.gpt2, openai_gpt], ["sdpa", "eager"]), (tiny.gpt2, "flash_attention_2")],
)
def test_causal_documents_are_computed_as_if_alone(make, attention, monkeypatch):
    model = use(make(), attention, monkeypatch)
    model.config.use_cache = False
    varlen = document_packing.keep_documents_apart(model, causal=True)
    assert varlen == (attention == "flash_attention_2")
    packed = blocks(tiny.VOCABULARY)
    batch = causal.DocumentCollator(LENGTH, varlen=varlen)([packed[index] for index in range(len(packed))])
    labels = batch.pop("labels")
    together = causal.token_sums(model(**batch).logits, labels)
    model.config._attn_implementation = "sdpa" if varlen else attention
    sums = torch.zeros(3)
    for index in range(len(packed)):
        one = causal.DocumentCollator(LENGTH)([packed[index]])
        for places in apart(one):
            ids = one["input_ids"][:, places]
            sums = sums + causal.token_sums(model(input_ids=ids).logits, ids)[0]
    assert together[:, 1].sum() == sums[1] == sum(LENGTHS) - len(packed.starts)
    compare(model, sums[2], together[:, 2].sum())


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("family", families.MASKED)
def test_masked_documents_are_computed_as_if_alone(family, attention, monkeypatch):
    model = use(families.make(family), attention, monkeypatch)
    varlen = document_packing.keep_documents_apart(model, causal=False)
    masked.predict_only_masked(model)
    law = masked.MaskingLaw(0.4, 4, families.VOCABULARY, np.arange(families.VOCABULARY) < 5)
    packed = dynamic_masking.draw(blocks(families.VOCABULARY), law, seed=1)
    samples = [packed[index] for index in range(len(packed))]
    batch = masked.MaskedCollator(law, 1, pad_to=LENGTH, varlen=varlen)(samples)
    labels = batch.pop("labels")
    together = predicted_rows.token_sums(model(**batch).logits, labels)
    model.config._attn_implementation = "sdpa" if varlen else attention
    sums = torch.zeros(3)
    full = masked.MaskedCollator(law, 1, pad_to=LENGTH, full_head=True)
    for sample in samples:
        one = full([sample])
        for places in apart(one):
            logits = model(input_ids=one["input_ids"][:, places]).logits
            sums = sums + predicted_rows.token_sums(logits, one["labels"][:, places])[0]
    assert together[:, 1].sum() == sums[1] > 20
    compare(model, sums[2], together[:, 2].sum())


TINY = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family, causal", [("llama", True), ("bert", True), ("roberta-prelayernorm", False)])
def test_other_kinds_show_on_two_documents_whether_they_compute_them_apart(family, causal, attention):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**TINY, is_decoder=causal, attn_implementation=attention)
    config.use_cache = False
    kind = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    assert document_packing.keep_documents_apart(kind.from_config(config).train(), causal) is False
    with pytest.raises(UsageError, match=f"--packing documents: {family} does not compute"):
        document_packing.keep_documents_apart(kind.from_config(config), not causal)


def test_a_kind_of_unknown_positions_is_refused(monkeypatch):
    monkeypatch.setattr(document_packing, "POSITIONS_AFTER_PADDING", ())
    with pytest.raises(UsageError, match="roberta does not compute documents"):
        document_packing.keep_documents_apart(families.make("roberta"), causal=False)


def test_permuted_documents_are_computed_as_if_alone():
    law = tiny_xlnet.law(plm_probability=0.3)
    packed = dynamic_masking.draw(blocks(tiny_xlnet.VOCABULARY, first=tiny_xlnet.WORD), law, seed=1)
    samples = [packed[index] for index in range(len(packed))]
    batch = permutation.PermutationCollator(tiny_xlnet.PAD, LENGTH)(samples)
    assert batch["attention_mask"].sum() == sum(LENGTHS)
    labels = batch.pop("labels")
    model = tiny_xlnet.xlnet()
    relative_attention.predict_only_targets(model)
    together = predicted_rows.token_sums(model(**batch).logits, labels)
    alone = tiny_xlnet.xlnet()
    sums = torch.zeros(3)
    for sample in samples:
        targets = np.full(len(sample["input_ids"]), predicted_rows.IGNORED)
        predicted = sample["labels"] != predicted_rows.IGNORED
        targets[sample["positions"][predicted]] = sample["labels"][predicted]
        for number in range(sample["documents"].max() + 1):
            places = np.flatnonzero(sample["documents"] == number)
            one = {
                "input_ids": torch.from_numpy(sample["input_ids"][places])[None],
                "perm_mask": torch.from_numpy(sample["perm_mask"][np.ix_(places, places)])[None].float(),
                "target_mapping": torch.eye(len(places))[None],
            }
            sees_something = (one["perm_mask"][0].sum(1) < len(places)).numpy()
            assert sees_something.all()
            sums = sums + predicted_rows.token_sums(alone(**one).logits, torch.from_numpy(targets[places])[None])[0]
    assert together[:, 1].sum() == sums[1] > 20
    assert together[:, 2].sum().item() == pytest.approx(sums[2].item(), rel=1e-5)


# ---- in the scripts ----
COMMANDS = {
    "run_clm.py": [*TINY_GPT2, "--vocab_size", 300, "--block_size", 64],
    "run_mlm.py": [
        "--model_type", "bert", "--max_seq_length", 64, "--vocab_size", 500, "--config_overrides",
        "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,max_position_embeddings=64",
    ],
    "run_plm.py": [
        "--model_type", "xlnet", "--max_seq_length", 64, "--vocab_size", 500,
        "--config_overrides", "d_model=32,n_layer=2,n_head=2,d_inner=64",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def paragraphs(corpus, tmp_path_factory):
    """A text file whose documents are of three lines each, with a blank one between them."""
    lines = (corpus / "train.txt").read_text().splitlines()[:90]
    path = tmp_path_factory.mktemp("paragraphs") / "train.txt"
    path.write_text("\n\n".join("\n".join(lines[start : start + 3]) for start in range(0, 90, 3)))
    return path


@pytest.mark.parametrize("script", COMMANDS)
def test_the_scripts_train_and_evaluate_on_whole_documents(script, paragraphs, tmp_path):
    command = [
        *COMMANDS[script],
        "--train_file",
        paragraphs,
        "--validation_file",
        paragraphs,
        "--packing",
        "documents",
    ]
    command += ["--per_device_train_batch_size", 4, "--learning_rate", 3e-3, "--max_steps", 20, "--logging_steps", 5]
    half = ["--bf16", "--fp16_opt_level", "O2", "--use_combine_grad"]
    done = run_script(script, *command, *half, "--do_train", "--do_eval", "--output_dir", tmp_path)
    assert "30 documents" in done.stdout and "% full, no token dropped" in done.stdout
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    assert results(tmp_path)["eval_loss"] > 0


@pytest.mark.parametrize("flags", [["--attn_implementation", "flex_attention"]])
def test_what_cannot_be_packed_is_one_line(flags, paragraphs, tmp_path):
    command = [*COMMANDS["run_clm.py"], "--train_file", paragraphs, "--packing", "documents", "--do_train"]
    done = run_script("run_clm.py", *command, *flags, "--output_dir", tmp_path, expect=2)
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and flags[0] in lines[0]
