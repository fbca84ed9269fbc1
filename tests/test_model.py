"""utils/model.py: the configuration from scratch, and what is said where a name or a setting is wrong."""

import logging
from types import SimpleNamespace

import pytest
import transformers
from transformers import CONFIG_MAPPING, GPT2Config

from utils import model
from utils.errors import UsageError
from utils.model_arguments import ModelArguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"model_type": "gtp2"},
            "--model_type gtp2: unknown; did you mean gpt2? Else name one of gpt2, openai-gpt, bert",
        ),
        ({"model_type": "zz"}, "--model_type zz: unknown; name one of gpt2, "),
        ({"config_overrides": "n_emb=32"}, "--config_overrides n_emb: gpt2 has no such setting; did you mean n_embd?"),
        ({"config_overrides": "n_embd=x"}, "--config_overrides n_embd=x: invalid literal"),
        ({"config_overrides": "n_layer=1,n_head=0"}, "--config_overrides n_head=0: give 1 or more"),
        ({"config_overrides": "n_positions=-4"}, "--config_overrides n_positions=-4: give 1 or more"),
        ({"model_name_or_path": "/no/such/folder"}, "--model_name_or_path /no/such/folder: no such folder; name one"),
        ({"model_name_or_path": "./folder"}, "--model_name_or_path ./folder: no such folder; name one"),
        ({"config_name": __file__}, f"--config_name {__file__}: is a file; name the folder that it is in"),
    ],
)
def test_a_wrong_name_or_setting(given, message) -> None:
    with pytest.raises(UsageError) as raised:
        model.load_config(ModelArguments(**{"model_type": "gpt2"} | given))
    assert str(raised.value).startswith(message)


def test_sizes_that_do_not_fit_name_the_flag_that_gave_them() -> None:
    arguments = ModelArguments(model_type="gpt2", config_overrides="n_embd=33,n_head=2,n_layer=1")
    with pytest.raises(
        UsageError, match="^--config_overrides n_embd=33,n_head=2,n_layer=1: .*divisible.*fit each other"
    ):
        config = model.load_config(arguments)
        model.load_model(transformers.AutoModelForCausalLM, arguments, config, SimpleNamespace(deepspeed=None))


def test_numbers_that_may_be_0_or_less() -> None:
    config = model.load_config(ModelArguments(model_type="roberta", config_overrides="pad_token_id=0"))
    assert config.pad_token_id == 0
    assert model.load_config(ModelArguments(model_type="xlnet", config_overrides="clamp_len=-1")).clamp_len == -1


@pytest.mark.parametrize("family", model.FAMILIES)
def test_a_model_without_its_tokenizer(family, tmp_path, tokenizers) -> None:
    """transformers makes an empty one of config.json alone."""
    CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"^--model_name_or_path {tmp_path}: holds no .*tokenizer"):
        model.load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))
    given = ModelArguments(model_name_or_path=str(tmp_path), tokenizer_name=str(tokenizers(family)))
    assert len(model.load_tokenizer(given)) > 100


def test_a_small_vocabulary_has_no_special_ids_outside_it_and_nothing_warns(caplog) -> None:
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            config = model.load_config(ModelArguments(model_type="gpt2", config_overrides="n_layer=1,vocab_size=301"))
            assert config.eos_token_id is None and config.vocab_size == 301 and caplog.text == ""
            GPT2Config(vocab_size=301)  # what is left out would be told of
            assert "eos_token_id" in caplog.text
    finally:
        transformers.utils.logging.disable_propagation()
    named = model.load_config(ModelArguments(model_type="gpt2", config_overrides="vocab_size=301,eos_token_id=7"))
    assert named.eos_token_id == 7
