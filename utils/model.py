"""Configuration, tokenizer and model: loaded by name, or made from scratch."""

import difflib
import logging
import os
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from utils import modelscope, tokenizer_training
from utils.errors import UsageError, one_line
from utils.hub import CANONICAL_MODELS, explain
from utils.main_process import told_by_main
from utils.model_arguments import ModelArguments
from utils.native_activations import use_native_activations
from utils.packing import position_count
from utils.sharding import parameter_count, whole_at_first
from utils.streaming import Stream
from utils.training_arguments import LanguageModelingArguments

logger = logging.getLogger(__name__)

FAMILIES = ("gpt2", "openai-gpt", "bert", "roberta", "albert", "distilbert", "xlnet")


def load_config(model: ModelArguments) -> PreTrainedConfig:
    """The configuration that --config_name, --model_name_or_path or --model_type with --config_overrides asks for."""
    flag, name = (
        ("--config_name", model.config_name)
        if model.config_name
        else ("--model_name_or_path", model.model_name_or_path)
    )
    if name:
        try:
            return AutoConfig.from_pretrained(located(flag, name, model), **_hub_options(model))
        except Exception as error:
            raise _explain_local(error, flag, name, "config.json") from error
    if model.model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model.model_type), FAMILIES, n=1)
        meant = f"did you mean {close[0]}? Else " if close else ""
        raise UsageError(f"--model_type {model.model_type}: unknown; {meant}name one of {', '.join(FAMILIES)}")
    config = CONFIG_MAPPING[model.model_type]()
    if model.config_overrides:
        named = [setting.split("=")[0].strip() for setting in model.config_overrides.split(",")]
        for setting in named:
            if not hasattr(config, setting):
                close = difflib.get_close_matches(setting, config.to_dict(), n=1)
                meant = f"; did you mean {close[0]}?" if close else ""
                raise UsageError(f"--config_overrides {setting}: {model.model_type} has no such setting{meant}")
        plain = config.to_dict()
        try:
            config.update_from_string(model.config_overrides)
            # Made anew from the settings that were named, so that those which derive from them follow (XLNet's d_head).
            config = type(config)(**outside(config) | {name: getattr(config, name) for name in named})
        except Exception as error:  # of the configuration's own checks, too, which raise what they like
            raise UsageError(f"--config_overrides {model.config_overrides}: {one_line(error)}") from error
        for name in named:
            if _is_size(name, plain.get(name)) and getattr(config, name) < 1:
                raise UsageError(f"--config_overrides {name}={getattr(config, name)}: give 1 or more")
        logger.info("from scratch: %s with %s", model.model_type, model.config_overrides)
    return config


def _is_size(name: str, default: object) -> bool:
    return type(default) is int and default > 0 and not name.endswith(("_id", "_index"))


def outside(config: PreTrainedConfig) -> dict[str, None]:
    """None for each special id that a smaller vocabulary has no row for: the tokenizer's own come with `fit`."""
    ids = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    return {name: None for name, value in ids.items() if isinstance(value, int) and value >= config.vocab_size}


def load_config_and_tokenizer(
    script: str, text: Dataset | Stream, model: ModelArguments, checkpoint: str | None = None
) -> tuple[PreTrainedConfig, Tokenizer]:
    """Both by name or from scratch, fitting each other. Raises UsageError where they do not, and for a model that another
    script than `script` trains, before a tokenizer is trained for it.

    text: what a tokenizer is trained on if none is named. checkpoint: what the run resumes from, which has the tokenizer
    that was trained then.
    """
    config = load_config(model)
    check_objective(config, script)
    tokenizer = load_tokenizer(model)
    if tokenizer is None and checkpoint is not None:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        fit(config, tokenizer)
    elif tokenizer is None:
        tokenizer = train_tokenizer(text, model, config)
    check_vocabulary(tokenizer, config)
    return config, tokenizer


def load_tokenizer(model: ModelArguments) -> Tokenizer | None:
    """The tokenizer of --tokenizer_name or --model_name_or_path; None if neither is given."""
    flag, name = (
        ("--tokenizer_name", model.tokenizer_name)
        if model.tokenizer_name
        else ("--model_name_or_path", model.model_name_or_path)
    )
    if not name:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            located(flag, name, model), use_fast=model.use_fast_tokenizer, **_hub_options(model)
        )
    except Exception as error:
        raise _explain_local(error, flag, name, "tokenizer.json") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # made by transformers from config.json alone
        raise UsageError(f"{flag} {name}: holds no tokenizer; name the model's own by --tokenizer_name")
    return tokenizer


def train_tokenizer(text: Dataset | Stream, model: ModelArguments, config: PreTrainedConfig) -> Tokenizer:
    """Trains a tokenizer of the family's own kind on the corpus, and fits `config` to it. Trainer saves it with the model.

    The main process trains, then all load what it saved: that may be written otherwise inside, and the cache of token ids
    has one place for it.
    """

    def train() -> dict[str, bytes]:
        tokenizer = tokenizer_training.train(text, config.model_type, model.vocab_size or config.vocab_size)
        tokenizer.model_max_length = position_count(config) or tokenizer.model_max_length
        logger.info("no tokenizer named: trained one of %d tokens", len(tokenizer))
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return {file.name: file.read_bytes() for file in Path(folder).iterdir()}

    files = told_by_main(train)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    fit(config, tokenizer)
    return tokenizer


