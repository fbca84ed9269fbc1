"""Type a prompt, see what a trained model says: scripts/try_it.sh. Plain transformers, on the CPU."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.errors import UsageError, leave, one_line

MASK = re.compile(r"\[MASK\]|<mask>", re.IGNORECASE)  # as anybody may type it
NEW = 40


def load(folder: str) -> Callable[[str], list[str]]:
    """What answers a prompt with lines: a continuation, or the likeliest words for a mask. Raises UsageError."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder}: holds no trained model, it has no config.json; name a run's output folder")
    kinds = json.loads(path.read_text(encoding="utf-8")).get("architectures") or [""]
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        if "MaskedLM" in kinds[0]:
            return _masked(transformers.pipeline("fill-mask", folder, device="cpu"))
        pipe = transformers.pipeline("text-generation", folder, device="cpu")
    except Exception as error:
        raise UsageError(f"{folder}: cannot be loaded: {one_line(error)[:300]}") from error
    return _permuted(pipe) if kinds[0].startswith("XLNet") else _causal(pipe)


def _causal(pipe) -> Callable[[str], list[str]]:
    return lambda prompt: [pipe(prompt, max_new_tokens=NEW, do_sample=False)[0]["generated_text"]]


def _masked(pipe) -> Callable[[str], list[str]]:
    mask = pipe.tokenizer.mask_token

    def answer(prompt: str) -> list[str]:
        if not MASK.search(prompt):
            return [f"write {mask} where a word is to be found"]
        first, *others = MASK.split(prompt)
        guesses = pipe(first + mask + "".join(others), top_k=5)  # one mask: the first
        return [f"{guess['score']:6.1%}  {guess['token_str'].strip()}" for guess in guesses]

    return answer


def _permuted(pipe) -> Callable[[str], list[str]]:
    """XLNet predicts a token that no other sees, from all that are there; without a mask, the next one again and again."""
    import torch

    tokenizer, model = pipe.tokenizer, pipe.model

    def answer(prompt: str) -> list[str]:
        if not MASK.search(prompt):
            return _causal(pipe)(prompt)
        first, *others = MASK.split(prompt)
        ids = tokenizer(first + tokenizer.mask_token + "".join(others), return_tensors="pt")["input_ids"]
        place = (ids[0] == tokenizer.mask_token_id).nonzero()[0, 0]
        hidden = torch.zeros(1, ids.shape[1], ids.shape[1])
        hidden[:, :, place] = 1
        target = torch.zeros(1, 1, ids.shape[1])
        target[0, 0, place] = 1
        with torch.no_grad():
            likeliest = model(ids, perm_mask=hidden, target_mapping=target)["logits"][0, 0].softmax(-1).topk(5)
        return [
            f"{share:6.1%}  {tokenizer.decode([token]).strip()}"
            for share, token in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
        ]

    return answer


def prompts() -> Iterator[str]:
    """What is typed, line by line, up to an empty one; of a pipe all lines that are not empty."""
    typed = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if typed else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line
        elif typed:
            return


def main() -> None:
    parser = argparse.ArgumentParser(prog="try_it.sh", description=__doc__.split(":")[0] + ".")
    parser.add_argument("folder", metavar="DIR", help="a run's output folder")
    answer = load(parser.parse_args().folder)
    for prompt in prompts():
        try:
            print("\n".join(answer(prompt)), flush=True)
        except Exception as error:  # of one prompt, as of one that is too long
            print(f"no answer: {one_line(error)[:200]}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.argv[0] = "try_it.sh"
        leave(error)
