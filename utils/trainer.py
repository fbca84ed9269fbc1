"""transformers' Trainer with native O0-O3 precision, combined gradients, streams and samples in an order of their own.

What else it does has its room in the classes it comes of: CheckpointedTrainer, WatchedTrainer, ObjectiveTrainer.

Every method here is a narrow hook: it does one thing before or after the method it overrides, whose body stays
transformers' own. With all options off it trains bit for bit as Trainer does.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from utils import (
    compilation,
    data_loading,
    device,
    elastic,
    gradient_compression,
    prepacked_weights,
    sharding,
    stream_position,
)
from utils.amp import LossScaler, autocast, cast_model, read_overflow_on_the_host
from utils.apex_amp import ApexScaler
from utils.combine_grad import CombinedOptimizer
from utils.data_parallel import CombinedDataParallel
from utils.errors import UsageError, one_line
from utils.objective_trainer import ObjectiveTrainer
from utils.sample_order import EpochBegins, LengthGroups
from utils.watched_trainer import WatchedTrainer

logger = logging.getLogger(__name__)


class LanguageModelingTrainer(WatchedTrainer, ObjectiveTrainer):
    """Trainer for LanguageModelingArguments, with what ObjectiveTrainer takes."""

    optimizer: Any  # torch's, ours or apex's, and while training in accelerate's wrapper
    model: Any  # transformers', or of the class that FSDP2 makes of its

    def __init__(self, *arguments, **named):
        self.complete_model_card: Callable[[], None] | None = None  # called whenever transformers has written it
        self.stream_loader: stream_position.StreamLoader | None = None
        self._model_is_cast = False
        self._fsdp_plugin: Any = None
        super().__init__(*arguments, **named)
        self._given_up = self._prepare_for_fsdp() if self._fsdp_plugin is not None else {}
        data_loading.settle(self.args, self.train_dataset)
        self.add_callback(EpochBegins())
        if self.args.elastic:
            self.add_callback(elastic.MicroBatchSeeds())

    # ---- precision ----
    def _build_accelerator_args(self, **named) -> dict:
        # accelerate's own mixed precision stays off: it has neither O2 nor O3, nor autocast on a CPU.
        with compilation.any_backend(self.args):
            built = super()._build_accelerator_args(**named)
        compilation.let_through(built["dynamo_plugin"], self.args.torch_compile_backend)
        self._fsdp_plugin = built["fsdp_plugin"]
        if self._fsdp_plugin is not None and self.args.precision.level == "O2":
            self._fsdp_plugin.mixed_precision_policy = sharding.fsdp_policy(self.args.precision)
        return {**built, "mixed_precision": "no"}

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self._fsdp_plugin is not None:
            sharding.let_cpus_shard(self.accelerator, self._fsdp_plugin)
            self.is_fsdp_enabled = True
        gradient_compression.set_up(self.accelerator, self.args.ddp_comm_hook)
        precision = self.args.precision
        if self.args.half_precision_backend == "apex":
            self.accelerator.scaler = ApexScaler(precision.level, precision.loss_scale, self.args.use_combine_grad)
        elif precision.loss_scale is not None and not self.args.deepspeed:
            # From here accelerate scales the loss, sees skipped steps, and Trainer saves and loads scaler.pt.
            self.accelerator.scaler = LossScaler(self.args.device.type, precision.loss_scale)
            if precision.dtype == torch.float16 and not device.shows_overflow(self.args.device):
                logger.warning(
                    "a float16 overflow gives 65504 on this device, not inf: the loss scale cannot see it; use --bf16, or "
                    "give a --loss_scale that is low enough"
                )
        slowdown = device.half_slowdown(self.args.device, precision.dtype)
        if slowdown > 3:
            logger.warning(
                "this CPU multiplies %s matrices %.0f times slower than float32: --fp16_opt_level %s works here, but "
                "float32 is faster",
                str(precision.dtype).removeprefix("torch."),
                slowdown,
                precision.level,
            )

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        context = super().compute_loss_context_manager()
        if self.apex is None and not self.args.deepspeed:  # which has its own
            context.enter_context(autocast(self.args.precision, self.args.device.type))
        return context

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        if self.apex is not None:
            self.optimizer = self.apex.initialize(self.model, optimizer)
            return self.optimizer
        self._warn_of_underflow(optimizer)
        if self._model_is_cast and self.args.precision.has_master_weights:
            raise RuntimeError(
                "evaluate() before train() has made the weights half, and float32 masters can no longer be made of them: train "
                "with a new Trainer"
            )
        masters = self._cast_model()
        if self.args.use_combine_grad or masters:
            self.optimizer = CombinedOptimizer(
                optimizer,
                masters,
                join=self.args.use_combine_grad,
                fold_clip=device.fused_adamw_obeys_grad_scale(self.args.device),
            )
        elif self.accelerator.scaler is not None:
            read_overflow_on_the_host(optimizer)
        return self.optimizer

    def _warn_of_underflow(self, optimizer: torch.optim.Optimizer) -> None:
        precision = self.args.precision
        if (
            precision.level == "O3"
            and precision.dtype == torch.float16
            and 0 < optimizer.defaults.get("eps", 0) < 1e-6
        ):
            logger.warning(
                "at O3 the optimizer's moments are float16, in which small squares and --adam_epsilon %g are zero: the loss "
                "may rise; use --bf16, --fp16_opt_level O2 or --adam_epsilon 1e-4",
                optimizer.defaults["eps"],
            )

    def evaluation_loop(self, *arguments, **named):
        # Where nothing was trained before.
        self._cast_model()
        self._shard_model()
        with self._packed_weights():
            return super().evaluation_loop(*arguments, **named)

    def _packed_weights(self) -> contextlib.AbstractContextManager:
        """On a CPU whose memory has room for copies; torch.compile does as much by itself."""
        if self.args.device.type != "cpu" or self.args.torch_compile:
            return contextlib.nullcontext()
        copies = self.model.get_memory_footprint(return_buffers=False) * device.local_process_count()
        if 4 * copies > device.memory(self.args.device)["free"]:
            return contextlib.nullcontext()
        return prepacked_weights.prepacked(self.model, transposed=(Conv1D,))

    def _prepare_for_fsdp(self) -> dict[str, str]:
        if self._fsdp_plugin.transformer_cls_names_to_wrap is None:
            self._fsdp_plugin.transformer_cls_names_to_wrap = sharding.layers_to_wrap(self.model)
        return sharding.give_up_second_biases(self.model)

    def _shard_model(self) -> None:
        """Lets FSDP2 have the model, which accelerate gives it only together with an optimizer."""
        if self.is_fsdp_enabled and not self.accelerator._models:
            self.create_optimizer()
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model

    def _cast_model(self) -> dict:
        if self._model_is_cast or self.apex is not None or self.args.is_sharded or not self.args.precision.casts_model:
            return {}
        self._model_is_cast = True
        return cast_model(self.model, self.args.precision)

    def _load_scaler(self, checkpoint) -> None:
        if self.accelerator.scaler is not None:  # a checkpoint of another level may hold one that is not needed now
            super()._load_scaler(checkpoint)

    @property
    def apex(self) -> ApexScaler | None:
        """apex's amp, which takes the place of our own levels; None without --half_precision_backend apex."""
        scaler = self.accelerator.scaler
        return scaler if isinstance(scaler, ApexScaler) else None

    # ---- combined gradients ----
    @property
    def combined(self) -> CombinedOptimizer | None:
        """The optimizer that runs on flat buffers, within what accelerate wrapped around it; None if there is none."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        candidates = (self.optimizer, optimizer)
        return next((candidate for candidate in candidates if isinstance(candidate, CombinedOptimizer)), None)

    def _wrap_model(self, model, training=True, dataloader=None):
        if isinstance(model, CombinedDataParallel):
            return model
        if not training or self.combined is None:
            return super()._wrap_model(model, training, dataloader)
        # Compiled, but neither wrapped in DDP nor placed: Trainer has done that, and accelerate's device of a process
        # among several, cpu:0, is for torch another one than cpu. Its `.to` would copy the weights out of their buffer.
        model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        if self.args.world_size == 1:
            return model
        find_unused = self.args.ddp_find_unused_parameters
        return CombinedDataParallel(
            model,
            self.combined,
            bucket_megabytes=self.args.ddp_bucket_cap_mb or 25,
            find_unused_parameters=find_unused if find_unused is not None else True,
            wire_dtype=gradient_compression.DTYPES.get(self.args.ddp_comm_hook),
        )

    def _init_training_state(self, max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial):
        place = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        if self.stream_loader is None or resume_from_checkpoint is None:
            return place
        if not self.args.ignore_data_skip:
            stream_position.load(self.stream_loader, resume_from_checkpoint, self.args)
        return 0, 0  # the loader goes on where it stood: there is nothing to skip

    def _load_from_checkpoint(self, *arguments, **named):
        # The first time there are no masters yet; they come of the weights that are loaded here.
        with self._float32_weights() if self.optimizer is not None else contextlib.nullcontext():
            super()._load_from_checkpoint(*arguments, **named)

    def _prepare_for_training(self, max_steps, *arguments, **named):
        compilation.choose(self, max_steps)
        prepared = super()._prepare_for_training(max_steps, *arguments, **named)
        assert self.combined is None or self.combined.holds_weights(), (
            "the model's weights have left their flat buffer"
        )
        # What an attempt has left that ran out of memory in the middle of a step (--auto_find_batch_size).
        if self.combined is not None:
            self.combined.zero_grad()
        if isinstance(self.accelerator.scaler, LossScaler):
            self.accelerator.scaler.forget_step()
        if self.apex is not None:
            self.apex.route_zero_grad(prepared[0])
        return prepared

    def _unscale_gradients(self) -> None:
        if self.combined is not None:
            self.combined.finish_gradients()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.combined or self.optimizer.optimizer)

    def _clip_grad_norm(self, model):
        self._unscale_gradients()
        if self.combined is not None:
            return self.combined.clip_grad_norm_(self.args.max_grad_norm)
        if self.apex is not None:
            return self.apex.clip_grad_norm_(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:
            self._unscale_gradients()
            if self.combined is not None:
                grad_norm = self.combined.grad_norm()
            elif self.apex is not None:
                grad_norm = self.apex.grad_norm()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        if sharding.model_stays_in_shards(self._fsdp_plugin) and not _internal_call:
            # A checkpoint may hold shards alone; the model that training leaves behind is whole.
            whole = self.accelerator.get_state_dict(self.model)
            self._save(output_dir, state_dict=whole)
        if _internal_call and self._is_evaluated_in_half():
            return  # before a push: what training has saved is better
        super().save_model(output_dir, _internal_call)

    def _is_evaluated_in_half(self) -> bool:
        """Whether an evaluation has left the weights in half precision, after training has saved them."""
        in_half = self.args.fp16_full_eval or self.args.bf16_full_eval
        return in_half and self.args.do_train and not self.is_in_train

    def _save(self, output_dir=None, state_dict=None) -> None:
        # What is saved are the float32 masters: loadable at any level, and nothing is lost on the way.
        if state_dict is not None and self.is_fsdp_enabled:
            state_dict = sharding.as_saved(state_dict, self.model, self._given_up)
        with self._float32_weights():
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._without_scaler():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        with self._without_scaler():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _without_scaler(self) -> contextlib.AbstractContextManager:
        return sharding.without_scaler(self.optimizer) if self.is_fsdp_enabled else contextlib.nullcontext()

    def _load_best_model(self) -> None:
        with self._float32_weights():
            super()._load_best_model()

    def _float32_weights(self) -> contextlib.AbstractContextManager:
        if self.apex is not None:
            return self.apex.float32_weights(self.model)
        return self.combined.float32_weights() if self.combined is not None else contextlib.nullcontext()

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        # Our datasets hold what their collator needs and nothing else, some of which no model knows by name.
        return data_collator

    # ---- streams ----
    def _get_dataloader(self, dataset, description, batch_size, *arguments, is_training=False, **named):
        if not isinstance(dataset, torch.utils.data.IterableDataset):
            return super()._get_dataloader(
                dataset, description, batch_size, *arguments, is_training=is_training, **named
            )
        loader = stream_position.loader(dataset, batch_size, self.data_collator, self.args, is_training)
        if is_training:
            self.stream_loader = loader
            self.add_callback(stream_position.StreamEpochs(dataset.epochs or 1.0))
        return loader

    def _save_rng_state(self, output_dir) -> None:
        super()._save_rng_state(output_dir)
        if self.stream_loader is not None:
            stream_position.save(self.stream_loader, output_dir, self.args)

    def streamed_tokens(self) -> int:
        """The tokens that all ranks have been given of the stream, padding left out. For every rank to call."""
        assert self.stream_loader is not None
        return int(self.accelerator.gather(torch.tensor([self.stream_loader.tokens], device=self.args.device)).sum())

    # ---- order of samples ----
    def _get_train_sampler(self, train_dataset=None):
        step = elastic.samples_per_step(self.args)
        groups = self._length_groups(
            self.train_dataset if train_dataset is None else train_dataset,
            step if self.args.elastic else step // self.args.world_size,
        )
        sampler = groups or super()._get_train_sampler(train_dataset)
        if not self.args.elastic:
            return sampler
        return elastic.WholeSteps(sampler, step, self.args.dataloader_drop_last, self._data_seed)

    def _get_eval_sampler(self, eval_dataset):
        return self._length_groups(eval_dataset, self.args.eval_batch_size) or super()._get_eval_sampler(eval_dataset)

    def _length_groups(self, samples, batch_size: int) -> LengthGroups | None:
        lengths = getattr(samples, "lengths", None)
        if self.args.train_sampling_strategy != "group_by_length" or lengths is None:
            return None
        return LengthGroups(lengths, batch_size, self._data_seed)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # ---- hub ----
    def init_hf_repo(self, *arguments, **named) -> None:
        try:
            super().init_hf_repo(*arguments, **named)
        except Exception as error:  # of the network, of the hub, or of a token that is missing
            raise UsageError(
                f"--push_to_hub: the repository cannot be made: {one_line(error)[:300]}; leave the flag out and push the "
                "output folder later by `hf upload`",
                of_one_rank=True,
            ) from error

    def create_model_card(self, *arguments, **named) -> None:
        super().create_model_card(*arguments, **named)
        if self.complete_model_card is not None and self.is_world_process_zero():
            self.complete_model_card()
