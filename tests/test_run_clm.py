"""run_clm.py as a user runs it, in subprocesses."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from commands import SHARED, TINY_GPT2, losses, one_error_line, results, run, run_distributed, run_script
from stand_in_hub import StandInHub, client_environment, make_small_wikitext, make_tiny_gpt2

SHORT = [
    "--block_size",
    32,
    "--per_device_train_batch_size",
    4,
    "--max_steps",
    6,
    "--logging_steps",
    1,
    "--learning_rate",
    2e-3,
]


def clm(*arguments, expect: int = 0, processes: int = 1, **environment):
    if processes > 1:
        return run_distributed("run_clm.py", *arguments, processes=processes, expect=expect, **environment)
    return run_script("run_clm.py", *arguments, expect=expect, **environment)


@pytest.fixture(scope="session")
def files(corpus) -> list:
    return ["--train_file", corpus / "train.txt", "--validation_file", corpus / "validation.txt"]


@pytest.fixture(scope="session")
def trained(files, tmp_path_factory) -> Path:
    """The folder of a finished run, whose model the others start from."""
    folder = tmp_path_factory.mktemp("trained") / "output"
    done = clm(*TINY_GPT2, *files, *SHORT, "--do_train", "--do_eval", "--use_combine_grad", "--output_dir", folder)
    (folder.parent / "stdout").write_text(done.stdout)
    (folder.parent / "stderr").write_text(done.stderr)
    return folder


# ---- outputs ----
def test_the_output_folder_holds_what_transformers_script_leaves(trained):
    expected = {
        "all_results.json",
        "train_results.json",
        "eval_results.json",
        "trainer_state.json",
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_args.bin",
        "README.md",
        "results.md",
        "checkpoint-6",
    }
    assert expected <= {entry.name for entry in trained.iterdir()}
    assert "generated_from_trainer" in (trained / "README.md").read_text()


def test_results_have_transformers_keys_and_ours(trained):
    found = results(trained)
    assert {
        "train_runtime",
        "train_loss",
        "train_samples",
        "train_samples_per_second",
        "eval_loss",
        "eval_accuracy",
        "eval_samples",
        "perplexity",
        "epoch",
        "fps",
        "tokens_per_second",
        "gradient_buffers",
    } <= set(found)
    from safetensors import safe_open

    with safe_open(trained / "model.safetensors", "pt") as weights:
        elements = sum(weights.get_tensor(name).numel() for name in weights.keys())
    assert found["gradient_buffers"] == {"float32": elements}
    assert found["fps"] > 0 and found["tokens_per_second"] == pytest.approx(32 * found["fps"], rel=1e-2)


def test_the_results_row_is_in_the_file_and_at_the_end_of_the_log(trained):
    table = (trained / "results.md").read_text().strip()
    header, _, row = table.splitlines()
    assert header == "| Device | Acc | FPS | AMP_Type | Epochs |"
    accuracy = results(trained)["eval_accuracy"]
    assert row.startswith(f"| 1p-CPU | {accuracy:.4f} | ") and "| O0 |" in row
    assert (trained.parent / "stdout").read_text().strip().endswith(table)


def test_a_file_has_the_log_and_nothing_that_moves(trained):
    said = (trained.parent / "stdout").read_text()
    assert "training from step 0 to 6, with " in said
    assert "[INFO|" not in said and "%|" not in said + (trained.parent / "stderr").read_text()


def test_training_lowers_the_loss(trained):
    assert losses(trained)[-1] < losses(trained)[0]


# ---- the same numbers ----
def test_golden_losses(corpus, tmp_path):
    """Rung 6 of the numerics ladder: 20 steps on the sample corpus. A change of these numbers wants a reason."""
    clm(
        *TINY_GPT2,
        "--train_file",
        corpus / "train.txt",
        *SHORT,
        "--max_steps",
        20,
        "--do_train",
        "--output_dir",
        tmp_path,
    )
    golden = json.loads((Path(__file__).parent / "data" / "golden_losses_clm.json").read_text())
    assert losses(tmp_path) == pytest.approx(golden, abs=2e-4)


def test_the_numbers_are_those_of_transformers_recipe(corpus, tmp_path):
    """Weights, blocks, their order and dropout as in transformers' run_clm.py, written here in the stock way."""
    from itertools import chain

    import datasets
    from transformers import (
        CONFIG_MAPPING,
        AutoModelForCausalLM,
        AutoTokenizer,
        Trainer,
        TrainingArguments,
        default_data_collator,
        set_seed,
    )

    options = {"per_device_train_batch_size": 4, "max_steps": 12, "logging_steps": 1, "seed": 7, "learning_rate": 2e-3}
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    ours, folder = tmp_path / "ours", tmp_path / "stock"
    clm(
        *TINY_GPT2,
        "--train_file",
        corpus / "train.txt",
        *flags,
        "--block_size",
        32,
        "--do_train",
        "--output_dir",
        ours,
    )

    config = CONFIG_MAPPING["gpt2"]()
    config.update_from_string(TINY_GPT2[-1])
    tokenizer = AutoTokenizer.from_pretrained(ours)
    config.vocab_size, config.bos_token_id, config.eos_token_id = (
        len(tokenizer),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, save_strategy="no", **options)
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config)
    lines = datasets.load_dataset(
        "text",
        data_files=str(corpus / "train.txt"),
        split="train[5%:]",
        keep_linebreaks=True,
        cache_dir=str(tmp_path / "cache"),
    )
    tokens = lines.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=["text"])

    def group(batch):
        joined = {name: list(chain(*rows)) for name, rows in batch.items()}
        end = len(joined["input_ids"]) // 32 * 32
        cut = {name: [ids[i : i + 32] for i in range(0, end, 32)] for name, ids in joined.items()}
        return {**cut, "labels": cut["input_ids"].copy()}

    trainer = Trainer(
        model=model, args=args, train_dataset=tokens.map(group, batched=True), data_collator=default_data_collator
    )
    trainer.train()
    stock = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses(ours) == pytest.approx(stock, rel=1e-6)


