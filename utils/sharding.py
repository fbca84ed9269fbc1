"""FSDP2 and DeepSpeed's ZeRO, chosen by transformers' flags or by `accelerate launch`: what our options mean to them.

They spread weights, gradients and optimizer state over the processes, and have mixed precision and combined gradients of
their own. Ours are mapped to those, and nothing of amp.py's casts or combine_grad.py runs:

===================  ========================================  ==========================================
 ours                 FSDP2                                     DeepSpeed
===================  ========================================  ==========================================
O1                   torch.autocast over float32 shards        its torch_autocast; bf16 alone
O2                   half weights, norms too, from float32     half weights, norms too, and float32
                     shards; gradients summed in float32       masters in shards: its fp16 or bf16
O3                   refused                                   refused
--loss_scale         our scaler                                its fp16's
--use_combine_grad   a layer's gradients are in one buffer     ZeRO's gradients are in flat buckets and
                     already                                   its masters in flat tensors already
===================  ========================================  ==========================================

With DeepSpeed a half type alone means O2, as there, and not O1.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import device
from utils.amp import Precision
from utils.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch import nn
    from torch.distributed.fsdp import MixedPrecisionPolicy


def engine_flag(args) -> str | None:
    """The flag of the engine that spreads the training's state over processes: --fsdp or --deepspeed; None for neither."""
    return "--deepspeed" if args.deepspeed else "--fsdp" if args.fsdp else None


# ---- flags ----
def take_up_launcher(args) -> None:
    """Sets what `accelerate launch` was told and the command line leaves open: --fsdp, --deepspeed, --fp16 and --bf16.

    args: LanguageModelingArguments, before transformers has looked at them. Raises UsageError for a DeepSpeed config that
    cannot be read.
    """
    if args.deepspeed:
        args.deepspeed = _read_deepspeed_config(args.deepspeed)
    elif not args.fsdp and _is_set("ACCELERATE_USE_DEEPSPEED"):
        args.deepspeed = _launched_deepspeed_config()
    elif not args.fsdp and _is_set("ACCELERATE_USE_FSDP"):
        args.fsdp, args.fsdp_config = True, _launched_fsdp_config()
    half = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if half in ("fp16", "bf16") and not (args.fp16 or args.bf16):
        setattr(args, half, True)
    if args.deepspeed and (args.fp16 or args.bf16) and args.fp16_opt_level is None:
        args.fp16_opt_level = "O2"


def _launched_fsdp_config() -> dict[str, Any]:
    """What `accelerate launch` tells by the environment, in the words of --fsdp_config."""
    config: dict[str, Any] = {
        "version": int(os.environ.get("FSDP_VERSION", "1")),
        "cpu_offload": _is_set("FSDP_OFFLOAD_PARAMS"),
        "activation_checkpointing": _is_set("FSDP_ACTIVATION_CHECKPOINTING"),
        "cpu_ram_efficient_loading": _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"),
        "state_dict_type": "SHARDED_STATE_DICT",  # accelerate's own default, which is not in the environment
    }
    for name in ("reshard_after_forward", "auto_wrap_policy", "state_dict_type"):
        if value := os.environ.get(f"FSDP_{name.upper()}"):
            config[name] = value
    if layers := os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        config["transformer_layer_cls_to_wrap"] = layers.split(",")
    if config.get("auto_wrap_policy") == "SIZE_BASED_WRAP":
        config["min_num_params"] = int(os.environ.get("FSDP_MIN_NUM_PARAMS", "0"))
    return config


