"""amp.scale_loss."""

import contextlib
import os

import torch

from apex.amp.call_log import note
from apex.amp.process_optimizer import clear_masters, post_backward, prepare_backward
from apex.amp.state import STATE


@contextlib.contextmanager
def scale_loss(loss, optimizers, loss_id=0, model=None, delay_unscale=False, delay_overflow_check=False):
    """Yields the scaled loss. On the way out it unscales, and after an overflow replaces the optimizer's next step."""
    assert not delay_unscale and not delay_overflow_check, "not in this stand-in"
    optimizer, scale = optimizers, STATE.scale
    note("scale_loss", scale=scale.value)
    prepare_backward(optimizer)
    yield loss.float() * scale.value
    STATE.backward_passes += 1
    if str(STATE.backward_passes) in os.environ.get("APEX_STAND_IN_OVERFLOW", "").split(","):
        parameter = next(p for group in optimizer._amp_stash.pairs for p in group if p.grad is not None)
        parameter.grad.view(-1)[0] = torch.inf
    overflow = post_backward(optimizer, scale.value)
    if scale.update(overflow) and not optimizer._amp_stash.skips:
        _skip_once(optimizer)


def _skip_once(optimizer: torch.optim.Optimizer) -> None:
    step = optimizer.step

    def skip(closure=None):
        note("skip")
        clear_masters(optimizer)
        optimizer.step = step
        optimizer._amp_stash.skips = False

    optimizer.step = skip
    optimizer._amp_stash.skips = True
