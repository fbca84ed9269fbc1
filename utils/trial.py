"""A model computes a few tokens where it was made, to show what it does with them."""

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedModel


@contextlib.contextmanager
def on_trial(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model is evaluated, by eager attention where its own may run on a device alone: FlashAttention takes
    neither float32 nor a CPU."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attention not in ("sdpa", "eager"):
        model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = attention
        model.train(training)
