"""Loss and evaluation where each row of logits has a label of its own: nothing is shifted."""

import torch
from torch.nn import functional

IGNORED = -100


def loss_sum(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy in nats, summed over all labels that are not -100; a float32 scalar.

    logits: (batch, rows, vocabulary), of any type, read as float32. labels: int64 of shape (batch, rows).
    """
    return functional.cross_entropy(
        logits.float().flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def token_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Correct predictions, targets and negative log-likelihood (nats) of each sample: float32 of shape (batch, 3).

    Shapes as in loss_sum. Positions labelled -100 are no targets and count nowhere.
    """
    is_target = labels != IGNORED
    correct = (logits.argmax(dim=-1) == labels) & is_target
    losses = functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return torch.stack([correct.sum(1).float(), is_target.sum(1).float(), losses.sum(1)], dim=1)
