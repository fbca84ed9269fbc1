"""The three scripts on the simulated NPU, in subprocesses, beside the same runs on the CPU. No NPU is involved."""

import ast
import json
import shutil

import pytest
from commands import losses, one_error_line, results
from small_runs import FAMILIES, as_users_run_it, command, on_cpu, on_npu, readme_commands, simulated
from stand_in_hub import StandInHub, client_environment, make_small_wikitext, make_tiny_gpt2

LEVELS = {
    "O0": [],
    "O1": ["--bf16"],
    "O2": ["--fp16", "--fp16_opt_level", "O2"],
    "O3": ["--bf16", "--fp16_opt_level", "O3"],
}
# 22 samples in batches of 4, and 11 to evaluate in batches of 8: the last batch is smaller than the others.
UNEVEN = [
    "--max_train_samples",
    22,
    "--max_eval_samples",
    11,
    "--per_device_train_batch_size",
    4,
    "--num_train_epochs",
    1,
]


# ---- families and levels ----
@pytest.mark.parametrize(
    ("family", "level", "combined"),
    [
        ("gpt2", "O0", True),
        ("gpt2", "O1", False),
        ("gpt2", "O2", True),
        ("gpt2", "O3", True),
        ("openai-gpt", "O2", False),
        ("bert", "O0", False),
        ("roberta", "O1", True),
        ("albert", "O2", True),
        ("distilbert", "O3", True),
        ("xlnet", "O0", True),
        ("xlnet", "O1", True),
        ("xlnet", "O2", True),
        ("xlnet", "O3", False),
    ],
)
def test_a_family_has_the_cpus_losses_on_the_simulated_npu(corpus, tokenizers, tmp_path, family, level, combined):
    flags = [*UNEVEN, *LEVELS[level], *(["--use_combine_grad"] if combined else [])]
    words = command(family, tokenizers(family), corpus)
    [report] = on_npu(words, tmp_path / "npu", *flags)
    assert report["device"] == "npu:0" and report["tensor_devices"] == ["npu:0"]
    assert any(set(FAMILIES[family].tied) <= set(group) for group in report["tied"]), report["tied"]

    on_cpu(words, tmp_path / "cpu", *flags)
    npu, cpu = results(tmp_path / "npu"), results(tmp_path / "cpu")
    # The arithmetic is the CPU's, but autocast lists other operators there and clipping rounds elsewhere.
    tolerance = {"O0": 1e-5, "O1": 5e-3, "O2": 2e-3, "O3": 5e-3}[level]
    assert len(losses(tmp_path / "npu")) == 6
    assert losses(tmp_path / "npu") == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)
    assert npu["eval_loss"] == pytest.approx(cpu["eval_loss"], rel=tolerance)
    assert npu["eval_samples"] == 11
    assert ("gradient_buffers" in npu) == combined and npu.get("gradient_buffers") == cpu.get("gradient_buffers")
    table = (tmp_path / "npu" / "results.md").read_text()
    assert "| 1p-NPU |" in table and f"| {level} |" in table


# ---- resuming ----
def test_a_resumed_run_on_the_simulated_npu_draws_the_same_random_numbers(corpus, tokenizers, tmp_path):
    """With dropout: the device's generator is saved, restored, and rewound for what checkpointing computes again."""
    words = command("gpt2", tokenizers("gpt2"), corpus, dropout=True)
    words += ["--fp16", "--fp16_opt_level", "O2", "--use_combine_grad", "--max_eval_samples", "8"]
    words += ["--per_device_train_batch_size", "4", "--max_steps", "6", "--save_steps", "3"]
    on_npu(words, tmp_path / "plain")
    words += ["--gradient_checkpointing"]
    on_npu(words, tmp_path / "run")
    whole = losses(tmp_path / "run")
    assert whole == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)

    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "finished": False}))
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    [report] = on_npu(words, tmp_path / "run")
    assert losses(tmp_path / "run") == whole
    assert report["tensor_devices"] == ["npu:0"]

    # What was trained there can be used where there is no NPU.
    evaluation = [
        "run_clm.py",
        "--model_name_or_path",
        tmp_path / "run",
        "--validation_file",
        corpus / "validation.txt",
    ]
    evaluation += ["--block_size", 32, "--max_eval_samples", 8, "--do_eval"]
    on_cpu(evaluation, tmp_path / "cpu")
    assert results(tmp_path / "cpu")["eval_loss"] == pytest.approx(results(tmp_path / "run")["eval_loss"], rel=2e-3)