def fit(config: PreTrainedConfig, tokenizer: Tokenizer) -> None:
    """Gives the configuration the vocabulary and the special ids of a tokenizer that was trained for it."""
    config.vocab_size = len(tokenizer)
    for kind in ("bos", "eos", "pad", "cls", "sep"):
        name = f"{kind}_token_id"
        if hasattr(config, name):
            setattr(config, name, getattr(tokenizer, name))


def check_vocabulary(tokenizer: Tokenizer, config: PreTrainedConfig) -> None:
    """Raises UsageError if the tokenizer has ids that the model's embedding has no row for."""
    if len(tokenizer) > config.vocab_size:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, more than the {config.vocab_size} rows of the model's embedding; "
            f"from scratch add --config_overrides vocab_size={len(tokenizer)}, else name the model's own tokenizer by "
            "--tokenizer_name"
        )


def check_objective(config: PreTrainedConfig, script: str) -> None:
    """Raises UsageError for a model that another script trains, naming that script."""
    kind = config.model_type
    if kind == "xlnet":
        belongs: str | None = "run_plm.py"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        # BERT and its like predict from both sides, unless they are told to be decoders.
        belongs = "run_clm.py" if script == "run_clm.py" and getattr(config, "is_decoder", False) else "run_mlm.py"
    else:
        belongs = "run_clm.py" if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None
    if belongs is None:
        raise UsageError(f"{kind}: none of the scripts trains a model of this kind")
    if belongs != script:
        raise UsageError(f"{kind}: a model of this kind is trained by {belongs}, not by {script}")


def load_model(
    auto_class, model: ModelArguments, config: PreTrainedConfig, args: LanguageModelingArguments
) -> PreTrainedModel:
    """The model with its saved weights, or with new ones drawn from torch's generator: seed it before.

    Its activations are torch's own kernels, as native_activations tells.
    """
    made = _make(auto_class, model, config, args)
    use_native_activations(made)
    return made


def _make(
    auto_class, model: ModelArguments, config: PreTrainedConfig, args: LanguageModelingArguments
) -> PreTrainedModel:
    if model.model_name_or_path:
        dtype = model.dtype if model.dtype in ("auto", None) else getattr(torch, model.dtype)
        try:
            return auto_class.from_pretrained(
                located("--model_name_or_path", model.model_name_or_path, model),
                config=config,
                dtype=dtype,
                attn_implementation=model.attn_implementation,
                **_hub_options(model),
            )
        except Exception as error:
            if model.attn_implementation is not None and isinstance(error, ImportError | ValueError):
                raise _explain_attention(error, model.attn_implementation) from error
            raise _explain_local(error, "--model_name_or_path", model.model_name_or_path, "weights") from error
    try:
        with whole_at_first(args):
            made = auto_class.from_config(
                config, trust_remote_code=model.trust_remote_code, attn_implementation=model.attn_implementation
            )
    except Exception as error:  # what a model's own code raises for sizes that do not fit
        if model.attn_implementation is not None and isinstance(error, ImportError | ValueError):
            raise _explain_attention(error, model.attn_implementation) from error
        given = (
            f"--config_overrides {model.config_overrides}"
            if model.config_overrides
            else f"--model_type {model.model_type}"
        )
        raise UsageError(f"{given}: {one_line(error)[:200]}; give sizes that fit each other") from error
    logger.info("from scratch: %.2fM parameters", parameter_count(made) / 1e6)
    return made


def _explain_attention(error: Exception, implementation: str) -> UsageError:
    return UsageError(f"--attn_implementation {implementation}: {one_line(error)[:200]}; leave the flag out")


def located(flag: str, name: str, model: ModelArguments) -> str:
    """A folder here as it is named; else the hub's present name for an old short one, or the folder that --hub modelscope
    fetched it into."""
    if os.path.exists(name):
        return name
    name = CANONICAL_MODELS.get(name, name)
    if model.hub == "modelscope":
        revision = None if model.model_revision == "main" else model.model_revision  # its own is called master
        return modelscope.model_folder(flag, name, revision, model.cache_dir)
    return name


def _hub_options(model: ModelArguments) -> dict:
    return {
        "cache_dir": model.cache_dir,
        "revision": model.model_revision,
        "token": model.token,
        "trust_remote_code": model.trust_remote_code,
    }


def _explain_local(error: Exception, flag: str, name: str, missing: str) -> UsageError:
    if isinstance(error, UsageError):
        return error
    if "custom code" in str(error):
        return UsageError(
            f"{flag} {name}: comes with code of its own, which runs only with --trust_remote_code; read it first"
        )
    if os.path.isdir(name):
        return UsageError(f"{flag} {name}: this folder holds no readable {missing}: {one_line(error)[:200]}")
    if os.path.isfile(name):
        return UsageError(f"{flag} {name}: is a file; name the folder that it is in")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:  # which no name on the hub has
        return UsageError(f"{flag} {name}: no such folder; name one that holds {missing}, or a model on the hub")
    return explain(error, flag, name)
