"""torch.compile: whether it pays, and what it needs.

--torch_compile true and false are obeyed. Without the flag a run compiles on CUDA alone, and only if the time that is
likely to be saved is MARGIN times what compiling is likely to cost; the log says which, in one line. On a CPU never: a
C++ compiler builds each kernel, minutes for a model of real size, for 10 to 30 % of a step. On an NPU never: inductor
needs triton-ascend there, and torchair (--torch_compile_backend npu) is made for inference.

The estimates, none of which is measured in the run:
- SAVED: torch 2.0's announcement has 21 % more speed in float32 and 51 % in mixed precision over 163 models on an A100
  (https://pytorch.org/get-started/pytorch-2.0/), which is 17 and 34 % of the time; half of that, since steps here have fused
  attention, activations, heads and optimizers already.
- FIXED_SECONDS, LAYER_SECONDS: torch's own benchmark on an A100 compiles XLNet's 24 layers in 111 s, BART's 24 in 78 s
  (pytorch/pytorch#96191); nanoGPT tells of "about a minute" for 12.
- EAGER_MFU, LAUNCH_SECONDS: a step takes what the model's FLOPs take at a usual MFU, and no less than the host needs to
  launch its operators one by one.
"""

import contextlib
import dataclasses
import enum
import logging
from collections.abc import Iterator

import numpy as np
from transformers import TrainingArguments

from utils import device, device_compilers
from utils.errors import UsageError
from utils.main_process import told_by_main

logger = logging.getLogger(__name__)

SAVED_IN_FLOAT32, SAVED_IN_HALF = 0.08, 0.17  # of a step
FIXED_SECONDS, LAYER_SECONDS = 15.0, 4.0
EAGER_MFU = 0.35
LAUNCH_SECONDS = 0.8e-3  # of a layer, forward and backward
MARGIN = 2.0
CHOSEN = "inductor"


@dataclasses.dataclass(frozen=True)
class Run:
    """What the decision is made of.

    layers: of the model. steps: of the whole run, so that one that is resumed decides as before. step_seconds: of a step
    without compiling. graphs: how many shapes of batches are compiled for.
    """

    layers: int
    steps: int
    step_seconds: float
    in_half: bool
    graphs: int = 1

    @property
    def cost(self) -> float:
        """Seconds that compiling takes."""
        return self.graphs * (FIXED_SECONDS + LAYER_SECONDS * self.layers)

    @property
    def gain(self) -> float:
        """Seconds that compiled steps save."""
        return self.steps * self.step_seconds * (SAVED_IN_HALF if self.in_half else SAVED_IN_FLOAT32)


def decide(run: Run) -> tuple[bool, str]:
    """Whether compiling pays, and why or why not, in one line."""
    steps = f"{run.steps} steps of about {_duration(run.step_seconds)}"
    if run.gain < MARGIN * run.cost:
        return False, (
            f"torch.compile is off: it takes about {_duration(run.cost)}, and would save about {_duration(run.gain)} of "
            f"{steps}; --torch_compile turns it on"
        )
    return True, (
        f"torch.compile is on: it takes about {_duration(run.cost)} in the first steps, and saves about "
        f"{_duration(run.gain)} of {steps}; --torch_compile false turns it off"
    )


def step_seconds(step_flops: float, peak_flops: float, layers: int, micro_batches: int) -> float:
    """About how long a step of one device takes that is not compiled. step_flops: of all its micro-batches."""
    return max(step_flops / peak_flops / EAGER_MFU, micro_batches * layers * LAUNCH_SECONDS)


def _duration(seconds: float) -> str:
    if seconds < 0.95:
        return f"{seconds * 1000:.{0 if seconds >= 0.01 else 1}f} ms"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.0f} h"


# ---- what was asked for ----
def settle(args: TrainingArguments) -> None:
    """Lets --torch_compile false win over a backend or a mode that is named beside it, as in a config file.

    Before TrainingArguments.__post_init__, which turns compiling on for either.
    """
    if args.torch_compile is False:
        args.torch_compile_backend = args.torch_compile_mode = None


def check(args: TrainingArguments) -> None:
    """Raises UsageError if what is asked for cannot compile here. After TrainingArguments.__post_init__."""
    if not args.torch_compile:
        return
    backend = args.torch_compile_backend
    from torch._dynamo import list_backends  # takes a second

    known = list_backends(exclude_tags=())
    if backend not in known:
        raise UsageError(f"--torch_compile_backend {backend}: choose one of {', '.join(sorted(known))}")
    missing = device_compilers.missing(args.device, backend)
    if missing is not None:
        raise UsageError(f"--torch_compile: {missing}; or leave it out")


