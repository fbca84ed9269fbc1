"""The figures that the original scripts published, to stand beside results. Only the standard library is imported."""

HEADINGS = ("Device", "Acc", "FPS", "AMP_Type", "Epochs")
# {model: {cards: rows}} of the original scripts on wikitext-2-raw: device, accuracy, samples per second, level, epochs.
PUBLISHED = {
    "gpt2": {
        1: [("1p-NPU(910ProB)", "42.62%", "11.392", "O2", "3"), ("1p-V", "42.62%", "16.842", "O2", "3")],
        8: [("8p-NPU(910ProB)", "42.25%", "69.126", "O2", "3"), ("8p-V", "42.06%", "-", "O2", "3")],
    },
    "roberta-base": {
        1: [("1p-NPU(910ProB)", "0.6917", "213.038", "O2", "3"), ("1p-V", "0.685", "227.211", "O2", "3")],
        8: [("8p-NPU(910ProB)", "0.6984", "866.635", "O2", "3"), ("8p-V", "0.6978", "989.902", "O2", "3")],
    },
}


def rows_of(model: str | None, cards: int | None = None) -> list[tuple[str, ...]]:
    """The published rows of a model, of all numbers of cards or of one; none for a model without.

    model: a name on the hub, short or with its owner.
    """
    by_cards = PUBLISHED.get((model or "").rstrip("/").rsplit("/", 1)[-1], {})
    return [row for number in sorted(by_cards) if cards in (None, number) for row in by_cards[number]]
