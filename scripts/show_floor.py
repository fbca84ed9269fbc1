"""Shows a model's loss on the sample corpus beside what the grammar itself would reach: used by demo.sh.

python scripts/show_floor.py CORPUS_FOLDER MODEL_FOLDER
"""

import json
import math
import sys
from pathlib import Path

from transformers import AutoTokenizer


def main() -> None:
    corpus, model = Path(sys.argv[1]), Path(sys.argv[2])
    text = (corpus / "validation.txt").read_text(encoding="utf-8")
    nats = json.loads((corpus / "entropy.json").read_text())["validation.txt"]
    loss = json.loads((model / "all_results.json").read_text())["eval_loss"]
    history = json.loads((model / "trainer_state.json").read_text())["log_history"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = sum(len(ids) for ids in tokenizer(text.splitlines(keepends=True), verbose=False)["input_ids"])
    print()
    print("loss in nats a token, on text that the model has not seen:")
    print(f"  {math.log(len(tokenizer)):.3f}  all {len(tokenizer)} tokens equally likely")
    by_epoch = {entry["epoch"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    for epoch, eval_loss in by_epoch.items():
        print(f"  {eval_loss:.3f}  after {epoch:g} epochs")
    print(f"  {nats['negative_log_likelihood_nats'] / tokens:.3f}  the grammar that wrote this very text: the floor")
    print(f"  {nats['entropy_nats'] / tokens:.3f}  its entropy: the floor on average over all texts")
    print(f"the model is {loss - nats['negative_log_likelihood_nats'] / tokens:.3f} above the floor\n")
    print((model / "results.md").read_text(), end="")


if __name__ == "__main__":
    main()
