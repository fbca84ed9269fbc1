"""--dry_run: what a run would do, told before it does it. Some steps are trained for real, to time them, and thrown away."""

import contextlib
import logging
import tempfile
import time

import torch
from transformers import TrainerCallback

from utils import device, result_labels
from utils.errors import UsageError, one_line
from utils.sharding import parameter_count

logger = logging.getLogger(__name__)

STEPS = 8  # timed at most, after one that warms up
SECONDS = 30  # after which no further step begins


def begin(args) -> None:
    """Sends all that the run would write into a temporary folder, which goes with the process. Every rank calls it.

    args: the run's LanguageModelingArguments.
    """
    folder = tempfile.TemporaryDirectory(prefix="dry_run_", ignore_cleanup_errors=True)
    args.dry_run_folder = folder  # removed when it is dropped
    name = folder.name
    if args.world_size > 1:
        from accelerate.utils import broadcast_object_list

        [name] = broadcast_object_list([name])
    args.output_dir = name
    args.push_to_hub, args.report_to = False, []
    args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
    args.load_best_model_at_end, args.eval_on_start = False, False
    args.disable_tqdm = True


def show(trainer, figures_of_text: dict, checkpoint: str | None = None) -> None:
    """Prints what the run would do, with a time from steps that are trained here. The model is not the same after it.

    figures_of_text: of the training text, from packing.figures. checkpoint: what the run would resume from.
    Raises UsageError where the device has not the memory for a step.
    """
    args = trainer.args
    lines = plan(trainer, figures_of_text, checkpoint)
    if args.do_train:
        lines += rehearsed(trainer)
    if args.process_index == 0:
        width = max(len(name) for name, _ in lines)
        print("\nThis is a dry run: nothing is kept.\n")
        print("\n".join(f"  {name:<{width}}  {told}" for name, told in lines), flush=True)


def plan(trainer, text: dict, checkpoint: str | None = None) -> list[tuple[str, str]]:
    """(what, in words) of what is known without training a step."""
    args, model = trainer.args, trainer.model
    count = parameter_count(model)
    precision = f"{args.precision.level}, {str(args.precision.dtype).removeprefix('torch.')}"
    lines = [
        ("device", f"{device.display_name(args.device, args.world_size)}, {device.describe(args.device)}"),
        ("precision", precision + (", combined gradients" if args.use_combine_grad else "")),
        ("model", f"{model.config.model_type}, {count:,} parameters, vocabulary of {model.config.vocab_size:,}"),
    ]
    if checkpoint is not None:
        lines.append(("resumes from", checkpoint))
    if "data_tokens" in text:
        dropped = text["data_dropped_tokens"]
        lines.append(("training text", f"{text['data_tokens']:,} tokens, of which {dropped:,} are in no sample"))
    for name, wanted, dataset in (
        ("training samples", args.do_train, trainer.train_dataset),
        ("evaluation samples", args.do_eval, trainer.eval_dataset),
    ):
        if wanted:
            lines.append((name, samples_in_words(dataset)))
    if args.do_train:
        batch = trainer.get_total_train_batch_size(args)
        parts = f"{args.per_device_train_batch_size} a device × {args.world_size} × {args.gradient_accumulation_steps}"
        lines.append(("batch", f"{batch} samples ({parts} accumulated)"))
        lines.append(("memory of the weights", memory_in_words(count, args.precision, args.use_combine_grad)))
        lines.append(("a checkpoint", f"about {result_labels.size(12 * count)} on disk with Adam's state"))
    return lines


def samples_in_words(dataset) -> str:
    try:
        count = len(dataset)
    except TypeError:
        return "a stream, not counted"
    return f"{count:,}, the first of {len(dataset[0]['input_ids']):,} tokens"


def memory_in_words(count: int, precision, combined: bool) -> str:
    """What weights, gradients and Adam's two moments take, each step's activations aside."""
    half = precision.casts_model
    weights = (2 if half else 4) * count
    masters = 4 * count if precision.has_master_weights else 0
    gradients = (2 if half and not (combined or masters) else 4) * count
    moments = (2 if half and not masters else 4) * 2 * count
    total = weights + masters + gradients + moments
    return f"about {result_labels.size(total)} with gradients and Adam's moments; activations come on top"


class Stopwatch(TrainerCallback):
    """Times steps, the first aside, and ends training when it has seen enough."""

    def __init__(self, on: torch.device, processes: int):
        self.device = on
        self.processes = processes
        self.ends: list[float] = []
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        device.synchronize(self.device)
        self.ends.append(time.perf_counter())
        enough = len(self.ends) > STEPS or (len(self.ends) > 1 and self.ends[-1] - self.begin > SECONDS)
        if self._all_agree(enough):
            control.should_training_stop = True

    def _all_agree(self, enough: bool) -> bool:
        """Of several processes one that stopped alone would leave the others waiting: rank 0's watch counts."""
        if self.processes == 1:
            return enough
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([enough])[0]

    def seconds(self) -> float:
        """The median step; of a run of one step that one, its warming up included."""
        if len(self.ends) < 2:
            return self.ends[0] - self.begin if self.ends else float("nan")
        return float(torch.tensor(self.ends).double().diff().median())


def rehearsed(trainer) -> list[tuple[str, str]]:
    """(what, in words) of what training some steps told: time and memory. Raises UsageError where memory runs out."""
    args = trainer.args
    watch = Stopwatch(args.device, args.world_size)
    trainer.add_callback(watch)
    device.reset_peak_memory(args.device)
    with contextlib.redirect_stdout(None):  # Trainer prints what it would log
        try:
            trainer.train()
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            raise UsageError(
                f"--per_device_train_batch_size {args.per_device_train_batch_size}: {args.device} has not the memory for a "
                f"step ({one_line(error)[:120]}); give less, and more --gradient_accumulation_steps",
                of_one_rank=True,
            ) from error
    a_step, memory = watch.seconds(), device.memory(args.device)
    timed, steps = max(1, len(watch.ends) - 1), trainer.state.max_steps
    epochs = "" if args.max_steps > 0 else f", {args.num_train_epochs:g} epochs"
    return [
        ("steps", f"{steps:,}{epochs}"),
        (
            "peak memory",
            f"{result_labels.size(memory['peak'])} of {result_labels.size(memory['total'])}, in {timed + 1} steps",
        ),
        ("a step", f"{result_labels.duration(a_step)}, the median of {timed} that were timed"),
        (
            "training time",
            f"about {result_labels.duration(a_step * steps)}, an estimate; evaluation and saving come on top",
        ),
    ]
