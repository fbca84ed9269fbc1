"""What our options and accelerate's launcher mean to FSDP2 and DeepSpeed; tests/test_sharded_trainer.py trains by them."""

import json
from types import SimpleNamespace

import pytest
import torch

from utils import arguments, sharding
from utils.amp import choose_precision
from utils.errors import UsageError

ZERO = {"zero_optimization": {"stage": 2}}


def flags(**words) -> SimpleNamespace:
    """Arguments as they are before transformers has looked at them."""
    empty = dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "fp16_opt_level", "ddp_comm_hook", "loss_scale"))
    found = SimpleNamespace(**empty | {"fp16": False, "bf16": False, "use_combine_grad": False} | words)
    found.precision = choose_precision(found.fp16, found.bf16, found.fp16_opt_level, found.loss_scale)
    return found


def launched(monkeypatch, words: dict[str, str], **given) -> SimpleNamespace:
    """Arguments under `accelerate launch`, which sets these variables."""
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    args = flags(**given)
    sharding.take_up_launcher(args)
    return args


# ---- accelerate launch ----
def test_nothing_is_taken_up_where_nothing_was_launched(monkeypatch):
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    args = launched(monkeypatch, {})
    assert vars(args) == vars(flags())
    assert sharding.engine_flag(args) is None and sharding.prepare(args) == []


def test_fsdp_of_accelerate_launch_is_the_flag(monkeypatch):
    words = {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
        "FSDP_MIN_NUM_PARAMS": "1000",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "A,B",
    }
    args = launched(monkeypatch, words)
    assert args.fsdp is True and args.bf16 and sharding.engine_flag(args) == "--fsdp"
    assert args.fsdp_config == {
        "version": 2,
        "cpu_offload": False,
        "activation_checkpointing": False,
        "cpu_ram_efficient_loading": False,
        "reshard_after_forward": "false",
        "state_dict_type": "SHARDED_STATE_DICT",
        "auto_wrap_policy": "SIZE_BASED_WRAP",
        "min_num_params": 1000,
        "transformer_layer_cls_to_wrap": ["A", "B"],
    }


def test_the_command_line_counts_more_than_the_launcher(monkeypatch):
    words = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "ACCELERATE_MIXED_PRECISION": "bf16"}
    args = launched(monkeypatch, words, fsdp=True, fsdp_config={"version": 2}, fp16=True)
    assert (args.fsdp_config, args.fp16, args.bf16) == ({"version": 2}, True, False)


def test_a_deepspeed_file_of_accelerate_launch_is_the_flag(monkeypatch, tmp_path):
    (tmp_path / "zero.json").write_text(json.dumps(ZERO))
    words = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json"),
    }
    assert launched(monkeypatch, words).deepspeed == ZERO


# ---- what is refused, and what is told ----
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"fsdp": True, "bf16": True, "fp16_opt_level": "O3"}, "--fp16_opt_level O3 does not work with --fsdp"),
        ({"fsdp": True, "ddp_comm_hook": "bf16"}, "--ddp_comm_hook bf16: --fsdp sends gradients itself"),
        ({"deepspeed": ZERO, "ddp_comm_hook": "bf16"}, "set communication_data_type in its config"),
        ({"deepspeed": ZERO, "fp16": True, "fp16_opt_level": "O1"}, "use --bf16, or --fp16_opt_level O2"),
        (
            {"deepspeed": ZERO, "bf16": True, "fp16_opt_level": "O2", "loss_scale": "128"},
            "--loss_scale: --deepspeed scales no loss with --bf16",
        ),
        ({"deepspeed": ZERO | {"bf16": {"enabled": True}}}, "its config turns bf16 on and the command line does not"),
        (
            {"deepspeed": ZERO | {"bf16": {"enabled": True}}, "fp16": True, "fp16_opt_level": "O2"},
            "its config turns bf16 on and the command line does not",
        ),
    ],
)
def test_what_an_engine_cannot_do_is_refused(words, expected):
    with pytest.raises(UsageError) as caught:
        sharding.prepare(flags(**words))
    assert expected in str(caught.value)