def test_a_fine_tune_goes_on_where_the_checkpoint_was(trained, files, tmp_path):
    clm("--model_name_or_path", trained, *files, "--block_size", 32, "--do_eval", "--output_dir", tmp_path / "eval")
    before, now = results(trained), results(tmp_path / "eval")
    assert now["eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-6)
    assert now["eval_accuracy"] == pytest.approx(before["eval_accuracy"], abs=1e-6)
    clm(
        "--model_name_or_path", trained, *files, *SHORT, "--learning_rate", 1e-3,
        "--do_train", "--do_eval", "--output_dir", tmp_path / "tuned",
    )  # fmt: skip
    assert results(tmp_path / "tuned")["eval_loss"] < before["eval_loss"]


# ---- levels, devices, processes ----
@pytest.mark.parametrize("flags", [["--fp16", "--fp16_opt_level", "O2"], ["--bf16", "--fp16_opt_level", "O3"]])
def test_half_precision_with_combined_gradients_from_the_command_line(files, tmp_path, flags):
    done = clm(
        *TINY_GPT2, *files, *SHORT, *flags, "--use_combine_grad", "--do_train", "--do_eval", "--output_dir", tmp_path
    )
    level = flags[-1]
    assert f"| {level} |" in done.stdout
    kind = "float32" if level == "O2" else "bfloat16"
    assert set(results(tmp_path)["gradient_buffers"]) == {kind}
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_gpt_trains_from_scratch(files, tmp_path):
    overrides = "n_embd=32,n_layer=2,n_head=2,n_positions=64,vocab_size=300"
    clm(
        "--model_type", "openai-gpt", "--config_overrides", overrides, *files, *SHORT,
        "--do_train", "--do_eval", "--bf16", "--fp16_opt_level", "O2", "--use_combine_grad", "--output_dir", tmp_path,
    )  # fmt: skip
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    clm("--model_name_or_path", tmp_path, *files, "--block_size", 32, "--do_eval", "--output_dir", tmp_path / "again")
    assert results(tmp_path / "again")["eval_loss"] == pytest.approx(results(tmp_path)["eval_loss"], abs=2e-2)


@pytest.mark.parametrize(
    "flags", [["--use_combine_grad"], [], ["--bf16", "--fp16_opt_level", "O2", "--use_combine_grad"]], ids=len
)
def test_two_processes_without_an_accelerator_share_the_work(files, tmp_path, flags):
    """transformers alone would form no process group here and train both ranks on the same samples."""
    quiet = TINY_GPT2[-1] + ",resid_pdrop=0.0,attn_pdrop=0.0,embd_pdrop=0.0"
    common = [*TINY_GPT2[:-1], quiet, *files, "--block_size", 32, "--learning_rate", 5e-3]
    common += ["--max_steps", 8, "--logging_steps", 1, "--do_train", "--do_eval", *flags]
    clm(*common, "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "two", processes=2)
    clm(*common, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "one")
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    tolerance = 2e-3 if "--bf16" in flags else 1e-4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=tolerance)
    assert losses(tmp_path / "two")[-1] < losses(tmp_path / "two")[0] - 0.2
    assert two["eval_samples"] == one["eval_samples"]
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=tolerance)
    assert "| 2p-CPU |" in (tmp_path / "two" / "results.md").read_text()


