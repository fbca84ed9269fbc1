"""The last linear layer of a language model gives the loss, or the sums of the evaluation, in place of logits.

Where a batch names `targets`, the layer computes both in one, in chunks: see chunked_loss. This happens within the model's
forward pass, so that DistributedDataParallel and torch.compile see all of it. Without targets the model gives its logits
as ever, and what is saved is the plain model.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from utils import chunked_loss, tiled_loss


def give_sums(
    model: nn.Module,
    shift: bool = False,
    label_smoothing: float = 0.0,
    fits: Callable[[], bool] | None = None,
) -> bool:
    """Lets `model(**batch, targets=labels)` have as its `logits`

    in training: the summed cross-entropy, chunked_loss.loss_sum, a scalar;
    in evaluation: correct predictions, targets and negative log-likelihood of each sample, chunked_loss.token_sums.

    shift: position i predicts label i + 1. fits: asked once this is done; it is undone if the answer is no. Returns whether
    the model gives sums; a model whose last layer is no plain linear one is left alone.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    whole_logits = head.forward
    head.targets = head.prepacked = None
    head.parts_to_pack = lambda: tiled_loss.parts_to_pack(head.weight)

    def take_targets(_: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        head.targets = named.pop("targets", None)
        return arguments, named

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        labels, head.targets = head.targets, None
        if labels is None:
            return whole_logits(hidden)
        if shift:
            labels = functional.pad(labels[:, 1:], (0, 1), value=chunked_loss.IGNORED)
        if head.training:
            return chunked_loss.loss_sum(hidden, head.weight, head.bias, labels, label_smoothing)
        return chunked_loss.token_sums(hidden, head.weight, head.bias, labels, prepacked=head.prepacked)

    head.forward = forward
    hook = model.register_forward_pre_hook(take_targets, with_kwargs=True)

    if fits is None or fits():
        return True
    hook.remove()
    del head.forward, head.targets, head.prepacked, head.parts_to_pack
    return False
