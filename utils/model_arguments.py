"""Flags about the model: its weights, its tokenizer, and where they come from."""

from dataclasses import dataclass, field

from utils.errors import UsageError


@dataclass
class ModelArguments:
    """Which model is trained, from which weights, with which tokenizer."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Weights to start from: a name on the hub (gpt2) or a local folder. Leave out to train from scratch."
        },
    )
    model_type: str | None = field(
        default=None, metadata={"help": "From scratch: the kind of model, e.g. gpt2 or openai-gpt."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "From scratch: settings that differ from the kind's own, e.g. n_embd=256,n_layer=4,n_head=4."
        },
    )
    config_name: str | None = field(
        default=None, metadata={"help": "A configuration's name or folder, if it is not model_name_or_path."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "A tokenizer's name or folder, if it is not model_name_or_path. With neither, one is trained."
        },
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Size of the tokenizer that is trained on the corpus when none is named."}
    )
    hub: str = field(
        default="huggingface",
        metadata={
            "help": "Where names that are no folders here are looked up. modelscope: by its own library, with its names.",
            "choices": ["huggingface", "modelscope"],
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept. Default: under HF_HOME."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use the tokenizer of the tokenizers library."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    token: str | None = field(
        default=None, metadata={"help": "Token for the hub. Default: the one that `hf auth login` has saved."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a model or dataset. Only if you have read it."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type in which weights are loaded. Training keeps it at O0 and O1.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "How attention is computed. flash_attention_2 is npu_fusion_attention on an NPU. Default: sdpa.",
            "choices": ["eager", "sdpa", "flash_attention_2"],
        },
    )

    def __post_init__(self) -> None:
        if self.config_overrides is not None and (self.config_name or self.model_name_or_path):
            given = "--config_name" if self.config_name else "--model_name_or_path"
            raise UsageError(
                f"--config_overrides {self.config_overrides}: works from scratch, with --model_type; remove {given}"
            )
        if not (self.model_name_or_path or self.config_name or self.model_type):
            raise UsageError(
                "no model: add --model_name_or_path NAME_OR_FOLDER to start from weights, or --model_type gpt2 to train "
                "from scratch"
            )
        if self.vocab_size is not None and self.vocab_size < 1:
            raise UsageError(f"--vocab_size {self.vocab_size}: give the number of tokens, such as 8000")