def test_one_process_under_torchrun_trains(files, tmp_path):
    """Its device is cpu:0, which is another one than cpu: weights must not be copied out of their flat buffer."""
    command = [*TINY_GPT2, *files, *SHORT, "--do_train", "--use_combine_grad", "--output_dir", tmp_path]
    run_distributed("run_clm.py", *command, processes=1)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.1


def test_a_wrong_world_size_is_refused(files, tmp_path):
    done = clm(*TINY_GPT2, *files, "--do_train", "--output_dir", tmp_path, expect=2, WORLD_SIZE="4")
    assert one_error_line(done).startswith("run_clm.py: error: WORLD_SIZE is 4 but no launcher")


# ---- the output folder ----
@pytest.mark.parametrize(
    "changes, message",
    [
        (["--config_overrides", "n_embd=33,n_layer=2,n_head=2,n_positions=64,vocab_size=300"], "give sizes that fit"),
        (["--vocab_size", 280, "--block_size", 128], "--block_size 128: the model has 64 positions"),
        (["--push_to_hub", "--hub_token", "x"], "the repository cannot be made"),
    ],
)
def test_a_mistake_beside_overwrite_output_dir_leaves_the_old_run_whole(changes, message, trained, files, tmp_path):
    shutil.copytree(trained, tmp_path / "output")
    before = {path: path.read_bytes() for path in (tmp_path / "output").rglob("*") if path.is_file()}
    given = [*TINY_GPT2, *files, *SHORT, "--do_train", "--output_dir", tmp_path / "output", "--overwrite_output_dir"]
    done = clm(*given, *changes, expect=2)
    assert message in one_error_line(done)
    assert {path: path.read_bytes() for path in (tmp_path / "output").rglob("*") if path.is_file()} == before


def test_a_mistake_does_not_claim_the_folder(files, tmp_path):
    given = [*TINY_GPT2, *files, *SHORT, "--do_train", "--output_dir", tmp_path / "output"]
    clm(*given, "--config_overrides", "n_embd=33,n_head=2", expect=2)
    assert not (tmp_path / "output").exists()
    clm(*given)


def test_an_unfinished_run_resumes_and_a_finished_one_says_so(files, tmp_path):
    command = [*TINY_GPT2, *files, *SHORT, "--save_steps", 2, "--do_train", "--output_dir", tmp_path / "output"]
    clm(*command)
    whole = losses(tmp_path / "output")
    record = json.loads((tmp_path / "output" / "run.json").read_text())
    (tmp_path / "output" / "run.json").write_text(json.dumps({**record, "finished": False}))
    for steps in (4, 6):
        shutil.rmtree(tmp_path / "output" / f"checkpoint-{steps}")
    done = clm(*command)
    assert "this run is unfinished; resuming from checkpoint-2" in done.stdout
    assert "missing keys" not in done.stdout + done.stderr  # GPT-2's head is its embedding, which is saved once
    assert losses(tmp_path / "output") == whole
    done = clm(*command)
    assert "this run is finished already" in done.stdout and "--overwrite_output_dir" in done.stdout
    done = clm(*command, "--learning_rate", 1e-5, expect=2)
    assert "--learning_rate 0.002, this one has 1e-05" in one_error_line(done)
    (tmp_path / "output" / "notes.txt").write_text("mine")
    clm(*command, "--learning_rate", 1e-5, "--overwrite_output_dir")
    assert losses(tmp_path / "output") != whole
    assert (tmp_path / "output" / "notes.txt").read_text() == "mine"


# ---- the hub ----
README_COMMAND = [
    "--model_name_or_path", "gpt2",
    "--dataset_name", "wikitext",
    "--dataset_config_name", "wikitext-2-raw-v1",
    "--per_device_train_batch_size", "8",
    "--per_device_eval_batch_size", "8",
    "--do_train",
    "--do_eval",
    "--fp16",
    "--fp16_opt_level", "O2",
    "--use_combine_grad",
]  # fmt: skip


