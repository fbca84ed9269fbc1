"""The model card: transformers' own, filled in with what the run knows and Trainer does not."""

from pathlib import Path

from huggingface_hub import ModelCard

from utils import result_labels

UNKNOWN = "More information needed"
# What to try the model with, by the hub's name of the task.
USES = {
    "text-generation": 'pipe("Once upon a time", max_new_tokens=40)',
    "fill-mask": 'pipe(f"Once upon a {pipe.tokenizer.mask_token}.")',
}


def complete(folder: str, results: dict, facts: dict) -> None:
    """Writes the run's figures into <folder>/README.md, where Trainer's card has gaps.

    results: of all_results.json. facts: {"task": the hub's name, "kind": the model's, "parameters": how many, "text": where
    the training text came from, "precision": in words, "devices": as results rows name them, "from_scratch": bool}.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    text = card.text
    if facts["from_scratch"]:
        text = text.replace("is a fine-tuned version of [](https://huggingface.co/) on", "was trained from scratch on")
    text = text.replace(
        "on an unknown dataset", f"on {facts['text']}" if facts["text"] else "on text that is not named"
    )
    if "perplexity" in results and "- Perplexity:" not in text:
        accuracy = next((line for line in text.splitlines() if line.startswith(("- Accuracy:", "- Loss:"))), None)
        if accuracy is not None:
            text = text.replace(accuracy, f"{accuracy}\n- Perplexity: {results['perplexity']:.4f}", 1)
    for heading, told in sections(results, facts).items():
        text = text.replace(f"{heading}\n\n{UNKNOWN}", f"{heading}\n\n{told}")
    card.text = text
    if "perplexity" in results and card.data.metrics and "perplexity" not in card.data.metrics:
        card.data.metrics = [*card.data.metrics, "perplexity"]
    card.save(path)


def sections(results: dict, facts: dict) -> dict[str, str]:
    """{heading of Trainer's card: what to say beneath it}."""
    counted = [
        f"{results[key]:,} {name}"
        for key, name in (
            ("data_tokens", "tokens"),
            ("train_samples", "samples"),
            ("eval_samples", "samples to evaluate on"),
        )
        if key in results
    ]
    measured = [f"- {label}: {value}" for label, value in result_labels.written(results, SPEED)]
    data = f"Trained on {facts['text'] or 'text that is not named'}"
    return {
        "## Model description": (
            f"{facts['kind']}, {facts['parameters']:,} parameters. Trained on {facts['devices']} at {facts['precision']}."
        ),
        "## Intended uses & limitations": (
            "```python\nfrom transformers import pipeline\n\n"
            f'pipe = pipeline("{facts["task"]}", "path_or_name_of_this_model")\nprint({USES[facts["task"]]})\n```\n\n'
            "It repeats what its text says, right or wrong, kind or unkind."
        ),
        "## Training and evaluation data": "; ".join([data, *counted])
        + ".\n\nThe loss is the mean over all predicted tokens, in nats; perplexity is its exponential."
        + ("\n\n" + "\n".join(measured) if measured else ""),
    }


SPEED = ("fps", "tokens_per_second", "mfu", "train_runtime", "train_peak_memory_bytes")