def _launched_deepspeed_config() -> dict[str, Any]:
    """What `accelerate launch` tells by the environment or by a file of its own, as a DeepSpeed config."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        return _read_deepspeed_config(file)
    from accelerate.utils import DeepSpeedPlugin

    config = DeepSpeedPlugin().deepspeed_config
    # The launcher has defaults for what the command line says in any case.
    return config | {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}


def _read_deepspeed_config(given: dict | str) -> dict[str, Any]:
    if isinstance(given, dict):
        return dict(given)
    try:
        config = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--deepspeed {given}: neither JSON nor a JSON file that can be read ({error})") from error
    if not isinstance(config, dict):
        raise UsageError(f"--deepspeed {given}: is no JSON object, which a DeepSpeed config is")
    return config


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def prepare(args) -> list[str]:
    """Maps our options to the engine's, before transformers has looked at them; returns notes for the log.

    Does nothing without an engine. Raises UsageError for what the engine cannot do.
    """
    flag = engine_flag(args)
    if flag is None:
        return []
    if args.precision.level == "O3":
        raise UsageError(
            f"--fp16_opt_level O3 does not work with {flag}, which keeps float32 weights in any case; use O2"
        )
    if args.ddp_comm_hook:
        own = "set communication_data_type in its config" if args.deepspeed else "it sends float32, and leave this out"
        raise UsageError(f"--ddp_comm_hook {args.ddp_comm_hook}: {flag} sends gradients itself; {own}")
    notes = []
    if args.use_combine_grad:
        args.use_combine_grad = False
        notes.append(
            f"--use_combine_grad: {flag} keeps gradients in flat buffers of its own; nothing is added to that"
        )
    if args.precision.level == "O2":
        notes.append(
            f"--fp16_opt_level O2 is {flag}'s own mixed precision: norms are half too, its shards are the masters"
        )
    if args.deepspeed:
        args.deepspeed = deepspeed_config(args.deepspeed, args.precision, args.loss_scale is not None)
    return notes


def check(args) -> None:
    """Raises UsageError for what transformers has made of --fsdp, where that cannot run."""
    if not args.fsdp:
        return
    version = (args.fsdp_plugin_args or {}).get("fsdp_version")
    if version != 2:
        raise UsageError(
            f"--fsdp: version {version} is not supported; set version to 2 in --fsdp_config, or give --fsdp_version 2 to "
            "accelerate launch"
        )
    if device.process_count() == 1:
        raise UsageError(
            "--fsdp: one process has nobody to share weights with; start it with torchrun, or leave it out"
        )


# ---- DeepSpeed ----
def deepspeed_config(given: dict[str, Any], precision: Precision, scale_is_asked: bool) -> dict[str, Any]:
    """A DeepSpeed config with what the flags ask for; what it says itself stays.

    scale_is_asked: whether --loss_scale is given, which then counts more than the config. Raises UsageError for a half type
    other than the flags', and for what DeepSpeed has not.
    """
    # "auto" is transformers' word: it fills in the flag of the same meaning. What is missing DeepSpeed would not do at all.
    config = {name: "auto" for name in ("train_micro_batch_size_per_gpu", "gradient_clipping")} | given
    config.setdefault("gradient_accumulation_steps", "auto")
    config["zero_optimization"] = {"stage3_gather_16bit_weights_on_model_save": True} | given.get(
        "zero_optimization", {}
    )
    half = str(precision.dtype).removeprefix("torch.")
    own = {"float16": "fp16", "bfloat16": "bf16"}.get(half)
    for name in ("fp16", "bf16"):
        if config.get(name, {}).get("enabled") is True and (name != own or precision.level != "O2"):
            raise UsageError(
                f"--deepspeed: its config turns {name} on and the command line does not; add --{name} --fp16_opt_level O2, "
                'or set "enabled" to "auto" there'
            )
        config.pop(name, None)
    if precision.level == "O1":
        if own == "fp16":
            raise UsageError("--fp16_opt_level O1 with --fp16 and --deepspeed: use --bf16, or --fp16_opt_level O2")
        config["torch_autocast"] = {"enabled": True, "dtype": half}
    if scale_is_asked and own == "bf16":
        raise UsageError("--loss_scale: --deepspeed scales no loss with --bf16; leave one of them out")
    if precision.level == "O2":
        assert own is not None
        # A dynamic scale moves as ours does: from 2**16, halved at each overflow, doubled after 2000 steps without.
        scale: dict[str, Any] = {"initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}
        asked = {"loss_scale": 0 if precision.loss_scale == "dynamic" else precision.loss_scale}
        section = given.get(own, {}) | {"enabled": True}
        if own == "fp16":
            section = (scale | asked | section) | (asked if scale_is_asked else {})
        config[own] = section
    return config


@contextlib.contextmanager
def whole_at_first(args) -> Iterator[None]:
    """Within, a new model is made as without ZeRO-3, each process the whole of it; DeepSpeed spreads it when training begins.

    transformers would make it in parts, and draw other weights than elsewhere; of GPT's buffers it would fill rank 0's alone
    (transformers/integrations/deepspeed.py, initialize_weights_zero3).
    """
    if not args.deepspeed:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


# ---- FSDP2 ----
def fsdp_policy(precision: Precision) -> "MixedPrecisionPolicy":
    """FSDP2's mixed precision at O2. Gradients are summed over ranks in float32, in which it keeps the shards."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=precision.dtype, reduce_dtype=torch.float32)