@contextlib.contextmanager
def any_backend(args: TrainingArguments) -> Iterator[None]:
    """Within it accelerate takes a backend that its own list lacks, such as npu: it is told of it by `let_through`."""
    from accelerate.utils import DynamoBackend

    backend = args.torch_compile_backend
    if backend is None or backend.upper() in DynamoBackend.list():
        yield
        return
    args.torch_compile_backend = "eager"
    try:
        yield
    finally:
        args.torch_compile_backend = backend


def let_through(plugin, backend: str | None) -> None:
    """Puts the name of a backend into accelerate's TorchDynamoPlugin, whether its list has it or not."""
    if backend is not None and plugin.backend.value.lower() != backend:
        plugin.backend = enum.Enum("Backend", {"NAMED": backend}).NAMED  # type: ignore[attr-defined]


# ---- what is chosen ----
def choose(trainer, steps: int) -> None:
    """Turns compiling on where nobody has said whether to, and it pays; says so.

    trainer: a LanguageModelingTrainer whose model is not wrapped yet. steps: of the whole run. For every rank to call.
    """
    args = trainer.args
    plugin = trainer.accelerator.state.dynamo_plugin
    if (
        args.torch_compile is not None
        or plugin.backend.value.lower() != "no"
        or not device_compilers.may_pay(args.device)
    ):
        return
    # Speeds that are measured differ between ranks.
    compiles, sentence = told_by_main(lambda: conclude(trainer, steps))
    if args.process_index == 0:
        logger.info(sentence)
    if compiles:
        let_through(plugin, CHOSEN)


def conclude(trainer, steps: int) -> tuple[bool, str]:
    """As `decide`, for a trainer's run."""
    reason, run = why_not(trainer), None
    if reason is None:
        run = describe(trainer, steps)
        reason = (
            "the model's FLOPs cannot be counted"
            if run is None
            else device_compilers.missing(trainer.args.device, CHOSEN)
        )
    if run is None or reason is not None:
        return False, f"torch.compile is off: {reason}; --torch_compile turns it on"
    return decide(run)


def why_not(trainer) -> str | None:
    """What in the flags or the data keeps a run from compiling by itself, however long it is; None if nothing does."""
    args = trainer.args
    if args.layers_are_patched:
        return "apex, FSDP and DeepSpeed are left as they are"
    if args.auto_find_batch_size:
        return "--auto_find_batch_size may change the batch"
    if args.gradient_checkpointing:
        return "--gradient_checkpointing is left as it is"
    if not lengths_are_equal(trainer.train_dataset, trainer.data_collator):
        return "batches differ in length"
    return None


def lengths_are_equal(samples, collate) -> bool:
    """Whether all batches but the last of an epoch have one shape, as far as samples or their collator tell."""
    if getattr(collate, "length", None) or getattr(collate, "pad_to", None):
        return True
    lengths = getattr(samples, "lengths", None)
    if lengths is not None:
        return bool(np.ptp(lengths) == 0)
    return getattr(samples, "description", {}).get("packing") == "blocks"  # a stream's


def describe(trainer, steps: int) -> Run | None:
    """A trainer's run; None if its model's FLOPs cannot be counted."""
    from utils import flops

    args, config = trainer.args, trainer.model.config
    counted = flops.count_model_flops(trainer.model)
    if counted is None:
        return None
    layers = getattr(config, "num_hidden_layers", None) or 12
    length = _length(trainer.train_dataset)
    micro_batches = args.gradient_accumulation_steps
    step_flops = micro_batches * counted(args.per_device_train_batch_size, length)
    peak, _ = device.peak_flops(args.device, args.precision.dtype)
    # The rows of a sparse head come in a second number in the first steps, for which torch compiles once more.
    graphs = 1 if trainer.loss_sum is None else 2
    in_half = args.precision.level != "O0"
    return Run(layers, steps, step_seconds(step_flops, peak, layers, micro_batches), in_half, graphs)


def _length(samples) -> int:
    lengths = getattr(samples, "lengths", None)
    return int(lengths.max()) if lengths is not None else int(samples.description["block_size"])
