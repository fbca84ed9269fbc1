"""FSDP2 and DeepSpeed's ZeRO on two processes of a CPU, beside plain data parallelism on the same samples."""

import json
import math
import sys
from pathlib import Path

import pytest
import sharded_worker
import torch
from commands import ROOT, TINY_GPT2, losses, results, run, run_distributed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from utils.objectives import causal

FSDP_CASES = [name for name in sharded_worker.CASES if name.startswith(("plain", "fsdp"))]
ZERO_CASES = [name for name in sharded_worker.CASES if name.startswith("zero")]
DEEPSPEED = ROOT / ".venv" / "deepspeed"
needs_deepspeed = pytest.mark.skipif(
    not DEEPSPEED.is_dir(), reason="no .venv/deepspeed: scripts/test.sh installs it there"
)
WITH_DEEPSPEED = {"PYTHONPATH": str(DEEPSPEED), "DS_ACCELERATOR": "cpu"}


def run_cases(folder: Path, cases: list[str], **environment: str) -> dict[str, list[dict]]:
    """case -> what each rank found."""
    run_distributed("tests/sharded_worker.py", folder, *cases, **environment)
    return {case: [json.loads((folder / f"{case}.{rank}.json").read_text()) for rank in (0, 1)] for case in cases}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def fsdp(folder) -> dict[str, list[dict]]:
    return run_cases(folder, [*FSDP_CASES, "fsdp_full_resumed", "fsdp_sharded_resumed", "fsdp_fp16_resumed"])


@pytest.fixture(scope="module")
def zero(folder) -> dict[str, list[dict]]:
    return run_cases(folder, [*ZERO_CASES, "zero1_resumed", "zero2_resumed", "zero3_resumed"], **WITH_DEEPSPEED)


def loss_in_this_process(folder: Path) -> float:
    """The evaluation's loss of a saved model, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = sharded_worker.Blocks(3, seed=2)
    batch = causal.collate([blocks[index] for index in range(len(blocks))])
    with torch.no_grad():
        return model(**batch).loss.item()


def difference(one: Path, other: Path) -> float:
    """The greatest between two saved models' weights."""
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