def let_cpus_shard(accelerator: "Accelerator", plugin: "FullyShardedDataParallelPlugin") -> None:
    """Makes accelerate shard on CPUs too: there it leaves FSDP out without a word (accelerate/state.py)."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def model_stays_in_shards(plugin: "FullyShardedDataParallelPlugin | None") -> bool:
    """Whether transformers would save no whole model, but each rank its shard (SHARDED_STATE_DICT)."""
    return plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type)


@contextlib.contextmanager
def without_scaler(optimizer) -> Iterator[None]:
    """Within, accelerate's optimizer steps without the loss scaler.

    To gather or load FSDP2's moments torch has an optimizer without any make them, by a step of zeros, which is no step for
    a scaler to judge.
    """
    scaler, optimizer.scaler = optimizer.scaler, None
    try:
        yield
    finally:
        optimizer.scaler = scaler


def layers_to_wrap(model: "nn.Module") -> list[str]:
    """The classes of the layers that FSDP2 is to gather one at a time: transformers' _no_split_modules, or where a model
    names none, what it has several of in a list.

    Without what holds the input embedding: that is in a group with the head, whose weight it may be.
    """
    from torch.nn import ModuleList

    lists = [module for module in model.modules() if isinstance(module, ModuleList) and len(module) > 1]
    named = set(model._no_split_modules or ()) or {type(layer).__name__ for layers in lists for layer in layers}
    embedding = model.get_input_embeddings()
    holders = {type(module).__name__ for module in model.modules() if embedding in module.modules()}
    return sorted(named - holders)


def give_up_second_biases(model: "nn.Module") -> dict[str, str]:
    """Takes from BERT-like heads their own name for the bias of their decoder; returns {that name: the decoder's}.

    The decoder shares a group of FSDP2's with the embedding, the head has another, and no parameter may be in two. The
    decoder alone adds the bias (transformers' BertLMPredictionHead and its kin).
    """
    output = model.get_output_embeddings()
    bias = getattr(output, "bias", None)
    names = {id(module): name for name, module in model.named_modules()}
    given_up = {}
    for module in model.modules():
        for own, parameter in list(module._parameters.items()):
            if bias is not None and parameter is bias and module is not output:
                module.register_parameter(own, None)
                given_up[f"{names[id(module)]}.{own}"] = f"{names[id(output)]}.bias"
    return given_up


def as_saved(state: dict[str, Any], model: "nn.Module", given_up: dict[str, str]) -> dict[str, Any]:
    """A gathered state dict as transformers writes it: with the names that were given up, and less the second ones of tied
    weights, which share no memory once they are gathered; by that transformers tells."""
    state = state | {name: state[kept] for name, kept in given_up.items() if kept in state}  # rank 0 alone has all
    return {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}


def whole(number):
    """A number of which FSDP2 has left each rank its part: added up, and as a plain tensor. Others as they are."""
    return number.full_tensor() if hasattr(number, "full_tensor") else number


# ---- what both need ----
def parameter_count(model: "nn.Module") -> int:
    """The model's parameters, shared ones once, also where DeepSpeed's ZeRO-3 has left a rank none of their values."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
