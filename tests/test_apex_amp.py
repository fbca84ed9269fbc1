"""--half_precision_backend apex, against the stand-in in tests/apex_stand_in. Ascend's apex itself has not been run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, TINY_GPT2, log_history, losses, results, run_distributed, run_script, run_warm
from test_doctor import LAYOUTS
from torch import nn

from utils import apex_backend, arguments
from utils.apex_amp import ApexScaler
from utils.data_arguments import CausalDataArguments
from utils.errors import UsageError

STAND_IN = str(ROOT / "tests" / "apex_stand_in")
TYPES = (arguments.ModelArguments, CausalDataArguments, arguments.LanguageModelingArguments)
SHORT = "--block_size 32 --per_device_train_batch_size 4 --max_steps 6 --logging_steps 1 --learning_rate 2e-3".split()
APEX = ["--half_precision_backend", "apex", "--fp16", "--fp16_opt_level", "O2", "--use_combine_grad"]


def train(*runs: dict, **environment: str) -> list[dict]:
    """What each of the runs came to, in one process that sees the stand-in: see apex_worker.py."""
    words = ["tests/apex_worker.py", json.dumps(runs, default=str)]
    done = run_warm(words, PYTHONPATH=STAND_IN, **environment)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def calls(log: Path, *leave_out: str) -> list[dict]:
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [entry for entry in entries if entry["call"] not in leave_out]


@pytest.fixture(scope="module")
def command(corpus, tmp_path_factory) -> tuple[Path, Path, str]:
    """A run by the command line with apex: its folder, the log of calls, what it said."""
    folder = tmp_path_factory.mktemp("apex")
    done = run_script(
        "run_clm.py", *TINY_GPT2, "--train_file", corpus / "train.txt", "--validation_file", corpus / "validation.txt",
        *SHORT, *APEX, "--do_train", "--do_eval", "--output_dir", folder / "output",
        PYTHONPATH=STAND_IN, APEX_STAND_IN_LOG=str(folder / "log"),
    )  # fmt: skip
    return folder / "output", folder / "log", done.stdout


# ---- where Ascend's apex is installed ----
def test_the_command_line_trains_near_native(command, corpus, tmp_path):
    output, _, said = command
    assert "mixed precision O2 by Ascend's apex, with NpuFusedAdamW" in said and "is now native" not in said
    run_script(
        "run_clm.py", *TINY_GPT2, "--train_file", corpus / "train.txt", "--validation_file", corpus / "validation.txt",
        *SHORT, *APEX, "--half_precision_backend", "native", "--do_train", "--do_eval", "--output_dir", tmp_path,
        PYTHONPATH=STAND_IN, APEX_STAND_IN_LOG=str(tmp_path / "log"),
    )  # fmt: skip
    assert not (tmp_path / "log").exists(), "native calls nothing of apex"
    assert losses(output) == pytest.approx(losses(tmp_path), rel=2e-2)
    assert losses(output)[-1] < losses(output)[0] - 0.1
    assert results(output)["eval_loss"] == pytest.approx(results(tmp_path)["eval_loss"], rel=2e-2)


def test_the_calls_are_those_that_are_documented(command):
    output, log, _ = command
    made = calls(log, "state_dict")
    assert made[0] == {
        "call": "initialize",
        "opt_level": "O2",
        "loss_scale": "dynamic",
        "combine_grad": True,
        "optimizer": "NpuFusedAdamW",
    }
    names = [entry["call"] for entry in made[1:]]
    step = ["scale_loss", "clip_optimizer_grad_norm_fused", "step", "zero_grad"]
    assert names[:2] == ["zero_grad", "zero_grad"]  # for the masters; Trainer's own at the start
    assert names[2:7] == [step[0], "combine", *step[1:]]
    assert names[7:] == step * 5
    clips = [entry for entry in made if entry["call"] == "clip_optimizer_grad_norm_fused"]
    assert all(entry["max_norm"] == 1.0 for entry in clips)
    norms = [entry["grad_norm"] for entry in log_history(output) if "grad_norm" in entry]
    assert norms == pytest.approx([entry["norm"] for entry in clips])


def test_the_log_carries_scale_and_skipped_steps(command):
    history = [entry for entry in log_history(command[0]) if "loss" in entry]
    assert [(entry["loss_scale"], entry["skipped_steps"]) for entry in history] == [(65536.0, 0)] * 6


LEVELS = {
    "O1": {"fp16_opt_level": "O1"},
    "O1-combined": {"fp16_opt_level": "O1", "use_combine_grad": True},
    "O2": {"fp16_opt_level": "O2"},
    "O2-combined": {"fp16_opt_level": "O2", "use_combine_grad": True},
}


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_each_level_trains_clips_and_accumulates_as_native_does(tmp_path, level):
    """With SGD, whose steps are as long as the gradients: without clipping the losses would be others."""
    clipped = {"optim": "sgd", "learning_rate": 2.0, "max_grad_norm": 0.05, "gradient_accumulation_steps": 2}
    names = [level, f"{level}-combined"]
    runs = [{"folder": tmp_path / "native", "options": LEVELS[level] | clipped}]
    for name in names:
        options = LEVELS[name] | clipped | {"half_precision_backend": "apex"}
        runs.append({"folder": tmp_path / name, "options": options})
        runs.append({"folder": tmp_path / f"{name}-free", "options": options | {"max_grad_norm": 0.0}})
    native, *others = train(*runs)
    assert native["backend"] == "native"
    for clipped, free in (others[:2], others[2:]):
        assert (clipped["backend"], clipped["optimizer"]) == ("apex", "SGD")
        assert clipped["losses"] == pytest.approx(native["losses"], rel=2e-3)
        assert clipped["norms"] == pytest.approx(native["norms"], rel=2e-2)
        assert free["norms"][0] == pytest.approx(native["norms"][0], rel=1e-2)  # logged without clipping too
        assert free["losses"] != pytest.approx(native["losses"], rel=2e-2)
        half = "torch.float16" if level == "O2" else "torch.float32"
        assert (clipped["weight"], clipped["norm"]) == (half, half), "apex's O2 casts layer norms too"
        assert clipped["autocast"] == [False], "apex casts by itself"
        assert clipped["saved"] == "torch.float32"
        assert clipped["eval_loss_of_saved"] == pytest.approx(clipped["eval_loss"], rel=5e-3)


@pytest.mark.parametrize("combine", [True, False])
def test_an_overflow_skips_the_step_and_holds_the_scheduler(tmp_path, combine):
    options = {"half_precision_backend": "apex", "fp16_opt_level": "O2", "use_combine_grad": combine, "max_steps": 5}
    [found] = train(
        {"folder": tmp_path, "options": options, "watch": True},
        APEX_STAND_IN_OVERFLOW="3",
        APEX_STAND_IN_LOG=str(tmp_path / "log"),
    )
    assert found["skipped_steps"] == [0, 0, 1, 1, 1]
    assert found["loss_scales"] == [65536.0, 65536.0, 32768.0, 32768.0, 32768.0]
    assert found["stood_still_in_step_3"] and found["last_epoch"] == 4
    assert found["learning_rates"][2] == found["learning_rates"][3] != found["learning_rates"][4]
    steps = [entry["call"] for entry in calls(tmp_path / "log") if entry["call"] in ("step", "skip")]
    assert steps == ["step", "step", "skip", "step", "step"]


def test_an_overflow_in_any_micro_batch_skips_the_step(tmp_path):
    options = {"half_precision_backend": "apex", "fp16_opt_level": "O2", "use_combine_grad": True}
    options |= {"gradient_accumulation_steps": 2, "max_steps": 4}
    [found] = train({"folder": tmp_path, "options": options, "watch": True}, APEX_STAND_IN_OVERFLOW="5")
    assert found["skipped_steps"] == [0, 0, 1, 1] and found["stood_still_in_step_3"]
    assert found["losses"][-1] < found["losses"][0]


def test_a_checkpoint_resumes_and_changes_backends(tmp_path):
    """Masters, moments, scale and count come back; GradScaler and torch's AdamW can read them, and the other way."""
    native = {"fp16_opt_level": "O2", "use_combine_grad": True, "learning_rate": 3e-3}
    apex = native | {"half_precision_backend": "apex"}
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole, _ = train(
        {"folder": tmp_path / "apex", "options": apex | saving},
        {"folder": tmp_path / "native", "options": native | saving},
        APEX_STAND_IN_OVERFLOW="2",
    )
    scaler = torch.load(tmp_path / "apex" / "checkpoint-4" / "scaler.pt", weights_only=True)
    assert (scaler["scale"], scaler["_growth_tracker"], scaler["skipped_steps"]) == (32768.0, 2, 1)
    from_apex, from_native = (tmp_path / name / "checkpoint-4" for name in ("apex", "native"))
    resumed, crossed, back = train(
        {"folder": tmp_path / "1", "options": apex, "resume": from_apex, "seed": 9},
        {"folder": tmp_path / "2", "options": native, "resume": from_apex, "seed": 9},
        {"folder": tmp_path / "3", "options": apex, "resume": from_native, "seed": 9},
        APEX_STAND_IN_LOG=str(tmp_path / "log"),
    )
    assert resumed["losses"] == whole["losses"], "bit for bit"
    assert crossed["losses"] == pytest.approx(whole["losses"], rel=2e-2)
    assert resumed["loss_scales"][-4:] == crossed["loss_scales"][-4:] == [32768.0] * 4
    assert resumed["skipped_steps"][-4:] == crossed["skipped_steps"][-4:] == [1] * 4
    assert back["losses"][-1] < back["losses"][0] and back["loss_scales"][-1] == 65536.0
    loads = [entry["state"]["loss_scaler0"] for entry in calls(tmp_path / "log") if entry["call"] == "load_state_dict"]
    assert loads == [{"loss_scale": 32768.0, "unskipped": 2}, {"loss_scale": 65536.0, "unskipped": 4}]