@pytest.mark.parametrize("given", ["{oops", "no such file.json", "[1]"])
def test_a_deepspeed_config_that_cannot_be_read_is_named(given, tmp_path):
    if given == "[1]":
        (tmp_path / "list.json").write_text(given)
        given = str(tmp_path / "list.json")
    with pytest.raises(UsageError, match="--deepspeed"):
        sharding.take_up_launcher(flags(deepspeed=given))


@pytest.mark.parametrize("engine", [{"fsdp": True}, {"deepspeed": ZERO}])
def test_combined_gradients_are_left_to_the_engine_and_said_so(engine):
    args = flags(use_combine_grad=True, bf16=True, fp16_opt_level="O2", **engine)
    flag = sharding.engine_flag(args)
    combined, level = sharding.prepare(args)
    assert args.use_combine_grad is False and combined.startswith(f"--use_combine_grad: {flag} keeps gradients")
    assert level.startswith(f"--fp16_opt_level O2 is {flag}'s own mixed precision")


def test_a_run_of_one_process_or_of_fsdp_1_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    args = arguments.LanguageModelingArguments(output_dir=str(tmp_path), fsdp=True, use_cpu=True)
    with pytest.raises(UsageError, match="--fsdp: one process has nobody to share weights with"):
        sharding.check(args)
    args = arguments.LanguageModelingArguments(
        output_dir=str(tmp_path), fsdp=True, fsdp_config={"version": 1}, use_cpu=True
    )
    with pytest.raises(UsageError, match="--fsdp: version 1 is not supported; set version to 2"):
        sharding.check(args)


# ---- precision ----
def test_o2_of_fsdp_computes_in_half_and_sums_in_float32():
    policy = sharding.fsdp_policy(choose_precision(False, True, "O2"))
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_deepspeed_in_float32_gets_what_transformers_would_leave_out():
    config = sharding.deepspeed_config(ZERO, choose_precision(False, False), False)
    assert config == {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2, "stage3_gather_16bit_weights_on_model_save": True},
    }
    own = ZERO | {"gradient_clipping": 0.5, "fp16": {"enabled": "auto"}, "steps_per_print": 9}
    config = sharding.deepspeed_config(own, choose_precision(False, False), False)
    assert (config["gradient_clipping"], config["steps_per_print"], "fp16" in config) == (0.5, 9, False)


def test_o1_of_deepspeed_is_its_autocast():
    config = sharding.deepspeed_config(ZERO, choose_precision(False, True, "O1"), False)
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"} and "bf16" not in config


@pytest.mark.parametrize(
    ("given", "scale", "expected"),
    [
        (None, None, {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}),
        (None, "128", {"loss_scale": 128.0}),
        ({"enabled": "auto", "loss_scale": 64, "hysteresis": 2}, None, {"loss_scale": 64, "hysteresis": 2}),
        ({"enabled": "auto", "loss_scale": 64}, "128", {"loss_scale": 128.0}),
    ],
)
def test_o2_of_deepspeed_in_float16_has_our_loss_scale(given, scale, expected):
    precision = choose_precision(True, False, "O2", scale)
    config = sharding.deepspeed_config(ZERO | ({"fp16": given} if given else {}), precision, scale is not None)
    assert expected.items() <= config["fp16"].items() and config["fp16"]["enabled"] is True


def test_a_half_type_with_deepspeed_means_o2(monkeypatch):
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    args = flags(deepspeed=json.dumps(ZERO), bf16=True)
    sharding.take_up_launcher(args)
    assert (args.deepspeed, args.fp16_opt_level) == (ZERO, "O2")
    args = flags(deepspeed=ZERO, bf16=True, fp16_opt_level="O1")
    sharding.take_up_launcher(args)
    assert args.fp16_opt_level == "O1"


def test_parameters_are_counted_where_a_rank_has_none_of_them():
    model = torch.nn.Linear(3, 2)
    assert sharding.parameter_count(model) == 8
    model.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    model.weight.ds_numel = 6
    assert sharding.parameter_count(model) == 8
