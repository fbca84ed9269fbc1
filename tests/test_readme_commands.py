"""The README's commands for masked and permuted models, word for word, against a local stand-in of the hub.

tests/test_run_clm.py has the one for causal models.
"""

import pyarrow.parquet
import pytest
import torch
from commands import results, run_script
from stand_in_hub import StandInHub, client_environment, make_small_wikitext
from test_readme import commands
from transformers import RobertaConfig, RobertaForMaskedLM, XLNetConfig, XLNetLMHeadModel

from utils import tokenizer_training


def make_roberta(folder, text) -> None:
    tokenizer = tokenizer_training.train(text, "roberta", 400)
    tokenizer.model_max_length = 64
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=1, **sizes)
    save(RobertaForMaskedLM(config), tokenizer, folder)


def make_xlnet(folder, text) -> None:
    tokenizer = tokenizer_training.train(text, "xlnet", 400)
    tokenizer.model_max_length = 64
    config = XLNetConfig(vocab_size=len(tokenizer), d_model=32, n_layer=2, n_head=2, d_inner=64)
    save(XLNetLMHeadModel(config), tokenizer, folder)


def save(model, tokenizer, folder) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("script", "short_name", "repository", "make"),
    [
        ("run_mlm.py", "roberta-base", "FacebookAI/roberta-base", make_roberta),
        ("run_plm.py", "xlnet-base-cased", "xlnet/xlnet-base-cased", make_xlnet),
    ],
)
def test_the_readmes_command_word_for_word(tmp_path, script, short_name, repository, make):
    from datasets import Dataset

    [command] = [words for words in commands("README.md") if words[:4] == ["python", script, *words[2:3], short_name]]
    assert command[2:8] == [
        "--model_name_or_path", short_name, "--dataset_name", "wikitext", "--dataset_config_name", "wikitext-2-raw-v1"
    ]  # fmt: skip
    wikitext = make_small_wikitext(tmp_path / "hub" / "datasets" / "Salesforce" / "wikitext", articles=6)
    [train] = sorted(wikitext.rglob("train*.parquet"))
    torch.manual_seed(0)
    make(tmp_path / "hub" / "models" / repository, Dataset.from_list(pyarrow.parquet.read_table(train).to_pylist()))
    with StandInHub(tmp_path / "hub") as hub:
        environment = client_environment(hub.url, tmp_path / "home", HF_HUB_OFFLINE="0")
        # Only where the output goes is another folder than the README's.
        assert command[-2] == "--output_dir"
        run_script(script, *command[2:-1], tmp_path / "output", **environment)
    found = results(tmp_path / "output")
    assert found["epoch"] == 3.0 and found["eval_loss"] > 0 and found["gradient_buffers"]
    assert "| O2 | 3 |" in (tmp_path / "output" / "results.md").read_text()