def test_the_best_model_is_loaded_into_the_masters(tmp_path):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2}
    best |= {"eval_steps": 2, "learning_rate": 1.0, "metric_for_best_model": "accuracy", **LEVELS["O2-combined"]}
    [found] = train({"folder": tmp_path, "options": best | {"half_precision_backend": "apex"}})
    from safetensors.torch import load_file

    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    saved = load_file(Path(state["best_model_checkpoint"]) / "model.safetensors")
    final, last = (load_file(tmp_path / name / "model.safetensors") for name in ("final", "checkpoint-8"))
    assert all(torch.equal(saved[name], final[name]) for name in saved)
    assert not all(torch.equal(last[name], final[name]) for name in saved)
    assert found["eval_loss"] == pytest.approx(found["eval_loss_of_saved"], rel=5e-3)


def test_two_processes_share_the_work(command, corpus, tmp_path):
    half = ["--per_device_train_batch_size", "2"]
    run_distributed(
        "run_clm.py", *TINY_GPT2, "--train_file", corpus / "train.txt", *SHORT, *half, *APEX, "--do_train",
        "--output_dir", tmp_path, PYTHONPATH=STAND_IN, APEX_STAND_IN_LOG=str(tmp_path / "log"),
    )  # fmt: skip
    assert losses(tmp_path) == pytest.approx(losses(command[0]), rel=2e-2)
    assert [entry["call"] for entry in calls(tmp_path / "log")].count("initialize") == 2


