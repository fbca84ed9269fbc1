"""Flags about training: transformers' own, precision, combined gradients, checkpoints, and every check of them."""

import os
from dataclasses import dataclass, field

from utils import device  # isort: skip  (before transformers: it tells in one line why torch_npu cannot be imported)
from transformers import TrainingArguments

from utils import apex_backend, compilation, data_loading, sharding
from utils.agreement import meet_after_restart
from utils.amp import LEVELS, Precision, choose_precision
from utils.durations import seconds_of
from utils.errors import UsageError

BACKENDS = ("auto", "native", "apex")
# Optimizers of transformers whose update of one element looks at no other: these can run on flat buffers.
ELEMENTWISE_OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adamw_anyprecision",
    "sgd",
    "adagrad",
    "rmsprop",
    "lion_32bit",
    "paged_adamw_32bit",
    "paged_lion_32bit",
    "ademamix",
    "paged_ademamix_32bit",
    "rmsprop_bnb",
    "rmsprop_bnb_32bit",
)
# Those that build their parameter groups by themselves or update inside backward: no master weights can stand between.
OPTIMIZERS_WITHOUT_MASTERS = ("galore", "apollo", "lomo", "adalomo", "schedule_free")


@dataclass
class LanguageModelingArguments(TrainingArguments):
    """transformers' TrainingArguments, with apex's precision levels and combined gradients."""

    fp16_opt_level: str | None = field(
        default=None,
        metadata={
            "help": "Mixed precision with --fp16 or --bf16. O0: float32. O1: autocast (the default). O2: half weights, "
            "float32 norms and masters. O3: all half.",
            "choices": list(LEVELS),
        },
    )
    loss_scale: str | None = field(
        default=None,
        metadata={"help": "'dynamic' or a number. Default: dynamic with --fp16, none with --bf16."},
    )
    use_combine_grad: bool = field(
        default=False,
        metadata={"help": "Keep all gradients in one flat buffer: the optimizer then takes a few operators a step."},
    )
    ddp_comm_hook: str | None = field(
        default=None,
        metadata={
            "help": "Several processes: send gradients to each other in half precision, with half of float32's bytes. bf16 "
            "has float32's range.",
            "choices": ["fp16", "bf16"],
        },
    )
    half_precision_backend: str = field(
        default="auto",
        metadata={
            "help": "What computes O1 and O2 with --fp16. native (auto): PyTorch, on every device. apex: Ascend's apex "
            "where it is installed, else native.",
            "choices": list(BACKENDS),
        },
    )
    device_id: int | None = field(
        default=None, metadata={"help": "The one device that a single process uses, numbered from 0."}
    )
    npu_jit_compile: bool = field(
        default=False, metadata={"help": "NPU: compile operators for each new shape, instead of taking CANN's own."}
    )
    npu_internal_format: bool = field(
        default=False, metadata={"help": "NPU: let tensors take padded layouts of the device's own."}
    )
    save_on_signal: bool = field(
        default=False, metadata={"help": "SIGUSR1 to any rank writes a checkpoint at the next step; training goes on."}
    )
    max_train_time: str | None = field(
        default=None,
        metadata={
            "help": "Stop with a checkpoint before so much time has passed since the start, e.g. 3600, 55m or 11h30m."
        },
    )
    max_bad_steps: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many steps in a row whose gradients are not finite; none of them updates anything. 0: "
            "update with whatever comes. Default: 20, where the check costs no wait."
        },
    )
    on_loss_spike: str | None = field(
        default=None,
        metadata={
            "help": "When the logged loss leaps: warn, or rollback to the checkpoint before and skip those batches.",
            "choices": ["warn", "rollback"],
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew in a used output folder; removes only what a run of ours wrote."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "The folder of a checkpoint to go on from. auto: the newest whole one in the output folder, which a run "
            "that is started again finds by itself as well."
        },
    )
    elastic: bool = field(
        default=False,
        metadata={
            "help": "Go on with another number of processes too: accumulation adapts, so that each step has the samples that "
            "it would have had."
        },
    )
    async_save: bool = field(
        default=False,
        metadata={
            "help": "Write checkpoints in the background, from a copy in host memory of weights, masters and moments."
        },
    )

    torch_compile: bool | None = field(
        default=None,
        metadata={
            "help": "Compile the model with torch.compile. Default: on CUDA, if it pays within the run's length."
        },
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that load batches. Default: 2 on an accelerator where tokens are drawn (MLM, PLM) and there is "
            "room for them, else 0."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Say what would happen, time a few steps, and end: device, sizes, steps, memory, time. The output folder "
            "stays as it is."
        },
    )
    print_config: bool = field(
        default=False, metadata={"help": "Print a config file (YAML) that repeats the run, and end."}
    )

    def __post_init__(self) -> None:
        self.precision: Precision  # set below; no field, so that it is no flag
        self.config_text = ""  # the run as a config file; by parse
        sharding.take_up_launcher(self)
        try:
            self.precision = choose_precision(self.fp16, self.bf16, self.fp16_opt_level, self.loss_scale)
            if self.device_id is not None and not self.use_cpu:
                device.check_device_id(self.device_id)
        except ValueError as error:
            raise UsageError(str(error)) from error
        self.notes = sharding.prepare(self)
        self._check_optimizer()
        self._check_elastic()
        self._check_numbers()
        self._check_reports()
        self._keep_evaluation_in_its_type()
        self.notes += self._choose_backend()
        if self.do_predict:
            self.notes.append(
                "--do_predict does nothing here: --do_eval tells loss and accuracy of the validation text"
            )
        if self.enable_jit_checkpoint:
            self.enable_jit_checkpoint: bool = False
            self.notes.append(
                "--enable_jit_checkpoint is not needed: SIGTERM and SIGINT always save before training ends"
            )
        if device.process_count() > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UsageError(
                f"WORLD_SIZE is {device.process_count()} but no launcher has set RANK and MASTER_ADDR: start the script with "
                f"torchrun --nproc_per_node={device.process_count()}, or unset WORLD_SIZE"
            )
        if not self.use_cpu and (missing := device.missing_npu()):
            raise UsageError(missing)
        if device.accelerator() is None:
            # transformers forms a process group for CPUs only if it is told that CPUs are meant: without this every
            # rank of a torchrun would train on the same samples, in silence.
            self.use_cpu: bool = True
        if device.process_count() > 1 and not self.deepspeed:
            on = (None if self.use_cpu else device.accelerator()) or "cpu"
            meet_after_restart(self.ddp_backend or device.BACKENDS.get(on, "gloo"), self.ddp_timeout)
        compilation.settle(self)
        data_loading.begin(self)
        super().__post_init__()
        self._use_one_device()
        device.check_free(self.device)
        compilation.check(self)
        device.configure(self.device, self.npu_jit_compile, self.npu_internal_format)
        if self.world_size != device.process_count():
            raise UsageError(
                f"WORLD_SIZE is {device.process_count()} but {self.world_size} process takes part in training: start the "
                "script with torchrun, or unset WORLD_SIZE, RANK and LOCAL_RANK"
            )

    def __getstate__(self) -> dict:
        # Trainer pickles its arguments into training_args.bin, which goes where the model goes.
        return {**self.__dict__, "hub_token": None}

    @property
    def layers_are_patched(self) -> bool:
        """Whether apex, FSDP or DeepSpeed reaches into the model's layers: they are to stay as transformers made them."""
        return self.half_precision_backend == "apex" or self.is_sharded

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed holds the weights, and with them mixed precision and gradients."""
        return sharding.engine_flag(self) is not None

    @property
    def splits(self) -> list[str]:
        """The parts of the text that the run uses: "train" and "validation", or one of them."""
        return ["train"] * self.do_train + ["validation"] * self.do_eval

    def _choose_backend(self) -> list[str]:
        """Leaves "native" or "apex" in half_precision_backend; returns a note if apex is asked for and cannot be used."""
        asked, self.half_precision_backend = self.half_precision_backend, "native"
        if asked not in BACKENDS:
            raise UsageError(f"--half_precision_backend {asked}: choose one of {', '.join(BACKENDS)}")
        if asked != "apex":
            return []
        half_type = "fp16" if self.fp16 else "bf16" if self.bf16 else None
        reason = apex_backend.why_native(self.precision.level, half_type, self.do_train, self.is_sharded)
        if reason is not None:
            return [f"--half_precision_backend apex is now native ({reason})"]
        self.half_precision_backend = "apex"
        return []

    def _use_one_device(self) -> None:
        """A process trains on one device; Trainer would spread it over all that it sees, by nn.DataParallel."""
        if self.n_gpu > 1:
            self.notes.append(
                f"{self.n_gpu} devices are here, and one is used: torchrun --nproc_per_node={self.n_gpu} in place of python uses all"
            )
            self._n_gpu = 1

    def _keep_evaluation_in_its_type(self) -> None:
        """A model whose weights are half is evaluated as it is: Trainer would make its norms half as well."""
        for name in ("fp16_full_eval", "bf16_full_eval"):
            if getattr(self, name) and self.precision.casts_model:
                setattr(self, name, False)
                self.notes.append(
                    f"--{name} is not needed: at {self.precision.level} the model is evaluated in half precision"
                )

    def _check_optimizer(self) -> None:
        optimizer = str(getattr(self.optim, "value", self.optim))
        if self.use_combine_grad and optimizer not in ELEMENTWISE_OPTIMIZERS:
            raise UsageError(
                f"--optim {optimizer} cannot run with --use_combine_grad: its update is not element-wise, it looks at a "
                "parameter's shape or at blocks of it; use adamw_torch_fused, or leave --use_combine_grad out"
            )
        if (
            self.precision.has_master_weights
            and not self.is_sharded
            and optimizer.startswith(OPTIMIZERS_WITHOUT_MASTERS)
        ):
            raise UsageError(
                f"--optim {optimizer} cannot run at O2: it updates the model's own weights, past the float32 masters; use "
                "adamw_torch_fused, or --fp16_opt_level O1"
            )

    def _check_elastic(self) -> None:
        engine = sharding.engine_flag(self)
        other = engine or ("--auto_find_batch_size" if self.auto_find_batch_size else None)
        if self.elastic and other is not None:
            why = "changes the batch size by itself" if engine is None else "keeps a part of the state in each process"
            raise UsageError(f"--elastic does not work with {other}, which {why}; leave one of them out")

    def _check_reports(self) -> None:
        if self.report_to in ("none", ["none"], "all", ["all"]):
            return
        from transformers.integrations import get_available_reporting_integrations
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        for name in [self.report_to] if isinstance(self.report_to, str) else self.report_to or []:
            if name not in INTEGRATION_TO_CALLBACK:
                raise UsageError(f"--report_to {name}: choose one of none, all, {', '.join(INTEGRATION_TO_CALLBACK)}")
            if name not in get_available_reporting_integrations():
                raise UsageError(
                    f"--report_to {name}: its package is not installed; install it, or leave the flag out"
                )

    def _check_numbers(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)}: give 1 or more")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"--{name} {getattr(self, name)}: give a number of 0 or more")
        if self.num_train_epochs == 0 and self.max_steps <= 0 and self.do_train:
            raise UsageError("--num_train_epochs 0: nothing would be trained; give a number above 0")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UsageError(f"--max_steps {self.max_steps}: give 1 or more, or leave it out to count by epochs")
        if self.max_train_time is not None:
            try:
                seconds_of(self.max_train_time)
            except ValueError as error:
                raise UsageError(f"--max_train_time {error}") from error
        for name in ("seed", "dataloader_num_workers", "max_bad_steps"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"--{name} {getattr(self, name)}: give 0 or more")
        if (self.metric_for_best_model or "loss").removeprefix("eval_") not in ("loss", "accuracy"):
            raise UsageError(
                f"--metric_for_best_model {self.metric_for_best_model}: an evaluation tells loss and accuracy; name one of them "
                "(the lowest perplexity is that of the lowest loss)"
            )
        if self.output_dir is not None and os.path.exists(self.output_dir) and not os.path.isdir(self.output_dir):
            raise UsageError(f"--output_dir {self.output_dir}: is a file; name a folder")
