"""Profiles one training step of a script.

python -m utils.profile_step FOLDER STEP run_clm.py [flags]

FOLDER gets operators.txt, what the step spent its time on, and trace.json for chrome://tracing; on an NPU what
torch_npu's own profiler writes, whose summary is op_statistic.csv. STEP counts from 1: the first ones compile.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from utils import device  # isort: skip  (before transformers: it tells in one line why torch_npu cannot be imported)
import torch
from transformers import TrainerCallback, trainer


class OneStep(TrainerCallback):
    """Has the profiler watch one step of the main process."""

    def __init__(self, folder: Path, step: int):
        self.folder = folder
        self.step = step
        self.profiler: Any = None  # torch's, or torch_npu's

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step - 1 and state.is_world_process_zero:
            device.synchronize(args.device)
            self.profiler = device.profiler(args.device, self.folder)
            self.profiler.start()

    def on_step_end(self, args, state, control, **_):
        if self.profiler is None:
            return
        device.synchronize(args.device)
        self.profiler.stop()
        if isinstance(self.profiler, torch.profiler.profile):
            table = self.profiler.key_averages().table(
                sort_by="self_cpu_time_total" if args.device.type == "cpu" else "self_device_time_total", row_limit=40
            )
            (self.folder / "operators.txt").write_text(table, encoding="utf-8")
            self.profiler.export_chrome_trace(str(self.folder / "trace.json"))
        self.profiler = None


def main() -> None:
    folder, step, script = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    folder.mkdir(parents=True, exist_ok=True)
    trainer.DEFAULT_CALLBACKS.append(OneStep(folder, step))
    sys.argv = sys.argv[3:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