def test_fsdp_trains_as_plain_data_parallelism_does(fsdp, folder):
    """In float32: losses to 1e-6, weights to 1e-5, for AdamW divides by a gradient's size; each rank holds half of them."""
    [plain, _], [sharded, other] = fsdp["plain"], fsdp["fsdp"]
    assert sharded["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert sharded["norms"] == pytest.approx(plain["norms"], rel=1e-5)
    assert sharded["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    assert difference(folder / "plain", folder / "fsdp") < 1e-5
    assert sharded["shard"] + other["shard"] == plain["shard"]


@pytest.mark.parametrize("family", sharded_worker.FAMILIES)
def test_fsdp_trains_every_family(fsdp, folder, family):
    """What it leaves has the names that transformers gives the weights, and their values to 1e-5."""
    [plain, _], [sharded, other] = fsdp[f"plain:{family}"], fsdp[f"fsdp:{family}"]
    assert sharded["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert sharded["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert difference(folder / f"plain:{family}", folder / f"fsdp:{family}") < 1e-5
    assert abs(sharded["shard"] - other["shard"]) < 0.05 * plain["shard"]


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_fsdp_in_bf16_stays_near_float32(fsdp, level):
    """bf16 keeps 8 bits: to 1 %, and not the same."""
    expected = fsdp["fsdp"][0]["losses"]
    found = fsdp[f"fsdp_{level}"][0]["losses"]
    assert found == pytest.approx(expected, rel=1e-2) and found != expected


def test_fsdp_says_what_becomes_of_our_options(fsdp):
    first, second = fsdp["fsdp_O2"][0]["notes"]
    assert "--use_combine_grad: --fsdp keeps gradients in flat buffers" in first
    assert "--fp16_opt_level O2 is --fsdp's own mixed precision" in second


@pytest.mark.parametrize("case", ["fsdp", "fsdp_O2", "fsdp_sharded"])
def test_the_model_that_fsdp_leaves_loads_in_transformers(fsdp, folder, case):
    tolerance = 1e-2 if case == "fsdp_O2" else 1e-6
    assert loss_in_this_process(folder / case) == pytest.approx(fsdp[case][0]["eval_loss"], rel=tolerance)
    weights = load_file(folder / case / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert json.loads((folder / case / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


def test_a_checkpoint_of_fsdp_loads_in_transformers_where_its_state_is_whole(fsdp, folder):
    assert difference(folder / "fsdp_full" / f"checkpoint-{sharded_worker.STEPS}", folder / "fsdp_full") == 0


@pytest.mark.parametrize("case", ["fsdp_full", "fsdp_sharded", "fsdp_fp16"])
def test_fsdp_goes_on_bit_for_bit(fsdp, folder, case):
    [whole, _], [resumed, _] = fsdp[case], fsdp[f"{case}_resumed"]
    assert resumed["losses"] == whole["losses"]
    assert difference(folder / case, folder / f"{case}_resumed") == 0


def test_a_sharded_checkpoint_has_a_file_of_each_rank(fsdp, folder):
    checkpoint = folder / "fsdp_sharded" / f"checkpoint-{sharded_worker.STEPS}"
    manifest = json.loads((checkpoint / "manifest.json").read_text())["files"]
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        assert {f"{part}/__{rank}_0.distcp" for rank in (0, 1)} <= manifest.keys()
    assert "model.safetensors" not in manifest


def test_an_overflow_in_the_shard_of_one_rank_skips_the_step_on_all(fsdp):
    """In float16 by the loss scaler, in float32 by --max_bad_steps: the weights stay, so losses are finite."""
    for rank in fsdp["fsdp_overflow"]:
        assert rank["skipped_steps"] == 1
    for rank in fsdp["fsdp_float32_overflow"]:
        assert rank["bad_steps"] == 1
    for case in ("fsdp_overflow", "fsdp_float32_overflow"):
        assert all(math.isfinite(number) for number in [*fsdp[case][0]["losses"], fsdp[case][0]["eval_loss"]])


def test_fsdp_evaluates_where_nothing_was_trained(fsdp):
    import tiny

    blocks = sharded_worker.Blocks(3, seed=2)
    batch = causal.collate([blocks[index] for index in range(len(blocks))])
    with torch.no_grad():
        expected = tiny.gpt2()(**batch).loss.item()
    assert fsdp["fsdp_evaluated"][0]["eval_loss"] == pytest.approx(expected, rel=1e-6)


# ---- DeepSpeed ----
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_as_plain_data_parallelism_does(fsdp, zero, folder, stage):
    [plain, _], [sharded, _] = fsdp["plain"], zero[f"zero{stage}"]
    assert sharded["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert sharded["norms"] == pytest.approx(plain["norms"], rel=1e-5)
    assert sharded["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    assert loss_in_this_process(folder / f"zero{stage}") == pytest.approx(sharded["eval_loss"], rel=1e-6)


@needs_deepspeed
@pytest.mark.parametrize("family", sharded_worker.FAMILIES)
def test_zero_3_trains_every_family_from_the_same_weights(fsdp, zero, folder, family):
    plain, sharded = fsdp[f"plain:{family}"][0], zero[f"zero3:{family}"][0]
    assert sharded["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert difference(folder / f"plain:{family}", folder / f"zero3:{family}") < 1e-5


@needs_deepspeed
@pytest.mark.parametrize("case", ["zero2_O1", "zero2_O2"])
def test_zero_in_half_precision_stays_near_float32(zero, case):
    expected = zero["zero2"][0]["losses"]
    found = zero[case][0]["losses"]
    assert found == pytest.approx(expected, rel=1e-2) and found != expected
    assert zero[case][0]["skipped_steps"] == 0


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_goes_on_bit_for_bit(zero, folder, stage):
    case = f"zero{stage}"
    assert zero[f"{case}_resumed"][0]["losses"] == zero[case][0]["losses"]
    assert difference(folder / case, folder / f"{case}_resumed") == 0


# ---- as a user runs it ----
SCRIPT = [
    *TINY_GPT2, "--block_size", 32, "--per_device_train_batch_size", 4, "--max_steps", 4, "--logging_steps", 1,
    "--save_steps", 2, "--do_train", "--do_eval", "--fp16_opt_level", "O2", "--use_combine_grad", "--use_cpu",
]  # fmt: skip
ACCELERATE_LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
    "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    "--fsdp_state_dict_type", "FULL_STATE_DICT", "--mixed_precision", "bf16", "--dynamo_backend", "no",
    "--main_process_port", "0",
]  # fmt: skip


def test_run_clm_goes_on_by_another_launcher(files, tmp_path):
    """torchrun with --fsdp begins, `accelerate launch` goes on from the first checkpoint: to the last bit the same run."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    words = [*SCRIPT, *files]
    done = run_distributed("run_clm.py", *words, "--bf16", "--fsdp", "--output_dir", whole)
    assert "--use_combine_grad: --fsdp keeps gradients in flat buffers" in done.stderr + done.stdout
    assert results(whole)["eval_loss"] > 0
    words += ["--resume_from_checkpoint", whole / "checkpoint-2", "--output_dir", resumed]
    done = run([*ACCELERATE_LAUNCH, "run_clm.py", *map(str, words)])
    assert done.returncode == 0, done.stderr[-4000:]
    assert "--fp16_opt_level O2 is --fsdp's own mixed precision" in done.stderr + done.stdout
    assert losses(resumed) == losses(whole)
    assert difference(resumed, whole) == 0
    AutoModelForCausalLM.from_pretrained(resumed)


@needs_deepspeed
def test_run_clm_with_deepspeed(files, tmp_path):
    """ZeRO 2 in bfloat16; what is left loads in transformers, in the type that DeepSpeed computed in."""
    words = [
        *SCRIPT,
        *files,
        "--bf16",
        "--deepspeed",
        '{"zero_optimization": {"stage": 2}}',
        "--output_dir",
        tmp_path / "o",
    ]
    done = run_distributed("tests/deepspeed_script.py", "run_clm.py", *words, **WITH_DEEPSPEED)
    assert "--use_combine_grad: --deepspeed keeps gradients in flat buffers" in done.stderr + done.stdout
    assert losses(tmp_path / "o")[-1] < losses(tmp_path / "o")[0] and results(tmp_path / "o")["eval_loss"] > 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "o").dtype == torch.bfloat16