def test_a_head_on_predicted_rows_takes_its_outputs_by_name(corpus, tmp_path):
    """apex's O2 makes a plain dict of a model's outputs."""
    run_script(
        "run_mlm.py", "--model_type", "bert", "--config_overrides",
        "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64", "--vocab_size", 600,
        "--train_file", corpus / "train.txt", "--validation_file", corpus / "validation.txt", "--max_seq_length", 32,
        *SHORT[2:], "--learning_rate", 1e-2, *APEX, "--do_train", "--do_eval", "--output_dir", tmp_path,
        PYTHONPATH=STAND_IN,
    )  # fmt: skip
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.1 and results(tmp_path)["eval_loss"] < 7


# ---- where apex cannot be used ----
def parse(tmp_path, *words: str):
    """(LanguageModelingArguments, notes) of a command line."""
    needed = ["--model_type", "gpt2", "--train_file", "a.txt", "--output_dir", str(tmp_path), "--use_cpu"]
    (_, _, args), notes = arguments.parse(TYPES, [*needed, *words])
    return args, notes + args.notes


@pytest.mark.parametrize("flag", ["--half_precision_backend", "--fp16_backend"])
@pytest.mark.parametrize("value", ["auto", "native", "cuda_amp", "cpu_amp"])
def test_these_words_mean_native(tmp_path, monkeypatch, flag, value):
    monkeypatch.syspath_prepend(STAND_IN)
    args, notes = parse(tmp_path, flag, value, "--fp16", "--do_train")
    assert args.half_precision_backend == "native"
    old = [word for word in (flag, value) if word in ("--fp16_backend", "cuda_amp", "cpu_amp")]
    assert len(notes) == len(old) and all(any(word in note for note in notes) for word in old)