def test_the_readmes_command_word_for_word(tmp_path):
    make_tiny_gpt2(tmp_path / "hub" / "models" / "openai-community" / "gpt2")
    make_small_wikitext(tmp_path / "hub" / "datasets" / "Salesforce" / "wikitext", articles=6)
    words = " ".join(README_COMMAND)
    readme = (Path(__file__).parent.parent / "README.md").read_text().replace(" \\\n    ", " ")
    assert f"python run_clm.py {words} --output_dir ./output" in readme
    with StandInHub(tmp_path / "hub") as hub:
        environment = client_environment(hub.url, tmp_path / "home", HF_HUB_OFFLINE="0")
        clm(*README_COMMAND, "--output_dir", tmp_path / "output", **environment)
    # The hub is gone: the same command runs from the cache, at once.
    done = clm(*README_COMMAND, "--max_steps", 1, "--output_dir", tmp_path / "again", **environment)
    assert "does not answer" in done.stdout and "taking gpt2, wikitext from the cache" in done.stdout
    found = results(tmp_path / "output")
    assert found["epoch"] == 3.0 and found["eval_accuracy"] > 0
    assert "| O2 | 3 |" in (tmp_path / "output" / "results.md").read_text()


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--model_name_or_path", "gpt2", "--train_file", "{train}"], "--model_name_or_path gpt2"),
        (["--model_type", "gpt2", "--dataset_name", "wikitext"], "--dataset_name wikitext"),
        (["--config_name", "gpt2", "--train_file", "{train}"], "--config_name gpt2"),
    ],
)
def test_an_unreachable_hub_is_one_line_with_all_remedies(corpus, tmp_path, flags, name):
    flags = [flag.replace("{train}", str(corpus / "train.txt")) for flag in flags]
    environment = client_environment("http://127.0.0.1:9", tmp_path / "home", HF_HUB_OFFLINE="0")
    done = clm(*flags, "--do_train", "--output_dir", tmp_path / "output", expect=2, **environment)
    line = one_error_line(done)
    assert name in line and "Retrying" not in done.stderr + done.stdout
    assert all(remedy in line for remedy in ("HF_ENDPOINT", "--hub modelscope", "offline cache", "--train_file"))


def test_the_attention_that_was_asked_for(corpus, tmp_path):
    """flash_attention_2 needs a package that is not there: a flag that was ignored would train."""
    command = [*TINY_GPT2, "--train_file", corpus / "train.txt", "--do_train", "--max_steps", 1]
    clm(*command, "--attn_implementation", "eager", "--output_dir", tmp_path / "eager")
    done = clm(*command, "--attn_implementation", "flash_attention_2", "--output_dir", tmp_path / "flash", expect=2)
    assert "--attn_implementation flash_attention_2: " in one_error_line(done)


# ---- bad input ----
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train_file", "missing.txt"], "--train_file missing.txt: no such file"),
        (["--train_file", "tests"], "--train_file tests: is a folder"),
        (["--train_file", "{train}", "--block_size", 128], "--block_size 128: the model has 64 positions"),
        (["--train_file", "{train}", "--tokenizer_name", "{trained}", "--config_overrides", "vocab_size=50"], "vocab_size="),
        (["--train_file", "{train}", "--model_type", "bert", "--config_overrides", "hidden_size=24"], "bert: a model of this kind is trained by run_mlm.py"),
        (["--train_file", "{train}", "--fp16_opt_level", "O2"], "--fp16_opt_level O2 needs a half type"),
        (["--train_file", "{train}", "--use_combine_grad", "--optim", "adafactor"], "--optim adafactor"),
        (["--train_file", "{train}", "--model_type", "gtp2"], "--model_type gtp2"),
        (["--train_file", "{train}", "--learning_rat", "1"], None),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(corpus, trained, tmp_path, flags, words):
    places = {"{train}": str(corpus / "train.txt"), "{trained}": str(trained)}
    flags = [places.get(str(flag), str(flag)) for flag in flags]
    if words is None:  # argparse takes a flag's beginning for the flag
        clm(*TINY_GPT2, *flags, "--do_train", "--max_steps", 1, "--block_size", 32, "--output_dir", tmp_path)
        return
    done = clm(*TINY_GPT2, *flags, "--do_train", "--output_dir", tmp_path / "output", expect=2)
    assert words in one_error_line(done)
    assert not (tmp_path / "output" / "run.json").exists()