# ---- several processes ----
@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("gpt2", ["--use_combine_grad"]),
        ("gpt2", []),
        ("bert", ["--use_combine_grad"]),
        ("xlnet", ["--use_combine_grad"]),
    ],
    ids=["gpt2-combined", "gpt2", "bert-combined", "xlnet-combined"],
)
def test_two_ranks_on_two_simulated_npus_have_the_losses_of_one_cpu(corpus, tokenizers, tmp_path, family, flags):
    words = [*command(family, tokenizers(family), corpus), *flags, "--max_steps", 5, "--max_eval_samples", 11]
    reports = on_npu(words, tmp_path / "npu", "--per_device_train_batch_size", 2, processes=2)
    assert [report["device"] for report in reports] == ["npu:0", "npu:1"]
    assert [report["tensor_devices"] for report in reports] == [["npu:0"], ["npu:1"]]
    assert {report["backend"] for report in reports} == {"hccl"}

    on_cpu(words, tmp_path / "cpu", "--per_device_train_batch_size", 4)
    assert losses(tmp_path / "npu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)
    npu, cpu = results(tmp_path / "npu"), results(tmp_path / "cpu")
    assert npu["eval_loss"] == pytest.approx(cpu["eval_loss"], rel=1e-4) and npu["eval_samples"] == 11
    assert "| 2p-NPU |" in (tmp_path / "npu" / "results.md").read_text()


# ---- the README's commands ----
@pytest.fixture(scope="session")
def hub(tokenizers, tmp_path_factory):
    """The environment of a client of a stand-in hub that serves small models and data under the README's names."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    root = tmp_path_factory.mktemp("hub")
    make_tiny_gpt2(root / "models" / "openai-community" / "gpt2")
    make_small_wikitext(root / "datasets" / "Salesforce" / "wikitext")
    for family, name, kind in (
        ("roberta", "FacebookAI/roberta-base", AutoModelForMaskedLM),
        ("xlnet", "xlnet/xlnet-base-cased", AutoModelForCausalLM),
    ):
        tokenizer = AutoTokenizer.from_pretrained(tokenizers(family), model_max_length=64)
        settings = dict(setting.split("=") for setting in FAMILIES[family].overrides().split(","))
        config = CONFIG_MAPPING[family](**{name: ast.literal_eval(value) for name, value in settings.items()})
        kind.from_config(config).save_pretrained(root / "models" / name)
        tokenizer.save_pretrained(root / "models" / name)
    aliases = {"roberta-base": "FacebookAI/roberta-base", "xlnet-base-cased": "xlnet/xlnet-base-cased"}
    with StandInHub(root, aliases) as server:
        yield client_environment(server.url, tmp_path_factory.mktemp("home"), HF_HUB_OFFLINE="0")


@pytest.mark.parametrize(
    ("script", "processes"), [("run_clm.py", 1), ("run_clm.py", 2), ("run_mlm.py", 1), ("run_plm.py", 1)]
)
def test_the_readmes_command_on_simulated_npus(hub, tmp_path, script, processes):
    with_hub = [words for words in readme_commands(script) if "--dataset_name" in words]
    words = with_hub[-1 if processes > 1 else 0]
    assert {"--fp16", "--use_combine_grad", "--do_eval"} < set(words) and words[-2] == "--output_dir"
    words[-1] = tmp_path / "output"
    as_users_run_it(words, processes, **hub | simulated(processes))
    found = results(tmp_path / "output")
    assert found["epoch"] == 3.0 and found["eval_accuracy"] > 0
    table = (tmp_path / "output" / "results.md").read_text()
    assert f"| {processes}p-NPU |" in table and "| O2 | 3 |" in table


# ---- devices that are not there, or taken ----
@pytest.fixture
def short_run(corpus, tokenizers, tmp_path):
    words = command("gpt2", tokenizers("gpt2"), corpus)
    return [*words, "--max_steps", 1, "--max_eval_samples", 8, "--output_dir", tmp_path / "output"]


def test_a_machine_without_a_simulated_npu_says_so_and_trains_on_its_cpu_if_told_to(short_run, tmp_path):
    done = as_users_run_it(short_run, expect=2, **simulated(devices=0))
    line = one_error_line(done)
    assert "finds no NPU" in line and "--use_cpu" in line
    as_users_run_it([*short_run, "--use_cpu"], **simulated(devices=0))
    assert "| 1p-CPU |" in (tmp_path / "output" / "results.md").read_text()


def test_use_cpu_leaves_a_simulated_npu_alone(short_run, tmp_path):
    as_users_run_it([*short_run, "--use_cpu"], **simulated(NPUSIM_BUSY="0"))
    assert "| 1p-CPU |" in (tmp_path / "output" / "results.md").read_text()


def test_a_busy_simulated_npu_is_one_line_with_a_remedy(short_run):
    line = one_error_line(as_users_run_it(short_run, expect=2, **simulated(NPUSIM_BUSY="0")))
    assert "npu:0" in line and "out of memory" in line and "--device_id" in line


def test_a_busy_simulated_npu_of_the_second_rank_is_named(short_run):
    done = as_users_run_it(short_run, processes=2, expect=1, **simulated(devices=2, NPUSIM_BUSY="1"))
    assert [line for line in done.stderr.splitlines() if "error:" in line and "npu:1" in line], done.stderr


def test_device_id_takes_another_simulated_npu(short_run, tmp_path):
    as_users_run_it([*short_run, "--device_id", 1], **simulated(devices=2, NPUSIM_BUSY="0"))
    assert "| 1p-NPU |" in (tmp_path / "output" / "results.md").read_text()


def test_a_device_id_that_does_not_exist_is_one_line(short_run):
    line = one_error_line(as_users_run_it([*short_run, "--device_id", 5], expect=2, **simulated(devices=2)))
    assert "--device_id 5" in line
