"""The progress bar: transformers' own, with loss, tokens per second and MFU, and the time that is left. Calm elsewhere."""

import sys

from tqdm.auto import tqdm
from transformers import ProgressCallback


class ProgressBar(ProgressCallback):
    """In a terminal a bar; in a file or a pipe, which cannot draw over a line, the log entries alone."""

    def on_train_begin(self, args, state, control, **_):
        self.current_step = state.global_step  # a resumed run's time left is told by the steps of this one
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, disable=None
            )

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **_):
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, eval_dataloader)

    def on_log(self, args, state, control, logs=None, **_):
        super().on_log(args, state, control, logs)
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(summary(logs))


def summary(logs: dict) -> str:
    """What the bar shows of a log entry: "loss 3.215, 12.3k tokens/s, MFU 41 %"."""
    rate = logs["tokens_per_second"]
    shown = f"{rate / 1e6:.2f}M" if rate >= 1e6 else f"{rate / 1e3:.1f}k" if rate >= 1e3 else f"{rate:.0f}"
    share = f", MFU {logs['mfu']:.0%}".replace("%", " %") if "mfu" in logs else ""
    return f"loss {logs['loss']:.4g}, {shown} tokens/s{share}"
