"""The samples of a report say what the model predicts: greedy as transformers' generate, hidden tokens as in evaluation."""

import types

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from utils import predictions
from utils.objectives import dynamic_masking, masked
from utils.packing import Blocks


def trainer_of(model, tokenizer, samples, collate) -> types.SimpleNamespace:
    """What predictions.samples asks of a trainer."""
    return types.SimpleNamespace(
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
        eval_dataset=samples,
        train_dataset=None,
        model=model,
        processing_class=tokenizer,
        data_collator=collate,
        args=types.SimpleNamespace(device=torch.device("cpu")),
        compute_loss_context_manager=torch.no_grad,
    )


@pytest.fixture
def gpt2(tokenizers):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tokenizers("gpt2"))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4
    )
    return GPT2LMHeadModel(config), tokenizer


@pytest.mark.parametrize("length", [64, 9, 2])
def test_the_continuation_is_that_of_generate(gpt2, length) -> None:
    model, tokenizer = gpt2
    ids = np.random.default_rng(0).integers(0, len(tokenizer), (3, length))
    model.train()
    found = predictions.samples(trainer_of(model, tokenizer, Blocks(ids), None))
    assert model.training, "as it was"
    model.eval()
    prompt = min(predictions.PROMPT, length // 2)
    for sample, block in zip(found, ids, strict=True):
        new = min(length - prompt, predictions.NEW)
        start = torch.tensor(block[:prompt])[None]
        expected = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0
        )  # fmt: skip
        assert sample["continuation"] == tokenizer.decode(expected[0, prompt:].tolist())
        assert sample["prompt"] == tokenizer.decode(block[:prompt].tolist())
        assert sample["text"] == tokenizer.decode(block[prompt : prompt + new].tolist())


@pytest.mark.parametrize("full_head", [False, True])
def test_hidden_tokens_are_guessed_as_in_evaluation(tokenizers, full_head) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizers("bert"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), initializer_range=0.4, **sizes)).eval()
    law = masked.masking_law(tokenizer, 0.15)
    ids = np.random.default_rng(0).integers(5, len(tokenizer), (3, 40))
    samples = dynamic_masking.draw(Blocks(ids), law, seed=1)
    shown = [samples[index] for index in range(3)]
    full = model(input_ids=torch.tensor(np.stack([sample["input_ids"] for sample in shown]))).logits.softmax(-1)
    if not full_head:
        assert masked.predict_only_masked(model)
    found = predictions.samples(
        trainer_of(model, tokenizer, samples, masked.MaskedCollator(law, 0, full_head=full_head))
    )
    assert 3 <= len(found) <= 3 * predictions.HIDDEN_PER_SAMPLE
    first = int(np.flatnonzero(shown[0]["labels"] != -100)[0])
    likeliest = full[0, first].topk(5)
    assert found[0]["hidden"] == tokenizer.decode([ids[0, first]])
    assert found[0]["after"] == tokenizer.decode(shown[0]["input_ids"][first + 1 : first + 17].tolist())
    assert [token for token, _ in found[0]["guesses"]] == [tokenizer.decode([i]) for i in likeliest.indices.tolist()]
    assert [p for _, p in found[0]["guesses"]] == pytest.approx(likeliest.values.tolist(), abs=1e-4)


def test_a_stream_is_read_from_its_start(gpt2) -> None:
    model, tokenizer = gpt2
    ids = np.random.default_rng(0).integers(0, len(tokenizer), (5, 16))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return ({"input_ids": block} for block in ids)

    found = predictions.samples(trainer_of(model, tokenizer, Stream(), None))
    assert [sample["prompt"] for sample in found] == [tokenizer.decode(block[:8].tolist()) for block in ids[:3]]


def test_a_slow_model_is_not_waited_for(gpt2, monkeypatch) -> None:
    model, tokenizer = gpt2
    ids = np.random.default_rng(0).integers(0, len(tokenizer), (3, 64))
    monkeypatch.setattr(predictions, "SECONDS", -1.0)
    assert predictions.samples(trainer_of(model, tokenizer, Blocks(ids), None)) == []
