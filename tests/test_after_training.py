"""What a run leaves: a folder that plain transformers and its pipelines load, a card with the real figures, a push."""

import re
import sys

import pytest
import torch
import transformers
import yaml
from commands import TINY_GPT2, one_error_line, results, run, run_script
from safetensors.torch import load_file
from stand_in_hub import TOKEN, StandInHub, client_environment

from utils import try_it
from utils.errors import UsageError

BERT = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,max_position_embeddings=64"
KINDS = {
    "gpt2": ["run_clm.py", *TINY_GPT2, "--vocab_size", "300"],
    "bert": ["run_mlm.py", "--model_type", "bert", "--config_overrides", BERT, "--vocab_size", "300", "--bf16",
             "--fp16_opt_level", "O2", "--use_combine_grad", "--max_seq_length", "32"],
    "xlnet": ["run_plm.py", "--model_type", "xlnet", "--config_overrides", "d_model=32,n_layer=2,n_head=2,d_inner=64",
              "--vocab_size", "300", "--max_seq_length", "32"],
}  # fmt: skip
STEPS = ["--do_train", "--do_eval", "--max_steps", "2", "--max_eval_samples", "8", "--use_cpu"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with StandInHub(tmp_path_factory.mktemp("hub")) as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def trained(files, hub, tmp_path_factory):
    """kind -> the output folder of a short run; that of gpt2 was pushed, with its log beside it."""
    made = {}

    def folder_of(kind: str):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("runs") / kind
            push, environment = [], {}
            if kind == "gpt2":
                push = ["--push_to_hub", "--hub_model_id", "user/tiny", "--hub_token", TOKEN]
                environment = client_environment(hub.url, tmp_path_factory.mktemp("home"), HF_HUB_OFFLINE="0")
            run_script(*KINDS[kind], *files, *STEPS, *push, "--output_dir", made[kind], **environment)
        return made[kind]

    return folder_of


def card(folder) -> tuple[dict, str]:
    """The metadata and the text of a model card."""
    _, metadata, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(metadata), text


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_loads_in_a_pipeline(trained, kind) -> None:
    folder = str(trained(kind))
    if kind == "bert":
        pipe = transformers.pipeline("fill-mask", folder, device="cpu")
        assert len(pipe(f"the {pipe.tokenizer.mask_token} horse")) == 5
    else:
        pipe = transformers.pipeline("text-generation", folder, device="cpu")
        assert pipe("the old horse", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith(
            "the old horse"
        )
    assert {p.dtype for p in pipe.model.parameters()} == {transformers.AutoModel.from_pretrained(folder).dtype}


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_has_the_real_figures(trained, kind, corpus) -> None:
    metadata, text = card(trained(kind))
    found = results(trained(kind))
    assert f"- Loss: {found['eval_loss']:.4f}" in text
    assert f"- Accuracy: {round(found['eval_accuracy'], 4)}" in text
    assert f"- Perplexity: {found['perplexity']:.4f}" in text
    assert f"{found['data_tokens']:,} tokens; {found['train_samples']:,} samples; 8 samples to evaluate on" in text
    assert f"was trained from scratch on {corpus / 'train.txt'}" in text
    assert "More information needed" not in text and "](https://huggingface.co/)" not in text
    assert metadata["library_name"] == "transformers" and "perplexity" in metadata["metrics"]
    if kind == "bert":
        assert "at O2 (bfloat16)" in text


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_a_prompt_with_a_mask_is_filled_in(trained, kind) -> None:
    answers = try_it.load(str(trained(kind)))("the old [MASK] sat near the barn")
    assert len(answers) == 5
    shares = [float(re.match(r" *([\d.]+)%", answer)[1]) for answer in answers]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100


def test_prompts_from_a_pipe(trained) -> None:
    done = run(
        ["bash", "-c", f"printf 'The old horse\\n\\nIn' | bash scripts/try_it.sh '{trained('gpt2')}'"],
        PYTHON=sys.executable, HF_ENDPOINT="http://127.0.0.1:9",
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("The old horse") and "\nIn" in done.stdout


def test_a_folder_without_a_model_is_told_of(tmp_path) -> None:
    with pytest.raises(UsageError, match="holds no trained model"):
        try_it.load(str(tmp_path))


# ---- hub ----
def test_the_run_was_pushed(trained, hub) -> None:
    folder = trained("gpt2")
    pushed = hub.root / "models" / "user" / "tiny"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md", "results.md", "all_results.json"):
        assert (pushed / name).read_bytes() == (folder / name).read_bytes(), name
    assert not list(pushed.glob("checkpoint-*")) and not (pushed / "report.json").exists()
    written = b"".join(path.read_bytes() for path in pushed.rglob("*") if path.is_file())
    assert TOKEN.encode() not in written


def test_an_evaluation_in_half_precision_costs_the_pushed_model_nothing(hub, files, tmp_path) -> None:
    environment = client_environment(hub.url, tmp_path / "home", HF_HUB_OFFLINE="0")
    push = ["--push_to_hub", "--hub_model_id", "user/half", "--hub_token", TOKEN]
    run_script(
        *KINDS["gpt2"], *files, *STEPS, *push, "--bf16_full_eval", "--output_dir", tmp_path / "run", **environment
    )
    for folder in (tmp_path / "run", hub.root / "models" / "user" / "half"):
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}


def test_what_was_pushed_is_a_model_to_start_from(trained, hub, files, tmp_path) -> None:
    trained("gpt2")
    environment = client_environment(hub.url, tmp_path / "home", HF_HUB_OFFLINE="0")
    command = [
        "run_clm.py",
        "--model_name_or_path",
        "user/tiny",
        *files,
        "--do_eval",
        "--max_eval_samples",
        "8",
        "--use_cpu",
    ]
    run_script(*command, "--output_dir", tmp_path / "out", **environment)
    assert results(tmp_path / "out")["eval_loss"] == pytest.approx(results(trained("gpt2"))["eval_loss"], rel=1e-6)


def test_a_wrong_token_is_told_before_training(hub, files, tmp_path) -> None:
    environment = client_environment(hub.url, tmp_path / "home", HF_HUB_OFFLINE="0")
    command = [
        *KINDS["gpt2"],
        *files,
        *STEPS,
        "--push_to_hub",
        "--hub_model_id",
        "user/other",
        "--hub_token",
        "hf_wrong",
    ]
    done = run_script(*command, "--output_dir", tmp_path / "out", expect=2, **environment)
    assert "--push_to_hub: the repository cannot be made: " in one_error_line(done)
    assert "hf_wrong" not in done.stderr + done.stdout


# ---- where the hub cannot be reached ----
def test_an_unreachable_hub_names_the_three_ways(tmp_path, files) -> None:
    environment = client_environment("http://127.0.0.1:9", tmp_path / "home", HF_HUB_OFFLINE="0")
    command = ["run_clm.py", "--model_name_or_path", "gpt2", *files, *STEPS, "--output_dir", tmp_path / "out"]
    message = one_error_line(run_script(*command, expect=2, **environment))
    for way in ("HF_ENDPOINT to a mirror", "--hub modelscope", "HF_HOME"):
        assert way in message