@pytest.mark.parametrize("flag", ["--help", "--learnig_rate=1"])
def test_help_and_typos_do_not_wait_for_heavy_imports(flag):
    """Trainer, datasets and evaluate cost more time than the parser: they are imported after parsing."""
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['run_clm.py', '{flag}']\n"
        "try:\n    runpy.run_path('run_clm.py', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "heavy = ('transformers.trainer', 'datasets', 'evaluate')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = run([sys.executable, "-c", program])
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_a_typo_gets_the_nearest_flag(tmp_path):
    done = clm(*TINY_GPT2, "--learnig_rate", "1", expect=2)
    assert "unknown flag --learnig_rate; did you mean --learning_rate?" in one_error_line(done)


def test_debug_shows_the_traceback(tmp_path):
    done = clm(
        *TINY_GPT2,
        "--train_file",
        "missing.txt",
        "--do_train",
        "--output_dir",
        tmp_path,
        "--log_level",
        "debug",
        expect=1,
    )
    assert "Traceback" in done.stderr and "no such file" in done.stderr


def test_old_words_still_work_and_are_noted_once(corpus, tmp_path):
    done = clm(
        *TINY_GPT2, "--train_file", corpus / "train.txt", *SHORT, "--do_train", "--do_eval",
        "--evaluation_strategy", "steps", "--eval_steps", 3, "--no_cuda", "--warmup_ratio", 0.5,
        "--half_precision_backend", "apex", "--optim", "adamw_apex_fused_npu", "--output_dir", tmp_path,
    )  # fmt: skip
    for word in (
        "--evaluation_strategy",
        "--no_cuda",
        "--warmup_ratio",
        "--half_precision_backend",
        "adamw_apex_fused_npu",
    ):
        assert sum(word in line for line in done.stdout.splitlines() if "utils" in line) == 1, word
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_loss" in entry for entry in history) == 3  # twice while training, once at the end
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates == pytest.approx([0, 2e-3 / 3, 4e-3 / 3, 2e-3, 4e-3 / 3, 2e-3 / 3])


# ---- other sources ----
def test_a_stream_trains(corpus, tmp_path):
    clm(
        *TINY_GPT2, "--train_file", corpus / "train.txt", "--streaming", *SHORT, "--do_train", "--do_eval",
        "--max_eval_samples", 8, "--output_dir", tmp_path,
    )  # fmt: skip
    assert len(losses(tmp_path)) == 6 and results(tmp_path)["eval_samples"] == 8


def test_a_config_file_and_flags_over_it(corpus, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"model_type: gpt2\nconfig_overrides: {TINY_GPT2[-1]}\ntrain_file: {corpus / 'train.txt'}\ndo_train: true\n"
        f"block_size: 32\nmax_steps: 9\nlogging_steps: 1\nuse_combine_grad: true\noutput_dir: {tmp_path / 'output'}\n"
    )
    clm(tmp_path / "run.yaml", "--max_steps", 3)
    assert len(losses(tmp_path / "output")) == 3
    assert "gradient_buffers" in results(tmp_path / "output")


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the texts in ../shared/data")
@pytest.mark.parametrize(("family", "bound"), [("gpt2", 8.5), ("openai-gpt", 8.5)])
def test_real_text_with_the_familys_own_tokenizer(tmp_path, family, bound):
    """WikiText-2 raw: trained on the validation split, evaluated on the test split."""
    data = SHARED / "data" / "wikitext-2-raw-v1"
    clm(
        "--model_type", family, "--config_overrides", "n_embd=32,n_layer=2,n_head=2,n_positions=128",
        "--tokenizer_name", SHARED / "data" / "tokenizers" / family,
        "--train_file", data / "wiki.valid.raw", "--validation_file", data / "wiki.test.raw",
        "--block_size", 128, "--max_steps", 30, "--learning_rate", 5e-3, "--warmup_steps", 3, "--logging_steps", 5,
        "--max_eval_samples", 64, "--do_train", "--do_eval", "--use_combine_grad", "--output_dir", tmp_path,
    )  # fmt: skip
    # Uniform over 50,257 tokens is 10.82 nats; the unigram entropy of the text is about 7.5.
    assert results(tmp_path)["eval_loss"] < bound
