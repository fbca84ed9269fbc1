"""Samples of what a model predicts, for people to read: a continuation, or the likeliest tokens for what is hidden."""

import itertools
import math
import time

import torch
from transformers import PreTrainedTokenizerBase

from utils.objectives.predicted_rows import IGNORED

SAMPLES = 3
PROMPT = 24  # tokens that a continuation begins from, at most
NEW = 32  # tokens of a continuation
HIDDEN_PER_SAMPLE = 2
SECONDS = 10.0  # after which no further token is asked for: what is slow to train is slow here too
BESIDE = 16  # tokens shown on each side of a hidden one


def samples(trainer) -> list[dict]:
    """What the trained model says to the first validation samples, or training samples where there are none.

    For a causal model items of {"prompt", "continuation", "text"}: the greedy continuation of the first tokens, and what
    the text goes on with. Else of {"before", "hidden", "after", "guesses"}: the text around a hidden token, the token, and
    the five likeliest [token, probability] for it. Nothing where the weights are spread over processes.

    trainer: a LanguageModelingTrainer after its run; called by one process.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return []
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    chosen = list(itertools.islice(iter(dataset), SAMPLES))
    model, tokenizer = trainer.model, trainer.processing_class
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            if "labels" in chosen[0]:
                return hidden_tokens(model, tokenizer, trainer.data_collator, chosen, trainer.args.device)
            until = time.perf_counter() + SECONDS
            told = [
                continuation(model, tokenizer, sample["input_ids"], trainer.args.device, until) for sample in chosen
            ]
            return [sample for sample in told if sample["continuation"]]
    finally:
        model.train(was_training)


def continuation(model, tokenizer: PreTrainedTokenizerBase, ids, on: torch.device, until: float = math.inf) -> dict:
    """Greedy: the likeliest token, again and again, as often as the block has tokens, NEW times at most.

    ids: a block of token ids, int (length,). until: of time.perf_counter(), after which no further token is asked for.
    Tokens that are still to come are filled with the last one known, which no position before them sees, so that all
    passes have one shape.
    """
    prompt = min(PROMPT, max(1, len(ids) // 2))
    stop = min(len(ids), prompt + NEW)
    text = torch.as_tensor(ids, dtype=torch.int64)[:stop]
    shown = text.to(on)[None].clone()
    shown[:, prompt:] = shown[:, prompt - 1 : prompt]
    for place in range(prompt, stop):
        if time.perf_counter() > until:
            stop = place
            break
        logits = model(input_ids=shown)["logits"]
        shown[:, place] = logits[:, place - 1].argmax(dim=-1)
    return {
        "prompt": tokenizer.decode(text[:prompt].tolist()),
        "continuation": tokenizer.decode(shown[0, prompt:stop].tolist()),
        "text": tokenizer.decode(text[prompt:stop].tolist()),
    }


def hidden_tokens(
    model, tokenizer: PreTrainedTokenizerBase, collate, chosen: list[dict], on: torch.device
) -> list[dict]:
    """The five likeliest tokens for some that are hidden, as in evaluation: all that is hidden in a sample stays so.

    chosen: samples of the masked or the permuted objective; collate: their collator.
    """
    batch = collate(chosen)
    labels = batch.pop("labels")
    positions = batch.get("predicted_positions", torch.arange(labels.shape[1]).expand_as(labels))
    logits = model(**{name: tensor.to(on) for name, tensor in batch.items()})["logits"]
    found = []
    for row, sample in enumerate(chosen):
        targets = (labels[row] != IGNORED).nonzero().flatten().tolist()
        seen = [int(token) for token in sample["input_ids"]]
        # Spread over the sample, since neighbours are hidden together.
        for target in targets[:: max(1, len(targets) // HIDDEN_PER_SAMPLE)][:HIDDEN_PER_SAMPLE]:
            place = int(positions[row, target])
            likeliest = logits[row, target].float().softmax(dim=-1).topk(5)
            found.append(
                {
                    "before": tokenizer.decode(seen[max(0, place - BESIDE) : place]),
                    "hidden": word(tokenizer, int(labels[row, target])),
                    "after": tokenizer.decode(seen[place + 1 : place + 1 + BESIDE]),
                    "guesses": [
                        [word(tokenizer, token), round(probability, 4)]
                        for probability, token in zip(
                            likeliest.values.tolist(), likeliest.indices.tolist(), strict=True
                        )
                    ],
                }
            )
    return found


def word(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as text; of one that is a space only, or less than a character, its own name."""
    text = tokenizer.decode([token])
    return text if text.strip() and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))