def test_native_is_the_default_where_ascends_apex_is_installed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(STAND_IN)
    assert apex_backend.installed().kind == "ascend"
    assert parse(tmp_path, "--fp16", "--do_train")[0].half_precision_backend == "native"
    args, notes = parse(tmp_path, "--fp16", "--do_train", "--fp16_backend", "apex")
    assert args.half_precision_backend == "apex"
    assert notes == ["--fp16_backend is now --half_precision_backend"]


EXPLANATIONS = {
    "nvidia": "NVIDIA's apex, with amp but without combine_grad",
    "nvidia-without-amp": "NVIDIA's apex of May 2025 or later, which has no amp any more",
    "unrelated": "another program of that name",
    None: "apex is not installed, and not needed",
}


@pytest.mark.parametrize("kind", EXPLANATIONS)
def test_another_apex_is_explained_once_and_precision_is_native(tmp_path, monkeypatch, kind):
    for name, content in LAYOUTS.get(kind, {}).items():
        path = tmp_path / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    args, [note] = parse(tmp_path / "output", *APEX, "--do_train")
    assert args.half_precision_backend == "native"
    assert note.startswith("--half_precision_backend apex is now native (") and EXPLANATIONS[kind] in note


def test_an_unusable_apex_does_not_stop_the_run(corpus, tmp_path):
    for name in ("optimizers", "normalization"):
        (tmp_path / "path" / "apex" / name).mkdir(parents=True)
    (tmp_path / "path" / "apex" / "__init__.py").write_text("raise RuntimeError('it was imported')")
    done = run_script(
        "run_clm.py", *TINY_GPT2, "--train_file", corpus / "train.txt", *SHORT, *APEX, "--do_train",
        "--output_dir", tmp_path / "output", PYTHONPATH=str(tmp_path / "path"),
    )  # fmt: skip
    assert done.stdout.count("is now native (apex is NVIDIA's apex of May 2025 or later") == 1
    assert losses(tmp_path / "output")[-1] < losses(tmp_path / "output")[0] - 0.1


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--bf16 --fp16_opt_level O2 --use_combine_grad --do_train", "this run is bf16 at O2"),
        ("--fp16 --fp16_opt_level O3 --do_train", "this run is fp16 at O3"),
        ("--do_train", "this run is float32 at O0"),
        ("--fp16 --fp16_opt_level O2 --do_eval", "this run only evaluates"),
    ],
)
def test_what_ascends_apex_does_not_do_is_native(tmp_path, monkeypatch, flags, reason):
    monkeypatch.syspath_prepend(STAND_IN)
    args, [note] = parse(tmp_path, "--half_precision_backend", "apex", *flags.split())
    assert args.half_precision_backend == "native" and reason in note


def test_sharded_weights_are_native():
    ascend = "import sys; sys.path.insert(0, 'tests/apex_stand_in'); from utils.apex_backend import why_native; "
    shown = subprocess.run(
        [sys.executable, "-c", ascend + "print(why_native('O1', 'fp16', True, True))"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "FSDP or DeepSpeed" in shown.stdout


def test_an_unknown_backend_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--half_precision_backend mps: choose one of auto, native, apex"):
        parse(tmp_path, "--half_precision_backend", "mps")
    with pytest.raises(UsageError, match="--half_precision_backend mps: choose one of auto, native, apex"):
        arguments.LanguageModelingArguments(output_dir=str(tmp_path), half_precision_backend="mps", use_cpu=True)


def test_an_apex_that_cannot_be_imported_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("import no_such_extension")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="apex cannot be imported .*no_such_extension.*; use .* native"):
        ApexScaler("O2", "dynamic", True)


def test_what_apex_refuses_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(STAND_IN)
    model = nn.Linear(2, 2).half()
    try:
        with pytest.raises(UsageError, match="--half_precision_backend apex: Found param weight .*; use .* native"):
            ApexScaler("O2", "dynamic", True).initialize(model, torch.optim.AdamW(model.parameters()))
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
            del sys.modules[name]
